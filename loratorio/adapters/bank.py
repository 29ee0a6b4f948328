"""All LoRAs of a generation, with the base weights left alone: each row of a batch gets its own.

While the bank is attached, a forward hook on every touched layer adds to each row the deltas of that row's mix. Rows of
equal mix that stand together form a segment. What neighbouring segments have in common is added to all of them in one product, and
what single LoRAs add beside it in another one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoratorioError
from .delta import Adapter, Fitted, fit_all
from .plan import Coefficients, Job, Segment, planned, segments
from .stacks import Stacks, Where


class Change(NamedTuple):
    """What one LoRA adds to one layer's weight: ΔW at its strength, float32, and the rank that it is stored with."""

    weight: Tensor
    rank: int


PLANS = 64
"""So many ways to route rows are remembered, and so many dense sums of several LoRAs."""

_Plan = dict[tuple[str, Where], list[Job]]
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
    segments: tuple[Segment, ...] = ()
    by_layer: Mapping[str, Coefficients] = field(default_factory=dict)
    plan: _Plan = field(default_factory=dict)


class Bank:
    """Row routing for a fixed list of LoRAs.

    Use: ``with bank.attached(layers), bank.routed(mixes): model(rows)``. Outside of `routed` the hooks do nothing.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self._plans: dict[tuple[Segment, ...], _Plan] = {}
        self._routing = _Routing()
        self._apart: frozenset[int] = frozenset()
        self._most_apart = 0
        self._resident: dict[int, None] = {}  # of those kept apart, the last used at the end
        self._use({})

    def keep_apart(self, numbers: Iterable[int], most: int) -> None:
        """Of these LoRAs, the candidates of a pool, only the `most` last used ones stay on the model's device. Before attaching."""
        self._apart, self._most_apart = frozenset(numbers), most

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Bring the attached LoRAs, but for those that are kept apart, to where the model's layers compute.

        Else that is done at the first call of each layer, and so is whatever was prepared for another dtype than a layer's output has.
        """
        self._stacks.prepare(Where(device, dtype))

    @property
    def numbers(self) -> int:
        """How many numbers are on the device when all is in use: each LoRA's once, of those kept apart the largest that may stay, and
        where several change weights densely the sum of what rows have in common."""
        apart = sorted((self.adapters[number].size for number in self._apart), reverse=True)
        together = [adapter for number, adapter in enumerate(self.adapters) if number not in self._apart]
        dense = sorted(adapter.dense_size for adapter in together)
        summed = dense[-1] if len(dense) > 1 and dense[-2] else 0
        return sum(adapter.size for adapter in together) + sum(apart[: self._most_apart]) + summed

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
        before, now = self._routing, tuple(segments(mixes))
        self._make_room(now)
        # What differs between layers is another at each step: not worth keeping.
        plan: _Plan = {} if by_layer else self._plan_for(now)
        self._routing = _Routing(tuple(mixes), now, by_layer or {}, plan)
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

    def _make_room(self, now: Sequence[Segment]) -> None:
        """Let go of the LoRAs kept apart that were not used for longest, where these segments need the room."""
        for number in sorted(self._apart):
            if any(segment.mix[number] for segment in now):
                self._resident.pop(number, None)
                self._resident[number] = None
        used = {number for number in self._resident if any(segment.mix[number] for segment in now)}
        too_many = len(self._resident) - max(self._most_apart, len(used))
        gone = [number for number in self._resident if number not in used][: max(0, too_many)]
        if gone:
            self.let_go(gone)

    def let_go(self, numbers: Iterable[int]) -> None:
        """Free what these LoRAs, of those kept apart, have on the model's device; it is made again when one is asked for."""
        gone = self._apart & set(numbers)
        for number in gone:
            self._resident.pop(number, None)
        self._plans.clear()
        self._stacks.drop(gone)

    def _plan_for(self, now: tuple[Segment, ...]) -> _Plan:
        if now not in self._plans and (len(self._plans) >= PLANS or self._stacks.sums >= PLANS):
            # Start afresh before what may never be used again fills the memory.
            self._plans.clear()
            self._stacks.drop_sums()
        return self._plans.setdefault(now, {})

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
        self._fitted, self._stacks = fitted, Stacks(self.adapters, fitted, self._apart)
        self._plans.clear()
        self._resident.clear()

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

    def _jobs(self, name: str, like: Tensor) -> list[Job]:
        where = Where(like.device, like.dtype)
        plan = self._routing.plan
        if (name, where) not in plan:
            here = self._routing.segments
            if name in self._routing.by_layer:
                here = tuple(replace(segment, mix=self._routing.by_layer[name]) for segment in here)
            plan[name, where] = list(planned(name, here, self._stacks, where))
        return plan[name, where]


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
