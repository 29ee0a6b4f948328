"""The products that a layer needs for the rows of a batch: common parts once for all rows, the rest row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from .apply import Lowering, add_dense, add_low_rank, add_lowered
from .stacks import Stack, Stacks, Target

Coefficients = tuple[float, ...]
"""How much of each adapter acts on a row; the engine's mixes are of this kind."""


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a batch, all under one mix."""

    mix: Coefficients
    start: int
    stop: int


@dataclass(frozen=True)
class LayerProduct:
    """What to add to rows `start` to `stop` of a layer: `add(layer, rows, output)` does it in place."""

    start: int
    stop: int
    add: Callable[[nn.Module, Tensor, Tensor], None]

    def apply(self, layer: nn.Module, given: Tensor, rows: Tensor, output: Tensor) -> None:
        """Add to `output`, these rows of the layer's output. rows: the same of its input, which is `given` as a whole."""
        self.add(layer, rows, output)


@dataclass(frozen=True)
class StackProduct:
    """The product of all LoRAs of a stack with rows `start` to `stop`, which have all of them, each in its own measure.

    Attributes:
        factors: by row and rank, (rows, R).
        lowering: `factors` ∘ (down · rows), alone or with that of other layers; `ranks` are this layer's in it.
    """

    start: int
    stop: int
    stack: Stack
    factors: Tensor
    lowering: Lowering
    ranks: slice

    def apply(self, layer: nn.Module, given: Tensor, rows: Tensor, output: Tensor) -> None:
        lowered = self.lowering.of(layer, given, rows)[..., self.ranks]
        add_lowered(layer, lowered, output, self.stack.up)


Product = LayerProduct | StackProduct


def sharing(plans: Mapping[str, Sequence[Product]], stacks: Stacks) -> Mapping[str, Sequence[Product]]:
    """The products of layers that get the same input, by layer, with one lowering for all of them where all have the same rows."""
    alone = {name: plan[0] for name, plan in plans.items() if len(plan) == 1}
    products = {name: product for name, product in alone.items() if isinstance(product, StackProduct)}
    rows = {(each.start, each.stop) for each in products.values()}
    if len(plans) == 1 or len(products) < len(plans) or len(rows) > 1:
        return plans
    joined = stacks.joined({name: product.stack for name, product in products.items()})
    if joined is None:
        return plans
    down, own = joined
    lowering = Lowering(down, torch.cat([each.factors for each in products.values()], dim=1), len(products))
    shared: dict[str, Sequence[Product]] = {}
    stop = 0
    for name, product in products.items():
        start, stop = stop, stop + product.factors.shape[1]
        shared[name] = [replace(product, stack=own[name], lowering=lowering, ranks=slice(start, stop))]
    return shared


@dataclass(frozen=True)
class _Part:
    """LoRAs, each with its factor, that act on some rows of one layer."""

    start: int
    stop: int
    factors: dict[int, float]


def segments(mixes: Sequence[Coefficients]) -> Iterator[Segment]:
    """Runs of rows with one mix; rows of the base alone (all zeros) need nothing and have no segment."""
    start = 0
    for mix, run in groupby(mixes):
        stop = start + len(list(run))
        if any(mix):
            yield Segment(mix, start, stop)
        start = stop


def planned(name: str, of: Sequence[Segment], stacks: Stacks, where: Target) -> Iterator[Product]:
    """The products of one layer for these segments."""
    parts = [_Part(each.start, each.stop, stacks.factors(name, each.mix)) for each in of]
    for block in _adjacent([part for part in parts if part.factors]):
        common = _common(block)
        stack = _stack_of_all(name, block, common, stacks, where)
        if stack is not None:
            yield _by_row(block, stack, stacks, where)
            continue
        if common:
            yield from _products(name, [_Part(block[0].start, block[-1].stop, common)], stacks, where)
        yield from _products(name, [_without(part, common) for part in block], stacks, where)


def _stack_of_all(
    name: str, block: Sequence[_Part], common: Mapping[int, float], stacks: Stacks, where: Target
) -> Stack | None:
    """The stack that one product for all of these rows needs; None where several products are fewer sums.

    That is the case if the rows have all of a stack's LoRAs in common, at any factor: then the other parts of single rows cost
    nothing.
    """
    if len(block) < 2 or any(part.factors.keys() != common.keys() for part in block):
        return None
    found = [stacks.low_rank(name, number, where) for number in common]
    first = found[0]
    if first is None or any(each is not first for each in found) or len(first.ranks) != len(common):
        return None
    return None if stacks.has_dense(name, common) else first


def _by_row(block: Sequence[_Part], stack: Stack, stacks: Stacks, where: Target) -> StackProduct:
    ordered = sorted(stack.ranks, key=lambda number: stack.ranks[number])
    ranks = tuple(stack.ranks[number][1] - stack.ranks[number][0] for number in ordered)
    rows = tuple(
        tuple(part.factors[number] for number in ordered)
        for part in block
        for _ in range(part.start, part.stop)
    )
    factors = stacks.factors_by_row(rows, ranks, where)
    lowering = Lowering(stack.down, factors)
    return StackProduct(block[0].start, block[-1].stop, stack, factors, lowering, slice(None))


def _adjacent(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Parts whose rows touch."""
    block: list[_Part] = []
    for part in parts:
        if block and block[-1].stop != part.start:
            yield block
            block = []
        block.append(part)
    if block:
        yield block


def _common(block: Sequence[_Part]) -> dict[int, float]:
    """Of each LoRA as much as all of the parts have."""
    shared: dict[int, float] = {}
    for number, first in block[0].factors.items():
        each = [part.factors.get(number, 0.0) for part in block]
        least = min(each) if first > 0 else max(each)
        if least * first > 0:
            shared[number] = least
    return shared


def _without(part: _Part, common: dict[int, float]) -> _Part:
    left = {number: factor - common.get(number, 0.0) for number, factor in part.factors.items()}
    return _Part(part.start, part.stop, {number: factor for number, factor in left.items() if factor})


def _products(name: str, parts: Sequence[_Part], stacks: Stacks, where: Target) -> Iterator[Product]:
    """Low-rank products, those of neighbouring parts with one LoRA each in one batched product; dense changes part by part."""
    run: list[tuple[_Part, int, Stack]] = []
    for part in parts:
        by_stack: dict[int, tuple[Stack, dict[int, float]]] = {}
        for number, factor in part.factors.items():
            stack = stacks.low_rank(name, number, where)
            if stack is not None:
                by_stack.setdefault(id(stack), (stack, {}))[1][number] = factor
        alone = len(by_stack) == 1 and len(part.factors) == 1
        if alone:
            (number,) = part.factors
            (stack, _), *_ = by_stack.values()
            if run and not _continues(run[-1], part, number, stack):
                yield _batched(run)
                run = []
            run.append((part, number, stack))
        else:
            for stack, factors in by_stack.values():
                yield from _together(part, stack, factors)
        change = stacks.dense(name, part.factors, where)
        if change is not None:
            yield LayerProduct(part.start, part.stop, partial(add_dense, delta=change[0], factor=change[1]))
    if run:
        yield _batched(run)


def _continues(last: tuple[_Part, int, Stack], part: _Part, number: int, stack: Stack) -> bool:
    """Whether this part's rows, and its LoRA in the stack, stand right behind the last one's and are as many."""
    before, other, same = last
    if stack is not same or before.stop != part.start or before.stop - before.start != part.stop - part.start:
        return False
    (start, end), (next_start, next_end) = stack.ranks[other], stack.ranks[number]
    return end == next_start and end - start == next_end - next_start


def _batched(run: Sequence[tuple[_Part, int, Stack]]) -> LayerProduct:
    first, _, stack = run[0]
    rank = slice(stack.ranks[run[0][1]][0], stack.ranks[run[-1][1]][1])
    factors = [part.factors[number] for part, number, _ in run]
    down = stack.down[rank].view(len(run), -1, *stack.down.shape[1:])
    up = stack.up[rank].view(len(run), -1, stack.up.shape[1])
    return LayerProduct(
        first.start,
        run[-1][0].stop,
        partial(
            add_low_rank, down=down, up=up, factor=_factor(factors, [down.shape[1]] * len(run), down, True)
        ),
    )


def _together(part: _Part, stack: Stack, factors: dict[int, float]) -> Iterator[LayerProduct]:
    """All these LoRAs of one stack on the same rows, those that stand together in one product."""
    ordered = sorted(factors, key=lambda number: stack.ranks[number])
    groups: list[list[int]] = []
    for number in ordered:
        if groups and stack.ranks[groups[-1][-1]][1] == stack.ranks[number][0]:
            groups[-1].append(number)
        else:
            groups.append([number])
    for group in groups:
        rank = slice(stack.ranks[group[0]][0], stack.ranks[group[-1]][1])
        ranks = [stack.ranks[number][1] - stack.ranks[number][0] for number in group]
        down, up = stack.down[rank].unsqueeze(0), stack.up[rank].unsqueeze(0)
        factor = _factor([factors[number] for number in group], ranks, down, False)
        yield LayerProduct(part.start, part.stop, partial(add_low_rank, down=down, up=up, factor=factor))


def _factor(factors: Sequence[float], ranks: Sequence[int], like: Tensor, by_group: bool) -> float | Tensor:
    """One number where all are alike; else (G, 1) by group, or (1, R) by rank."""
    if len(set(factors)) == 1:
        return factors[0]
    # Filled on the device: a tensor of numbers of ours would have to be copied there.
    parts = [
        torch.full((1 if by_group else rank,), factor, device=like.device, dtype=like.dtype)
        for factor, rank in zip(factors, ranks, strict=True)
    ]
    return torch.cat(parts).view(-1, 1) if by_group else torch.cat(parts).view(1, -1)
