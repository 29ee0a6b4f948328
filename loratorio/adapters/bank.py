"""All LoRAs of a generation, with the base weights left alone: each row of a batch gets its own.

While the bank is attached, a forward hook on every touched layer adds to each row the deltas of that row's mix. Rows of
equal mix that stand together form a segment; segments of equal length go through two batched matrix products a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoratorioError
from .apply import add_dense, add_low_rank
from .delta import Adapter, Fitted, fit_all
from .stacks import Coefficients, Stacks


class Change(NamedTuple):
    """What one LoRA adds to one layer's weight: ΔW at its strength, float32, and the rank that it is stored with."""

    weight: Tensor
    rank: int


@dataclass(frozen=True)
class _Segment:
    """Rows `start` to `stop` of a batch, all under one mix."""

    mix: Coefficients
    start: int
    stop: int


@dataclass(frozen=True)
class _Job:
    """What to add to rows `start` to `stop` of a layer: `add(layer, rows, output)` does it in place."""

    start: int
    stop: int
    add: Callable[[nn.Module, Tensor, Tensor], None]


_Plan = dict[tuple[str, torch.device, torch.dtype], list[_Job]]
"""The jobs of every layer for one way to route rows."""


@dataclass(frozen=True)
class _Routing:
    """How the rows of the next model calls are routed.

    Attributes:
        mixes: one for each row. segments: of the rows that any LoRA acts on.
        by_layer: the mix that takes the place of every segment's in a layer.
        plan: the jobs that were worked out for this routing.
    """

    mixes: tuple[Coefficients, ...] = ()
    segments: tuple[_Segment, ...] = ()
    by_layer: Mapping[str, Coefficients] = field(default_factory=dict)
    plan: _Plan = field(default_factory=dict)


class Bank:
    """Row routing for a fixed list of LoRAs.

    Use: ``with bank.attached(layers), bank.routed(mixes): model(rows)``. Outside of `routed` the hooks do nothing.

    Attributes:
        plan_limit: for how many runs of mixes a layer's deltas are kept on the model's device.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        # A step that is cut into single rows needs each LoRA's own, one that is run whole a stack of them all.
        self.plan_limit = 2 * len(self.adapters) + 4
        self._plans: dict[tuple[_Segment, ...], _Plan] = {}
        self._routing = _Routing()
        self._use({})

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hook the layers that the adapters touch; on the way out every hook is gone, also after an exception.

        Raises:
            LoratorioError: a LoRA changes a layer that `layers` lacks, or one of another shape.
        """
        fitted = self._fit(layers)
        with ExitStack() as undo:
            undo.callback(self._use, {})
            self._use(fitted)
            undo.enter_context(_uncompiled())
            for name in fitted:
                hook = layers[name].register_forward_hook(partial(self._add, name), with_kwargs=True)
                undo.callback(hook.remove)
            yield

    @contextmanager
    def routed(
        self, mixes: Sequence[Coefficients], by_layer: Mapping[str, Coefficients] | None = None
    ) -> Iterator[None]:
        """While this lasts, row i of every model call gets `mixes[i]`, one coefficient per adapter.

        A model that folds more into its batch dimension (frames, crops) gives every row the same number of entries.

        Args:
            by_layer: by a layer's name, the mix that every row with any LoRA gets there instead.

        Raises:
            ValueError: a mix has not one coefficient per adapter.
        """
        if any(len(mix) != len(self.adapters) for mix in mixes):
            raise ValueError(f"every mix must have {len(self.adapters)} coefficients, one per LoRA")
        before, segments = self._routing, tuple(_segments(mixes))
        # What differs between layers is another at each step: not worth keeping.
        plan: _Plan = {} if by_layer else self._plan_for(segments)
        self._routing = _Routing(tuple(mixes), segments, by_layer or {}, plan)
        try:
            yield
        finally:
            self._routing = before

    @contextmanager
    def routed_part(self, numbers: Sequence[int]) -> Iterator[None]:
        """While this lasts, model calls have only those of the routed rows that have these numbers, in this order."""
        routing = self._routing
        with self.routed([routing.mixes[number] for number in numbers], routing.by_layer):
            yield

    def changes(self) -> Iterator[tuple[str, dict[int, Change]]]:
        """Layer by layer, what each LoRA (by number) adds to the layer's weight. Nothing while the bank is not attached."""
        for name, by_number in self._fitted.items():
            made = {
                number: _change(fitted, self.adapters[number].strength)
                for number, fitted in by_number.items()
            }
            yield name, {number: change for number, change in made.items() if change is not None}

    def _plan_for(self, segments: tuple[_Segment, ...]) -> _Plan:
        if segments not in self._plans and self._stacks.most >= self.plan_limit:
            # Start afresh before stacks that may never be used again fill the memory.
            self._plans.clear()
            self._stacks.clear()
        return self._plans.setdefault(segments, {})

    def _fit(self, layers: Mapping[str, nn.Module]) -> dict[str, dict[int, Fitted]]:
        fitted: dict[str, dict[int, Fitted]] = {}
        for number, adapter in enumerate(self.adapters):
            for name, deltas in adapter.deltas.items():
                if name not in layers:
                    raise LoratorioError(
                        f"LoRA {adapter.name} changes the layer {name}, which this model does not have. "
                        "It was made for another kind of model: remove it from the prompt."
                    )
                try:
                    fitted.setdefault(name, {})[number] = fit_all(deltas, layers[name])
                except ValueError as problem:
                    raise LoratorioError(
                        f"LoRA {adapter.name} does not fit the layer {name}: {problem}. "
                        "It was made for another kind of model: remove it from the prompt."
                    ) from None
        return fitted

    def _use(self, fitted: dict[str, dict[int, Fitted]]) -> None:
        self._fitted, self._stacks = fitted, Stacks(self.adapters, fitted)
        self._plans.clear()

    def _add(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """The forward hook of every touched layer: each row's delta, added to the layer's output in place."""
        if not self._routing.segments:
            return
        rows: Tensor = args[0] if args else next(iter(kwargs.values()))
        count = len(self._routing.mixes)
        per_row, rest = divmod(rows.shape[0], count)
        if rest:
            raise LoratorioError(
                f"The layer {name} was given {rows.shape[0]} entries for {count} rows: this model, or another "
                "extension, regroups the batch in a way that LoRAtorio cannot follow."
            )
        # Under autocast a layer's output is in the dtype that it computed in.
        rows = rows.to(output.dtype)
        for job in self._jobs(name, output):
            part = slice(job.start * per_row, job.stop * per_row)
            job.add(layer, rows[part], output[part])

    def _jobs(self, name: str, like: Tensor) -> list[_Job]:
        key = (name, like.device, like.dtype)
        plan = self._routing.plan
        if key not in plan:
            plan[key] = list(self._planned(name, like))
        return plan[key]

    def _planned(self, name: str, like: Tensor) -> Iterator[_Job]:
        here = self._routing.segments
        if name in self._routing.by_layer:
            here = tuple(replace(segment, mix=self._routing.by_layer[name]) for segment in here)
        active = [segment for segment in here if self._stacks.touches(name, segment.mix)]
        for run in _adjacent_runs(active):
            stack = self._stacks.low_rank(name, tuple(segment.mix for segment in run), like)
            if stack is not None:
                yield _Job(run[0].start, run[-1].stop, partial(add_low_rank, down=stack[0], up=stack[1]))
        for segment in active:
            change = self._stacks.dense(name, segment.mix, like)
            if change is not None:
                add = partial(add_dense, delta=change[0], factor=change[1])
                yield _Job(segment.start, segment.stop, add)


def _change(fitted: Fitted, strength: float) -> Change | None:
    parts: list[Tensor] = []
    rank = 0
    if fitted.low_rank is not None:
        parts.append(fitted.low_rank.dense())
        rank += fitted.low_rank.rank
    if fitted.dense is not None and fitted.dense.weight is not None:
        parts.append(fitted.dense.weight.to(torch.float32))
        rank += min(parts[-1].shape[0], parts[-1][0].numel())
    return (
        Change(sum(parts[1:], parts[0]).flatten(1 if parts[0].ndim > 1 else 0) * strength, rank)
        if parts
        else None
    )


def _segments(mixes: Sequence[Coefficients]) -> Iterator[_Segment]:
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
