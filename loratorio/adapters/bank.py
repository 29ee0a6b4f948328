"""All LoRAs of a generation, with the base weights left alone: each row of a batch gets its own.

While the bank is attached, a forward hook on every touched layer adds to each row the deltas of that row's mix. Rows of
equal mix that stand together form a segment; segments of equal length go through two batched matrix products a layer.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoratorioError
from .delta import Adapter, Delta, Dense, LowRank, fit

Mix = tuple[float, ...]


@dataclass(frozen=True)
class _Segment:
    """Rows `start` to `stop` of a batch, all under one mix."""

    mix: Mix
    start: int
    stop: int


@dataclass(frozen=True)
class _LowRankStack:
    """Low-rank deltas of adjacent segments: down (G, r, in, …), up (G, out, r), ranks padded with zeros."""

    down: Tensor
    up: Tensor


class Change(NamedTuple):
    """What one LoRA adds to one layer's weight: ΔW at its strength, float32, and the rank that it is stored with."""

    weight: Tensor
    rank: int


_Fitted = dict[str, list[tuple[int, list[Delta]]]]


class Bank:
    """Row routing for a fixed list of LoRAs.

    Use: ``with bank.attached(layers), bank.routed(mixes): model(rows)``. Outside of `routed` the hooks do nothing.

    Attributes:
        plan_limit: for how many combinations of mixes the stacked deltas are kept on the model's device.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        # A step that is cut into single rows uses one plan per LoRA and one for all together.
        self.plan_limit = 2 * len(self.adapters) + 4
        self._deltas: _Fitted = {}
        self._segments: tuple[_Segment, ...] = ()
        self._row_count = 0
        # Per set of mixes that was routed together, what its layers need, on their device; the oldest goes first.
        self._plans: OrderedDict[tuple[Mix, ...], dict[tuple[Any, ...], Any]] = OrderedDict()

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hook the layers that the adapters touch; on the way out every hook is gone, also after an exception.

        Raises:
            LoratorioError: a LoRA changes a layer that `layers` lacks, or one of another shape.
        """
        deltas = self._fitted(layers)
        with ExitStack() as undo:
            self._deltas = deltas
            undo.callback(self._forget)
            undo.enter_context(_uncompiled())
            for name in deltas:
                undo.callback(layers[name].register_forward_hook(self._hook(name), with_kwargs=True).remove)
            yield

    @contextmanager
    def routed(self, mixes: Sequence[Mix]) -> Iterator[None]:
        """While this lasts, row i of every model call gets `mixes[i]`.

        A model that folds more into its batch dimension (frames, crops) gives every row the same number of entries.
        Raises ValueError for a mix that has not one coefficient per adapter.
        """
        if any(len(mix) != len(self.adapters) for mix in mixes):
            raise ValueError(f"every mix must have {len(self.adapters)} coefficients, one per LoRA")
        before = self._segments, self._row_count
        self._segments, self._row_count = tuple(_segments(mixes)), len(mixes)
        self._recall(tuple(segment.mix for segment in self._segments))
        try:
            yield
        finally:
            self._segments, self._row_count = before

    def changes(self) -> Iterator[tuple[str, dict[int, Change]]]:
        """Layer by layer, what each LoRA (by number) adds to the layer's weight. Nothing while the bank is not attached."""
        for name in self._deltas:
            by_number = {}
            for number, deltas in self._deltas[name]:
                change = _change(deltas, self.adapters[number].strength)
                if change is not None:
                    by_number[number] = change
            yield name, by_number

    def _fitted(self, layers: Mapping[str, nn.Module]) -> _Fitted:
        fitted: _Fitted = {}
        for number, adapter in enumerate(self.adapters):
            for name, deltas in adapter.deltas.items():
                if name not in layers:
                    raise LoratorioError(
                        f"LoRA {adapter.name} changes the layer {name}, which this model does not have. "
                        "It was made for another kind of model: remove it from the prompt."
                    )
                try:
                    fitting = [fit(delta, layers[name]) for delta in deltas]
                except ValueError as problem:
                    raise LoratorioError(
                        f"LoRA {adapter.name} does not fit the layer {name}: {problem}. "
                        "It was made for another kind of model: remove it from the prompt."
                    ) from None
                fitted.setdefault(name, []).append((number, fitting))
        return fitted

    def _forget(self) -> None:
        self._deltas = {}
        self._plans.clear()

    def _recall(self, mixes: tuple[Mix, ...]) -> None:
        """Make the plan of these mixes the current (last) one, and drop plans that have long not been used."""
        self._plans[mixes] = self._plans.pop(mixes, {})
        while len(self._plans) > self.plan_limit:
            self._plans.popitem(last=False)

    def _planned(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        plan = next(reversed(self._plans.values()))
        if key not in plan:
            plan[key] = make()
        return plan[key]

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def add_deltas(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not self._segments:
                return None
            rows = args[0] if args else next(iter(kwargs.values()))
            return self._add(name, layer, rows, output)

        return add_deltas

    def _add(self, name: str, layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
        per_row, rest = divmod(rows.shape[0], self._row_count)
        if rest:
            raise LoratorioError(
                f"The layer {name} was given {rows.shape[0]} entries for {self._row_count} rows: this model, or another "
                "extension, regroups the batch in a way that LoRAtorio cannot follow."
            )
        # Under autocast a layer's output is in the dtype that it computed in.
        rows = rows.to(output.dtype)
        touching = {number for number, _ in self._deltas[name]}
        # A mix may differ between layers (a method that chooses one LoRA for each).
        here = [(_at(segment.mix, name), segment) for segment in self._segments]
        active = [
            _Segment(mix, segment.start * per_row, segment.stop * per_row)
            for mix, segment in here
            if any(mix[number] for number in touching)
        ]
        for run in _adjacent_runs(active):
            stack = self._low_rank(name, tuple(segment.mix for segment in run), output)
            if stack is not None:
                part = slice(run[0].start, run[-1].stop)
                output[part] += _apply_low_rank(layer, rows[part], stack)
        for segment in active:
            dense = self._dense(name, segment.mix, output)
            if dense is not None:
                part = slice(segment.start, segment.stop)
                output[part] += _apply_dense(layer, rows[part], dense)
        return output

    def _low_rank(self, name: str, mixes: tuple[Mix, ...], like: Tensor) -> _LowRankStack | None:
        """The stacked low-rank deltas of these mixes in one layer, on the device and in the dtype of `like`."""

        def make() -> _LowRankStack | None:
            factors = [self._low_rank_factors(name, mix, like.device) for mix in mixes]
            present = [pair for pair in factors if pair is not None]
            if not present:
                return None
            rank = max(len(down) for down, _ in present)
            down_stack = like.new_zeros((len(mixes), rank, *present[0][0].shape[1:]))
            up_stack = like.new_zeros((len(mixes), present[0][1].shape[0], rank))
            for place, pair in enumerate(factors):
                if pair is not None:
                    down, up = pair
                    down_stack[place, : len(down)] = down
                    up_stack[place, :, : len(down)] = up
            return _LowRankStack(down_stack, up_stack)

        stack: _LowRankStack | None = self._planned(("low rank", name, mixes, like.device, like.dtype), make)
        return stack

    def _low_rank_factors(self, name: str, mix: Mix, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """One mix's (down, up) in float32, the ranks of its LoRAs one after another; strengths multiplied into up."""
        downs, ups = [], []
        for number, deltas in self._deltas[name]:
            factor = mix[number] * self.adapters[number].strength
            for delta in deltas if factor else ():
                if isinstance(delta, LowRank):
                    downs.append(delta.down.to(device, torch.float32))
                    ups.append(delta.up.to(device, torch.float32) * (delta.scale * factor))
        return (torch.cat(downs), torch.cat(ups, dim=1)) if downs else None

    def _dense(self, name: str, mix: Mix, like: Tensor) -> Dense | None:
        """One mix's dense change of one layer, on the device and in the dtype of `like`."""

        def make() -> Dense | None:
            weight: Tensor | None = None
            bias: Tensor | None = None
            for number, deltas in self._deltas[name]:
                factor = mix[number] * self.adapters[number].strength
                for delta in deltas if factor else ():
                    if isinstance(delta, Dense):
                        weight = _plus(weight, delta.weight, factor, like.device)
                        bias = _plus(bias, delta.bias, factor, like.device)
            if weight is None and bias is None:
                return None
            return Dense(*(None if part is None else part.to(like.dtype) for part in (weight, bias)))

        dense: Dense | None = self._planned(("dense", name, mix, like.device, like.dtype), make)
        return dense


def _at(mix: Mix, layer: str) -> Mix:
    """The mix of one layer: a mix that is not the same everywhere says so by a method `at`."""
    own: Mix = mix.at(layer) if hasattr(mix, "at") else mix
    return own


def _plus(total: Tensor | None, part: Tensor | None, factor: float, device: torch.device) -> Tensor | None:
    if part is None:
        return total
    scaled = part.to(device, torch.float32) * factor
    return scaled if total is None else total + scaled


def _change(deltas: Sequence[Delta], strength: float) -> Change | None:
    total: Tensor | None = None
    rank = 0
    for delta in deltas:
        weight = delta.dense() if isinstance(delta, LowRank) else delta.weight
        if weight is not None:
            total = _plus(
                total, weight.flatten(1) if weight.ndim > 1 else weight[:, None], strength, weight.device
            )
            rank += delta.rank if isinstance(delta, LowRank) else min(weight.shape[0], weight[0].numel())
    return None if total is None else Change(total, rank)


def _segments(mixes: Sequence[Mix]) -> Iterator[_Segment]:
    """Runs of rows with one mix; rows of the base alone (all zeros) need nothing and have no segment."""
    start = 0
    for mix, run in groupby(mixes):
        stop = start + len(list(run))
        if any(mix):
            yield _Segment(mix, start, stop)
        start = stop


def _adjacent_runs(segments: Sequence[_Segment]) -> Iterator[list[_Segment]]:
    """Segments that touch and are of equal length, which one batched matrix product can serve."""
    run: list[_Segment] = []
    for segment in segments:
        fits = (
            run
            and run[-1].stop == segment.start
            and run[0].stop - run[0].start == segment.stop - segment.start
        )
        if run and not fits:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _apply_low_rank(layer: nn.Module, rows: Tensor, stack: _LowRankStack) -> Tensor:
    """up · down · rows for G equal groups of rows; shaped as the layer's output for these rows."""
    groups, rank = stack.down.shape[:2]
    if isinstance(layer, nn.Conv2d):
        lowered = _conv_down(layer, rows, stack.down)
        height, width = lowered.shape[-2:]
        raised = torch.matmul(stack.up.unsqueeze(1), lowered.reshape(groups, -1, rank, height * width))
        return raised.reshape(len(rows), -1, height, width)
    tokens = rows.reshape(groups, -1, rows.shape[-1])
    raised = torch.bmm(torch.bmm(tokens, stack.down.transpose(1, 2)), stack.up.transpose(1, 2))
    return raised.reshape(*rows.shape[:-1], raised.shape[-1])


def _conv_down(layer: nn.Conv2d, rows: Tensor, down: Tensor) -> Tensor:
    """The layer's own convolution (stride, padding, tiling) with each group's down: (rows, r, H', W')."""
    groups, rank = down.shape[:2]
    pointwise = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and not any(layer.padding)
    if pointwise:
        pixels = rows.reshape(groups, -1, rows.shape[1], rows.shape[2] * rows.shape[3])
        lowered = torch.matmul(down.reshape(groups, 1, rank, -1), pixels)
        return lowered.reshape(len(rows), rank, *rows.shape[2:])
    # `_conv_forward` knows the layer's padding mode, which tiling changes while the model lives.
    return torch.cat(
        [layer._conv_forward(part, own, None) for part, own in zip(rows.chunk(groups), down, strict=True)]
    )


def _apply_dense(layer: nn.Module, rows: Tensor, delta: Dense) -> Tensor:
    """What a dense change of weight and bias adds to the layer's output for these rows."""
    weight, bias = delta.weight, delta.bias
    pictures = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
    if weight is None:
        assert bias is not None
        return bias.view(1, -1, *[1] * (rows.ndim - 2)) if pictures else bias
    if isinstance(layer, nn.Conv2d):
        changed: Tensor = layer._conv_forward(rows, weight, bias)
        return changed
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(rows, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(rows, weight, bias)


def _uncompiled() -> Any:
    """While hooks are on, compiled models run eagerly: code that torch.compile made before would pass the hooks by."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return _recompiled()


@contextmanager
def _recompiled() -> Iterator[None]:
    """Before torch 2.6: forget compiled code, so that it is made anew with the hooks, and again without them."""
    reset = sys.modules["torch._dynamo"].reset
    reset()
    try:
        yield
    finally:
        reset()
