"""All LoRAs of a generation. Each row of a batch gets its own, and the base weights stay unchanged.

While the bank is attached, a forward hook on every touched layer adds to each row the deltas of that row's mix. Adjacent rows with
the same mix form a segment. What neighbouring segments have in common is added to all of them in one product; the rest of each LoRA
in another one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .delta import Adapter, Fitted, LowRank
from .plan import Coefficients, Product, Segment, planned, segments, sharing
from .stacks import Stacks, Target


class Regrouped(Exception):
    """A layer's entries are not the rows of the call, so it is unknown which row an entry belongs to."""


PLANS = 64
"""The most routings that are cached, and the most dense sums of several LoRAs."""

_Plan = dict[tuple[str, Target], Sequence[Product]]
"""The products of every layer for one way to route rows."""


@dataclass(frozen=True)
class _Routing:
    """How the rows of the next model calls are routed.

    Attributes:
        mixes: one per row. segments: those that any LoRA acts on.
        by_layer: by layer, the mix that replaces every segment's mix there.
        plan: the products of this routing that are already planned.
        one_mix: whether all rows are under one mix.
    """

    mixes: tuple[Coefficients, ...] = ()
    segments: tuple[Segment, ...] = ()
    by_layer: Mapping[str, Coefficients] = field(default_factory=dict)
    plan: _Plan = field(default_factory=dict)
    one_mix: bool = False


class _Inputs:
    """Which layers get the same input one after another, as it was in the first model call.

    Attributes:
        shared: by layer, all those that share its input, in order; layers that share it with none are left out.
    """

    def __init__(self) -> None:
        self.shared: dict[str, tuple[str, ...]] = {}
        self._runs: list[list[str]] | None = []
        self._last: Callable[[], Tensor | None] = lambda: None

    def meet(self, name: str, given: Tensor) -> None:
        """A layer is called for the first time with this input."""
        if self._runs is None:
            return
        if self._last() is given:
            self._runs[-1].append(name)
        else:
            self._runs.append([name])
        self._last = ref(given)

    def settle(self) -> bool:
        """The first call is over. Returns whether any layers share their input and were not known to."""
        runs, self._runs = self._runs, None if self._runs else self._runs
        for run in runs or []:
            if len(run) > 1 and not self.shared.keys() & run:
                self.shared.update(dict.fromkeys(run, tuple(run)))
        return bool(runs and self.shared)


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
        self._stacks: Stacks
        self._inputs: _Inputs
        self._use({})

    @property
    def is_routed(self) -> bool:
        """Whether model calls get routed rows."""
        return bool(self._routing.mixes)

    def keep_apart(self, numbers: Iterable[int], most: int) -> None:
        """Keep only the `most` last used of these LoRAs, a pool's candidates, on the model's device. Call before attaching."""
        self._apart, self._most_apart = frozenset(numbers), most

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the attached LoRAs, except those that are kept apart, to the device and dtype that the layers compute with.

        Otherwise this happens at the first call of each layer, as it does for layers whose output has another dtype.
        """
        self._stacks.prepare(Target(device, dtype))

    @property
    def numbers(self) -> int:
        """The most numbers on the device: each LoRA's once; of those kept apart, the largest that may stay; and the sum of several
        dense changes, if there are any."""
        apart = sorted((self.adapters[number].size for number in self._apart), reverse=True)
        together = [adapter for number, adapter in enumerate(self.adapters) if number not in self._apart]
        dense = sorted(adapter.dense_size for adapter in together)
        summed = dense[-1] if len(dense) > 1 and dense[-2] else 0
        return sum(adapter.size for adapter in together) + sum(apart[: self._most_apart]) + summed

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hook the layers that the adapters touch. On exit every hook is removed, also after an exception.

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
        self,
        mixes: Sequence[Coefficients],
        by_layer: Mapping[str, Coefficients] | None = None,
    ) -> Iterator[None]:
        """Inside this block, row i of every model call gets `mixes[i]`, one coefficient per adapter.

        If all mixes are equal, a layer may get any entries: rows repeated, regrouped, folded (frames, crops) or added. Otherwise a
        call raises `Regrouped` if the number of a layer's entries is not the number of rows.

        Args:
            by_layer: by layer name, the mix that every row with any LoRA gets there instead.

        Raises:
            ValueError: a mix does not have one coefficient per adapter.
        """
        most = len(self.adapters) + self._has_assembled
        if any(not len(self.adapters) <= len(mix) <= most for mix in mixes):
            raise ValueError(f"every mix must have {len(self.adapters)} coefficients, one per LoRA")
        mixes = [(*mix, *[0.0] * (most - len(mix))) for mix in mixes]
        before, now = self._routing, tuple(segments(mixes))
        self._make_room(now)
        # Mixes by layer differ at each step: not worth caching.
        plan: _Plan = {} if by_layer else self._plan_for(now)
        self._routing = _Routing(tuple(mixes), now, by_layer or {}, plan, len(set(mixes)) == 1)
        try:
            yield
        except BaseException:
            self._plans.clear()  # and what they keep of this call
            raise
        finally:
            self._routing = before
        if self._inputs.settle():
            self._plans.clear()

    @contextmanager
    def routed_part(self, numbers: Sequence[int]) -> Iterator[None]:
        """Inside this block, model calls have only the routed rows with these numbers, in this order."""
        routing = self._routing
        part = [routing.mixes[number] for number in numbers]
        with self.routed(part, routing.by_layer):
            yield

    def changes(self) -> Iterator[tuple[str, dict[int, tuple[Tensor, int]]]]:
        """Layer by layer, what each LoRA (by number) adds to the layer's weight: ΔW at its strength, float32, and the rank that it is
        stored with. Nothing while the bank is not attached."""
        for name, by_number in self._fitted.items():
            made = {i: _change(fitted, self.adapters[i].strength) for i, fitted in by_number.items()}
            yield name, {i: change for i, change in made.items() if change is not None}

    def products(self) -> Iterator[tuple[str, dict[int, tuple[Tensor, Tensor]]]]:
        """Layer by layer, the low-rank part of what each LoRA (by number) adds to the layer's weight, at its strength, float32:
        down (r, in, …) and up (r, out). Nothing while the bank is not attached."""
        for name, by_number in self._fitted.items():
            low_rank = {i: fitted.low_rank for i, fitted in by_number.items()}
            strengths = [adapter.strength for adapter in self.adapters]
            yield name, {i: _product(own, strengths[i]) for i, own in low_rank.items() if own is not None}

    def assemble(self, products: Mapping[str, tuple[Tensor, Tensor]], mix: Coefficients) -> None:
        """Add one LoRA until the bank is detached. The last coefficient of a mix is then its own.

        Args:
            products: its low-rank part by layer, down (r, in, …) and up (r, out). Only layers that the other LoRAs touch.
            mix: the weights of the other LoRAs' dense parts, whose sum is its dense part.
        """
        fitted = {name: dict(by_number) for name, by_number in self._fitted.items()}
        for name, by_number in fitted.items():
            product = products.get(name)
            factors = {i: mix[i] for i in by_number if mix[i]}
            dense = self._stacks.dense(name, factors, Target(torch.device("cpu"), torch.float32))
            by_number[len(self.adapters)] = Fitted(
                None if product is None else LowRank(product[0], product[1].T),
                None if dense is None else dense[0].times(dense[1]),
            )
        self._stacks = Stacks((*self.adapters, Adapter("assembled", {})), fitted, self._apart)
        self._has_assembled = True
        self._plans.clear()

    def _make_room(self, now: Sequence[Segment]) -> None:
        """Release the least recently used of the LoRAs kept apart if these segments need the room."""
        for number in sorted(self._apart):
            if any(segment.mix[number] for segment in now):
                self._resident.pop(number, None)
                self._resident[number] = None
        used = {number for number in self._resident if any(segment.mix[number] for segment in now)}
        too_many = len(self._resident) - max(self._most_apart, len(used))
        gone = [number for number in self._resident if number not in used][: max(0, too_many)]
        if gone:
            self.release(gone)

    def release(self, numbers: Iterable[int]) -> None:
        """Free the memory of these LoRAs, of those kept apart, on the model's device. They are moved there again when needed."""
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
            for name, own in adapter.fitted(layers).items():
                fitted.setdefault(name, {})[number] = own
        return fitted

    def _use(self, fitted: dict[str, dict[int, Fitted]]) -> None:
        self._fitted, self._stacks = fitted, Stacks(self.adapters, fitted, self._apart)
        self._has_assembled = False
        self._inputs = _Inputs()
        self._plans.clear()
        self._resident.clear()

    def _add(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """The forward hook of every touched layer: each row's delta, added to the layer's output in place."""
        routing = self._routing
        if not routing.segments:
            return
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not routing.one_mix and len(given) != len(routing.mixes):
            raise Regrouped(f"{name}: {len(given)} entries for {len(routing.mixes)} rows")
        # Under autocast a layer's output is in the dtype that it computed in.
        rows = given if given.dtype == output.dtype else given.to(output.dtype)
        for product in self._products(name, given, output):
            if routing.one_mix or product.stop - product.start == len(routing.mixes):
                product.apply(layer, given, rows, output)
            else:
                part = slice(product.start, product.stop)
                product.apply(layer, given, rows[part], output[part])

    def _products(self, name: str, given: Tensor, output: Tensor) -> Sequence[Product]:
        where = Target(output.device, output.dtype)
        plan = self._routing.plan
        if (name, where) not in plan:
            self._inputs.meet(name, given)
            names = self._inputs.shared.get(name, (name,))
            made = sharing({each: list(self._planned(each, where)) for each in names}, self._stacks)
            plan.update({(each, where): products for each, products in made.items()})
        return plan[name, where]

    def _planned(self, name: str, where: Target) -> Iterator[Product]:
        here = self._routing.segments
        if name in self._routing.by_layer:
            here = tuple(replace(segment, mix=self._routing.by_layer[name]) for segment in here)
        return planned(name, here, self._stacks, where)


def _change(fitted: Fitted, strength: float) -> tuple[Tensor, int] | None:
    parts: list[Tensor] = []
    rank = 0
    if fitted.low_rank is not None:
        parts.append(fitted.low_rank.dense())
        rank += fitted.low_rank.rank
    if fitted.dense is not None and fitted.dense.weight is not None:
        parts.append(fitted.dense.weight.to(torch.float32))
        rank += min(parts[-1].shape[0], parts[-1][0].numel())
    if not parts:
        return None
    return sum(parts[1:], parts[0]).flatten(1 if parts[0].ndim > 1 else 0) * strength, rank


def _product(low_rank: LowRank, strength: float) -> tuple[Tensor, Tensor]:
    factor = low_rank.scale * strength
    return low_rank.down.to(torch.float32), low_rank.up.T.to(torch.float32) * factor


def with_assembled(mix: Coefficients, replaced: Collection[int]) -> Coefficients:
    """`mix` with the assembled LoRA in place of those of these numbers; as it is where there are none."""
    if not replaced:
        return mix
    acts = any(mix[number] for number in replaced)
    return (*(0.0 if i in replaced else part for i, part in enumerate(mix)), float(acts))


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
