"""The LoRAs' deltas on the device that computes with them, each made once and shared by all mixes.

Letters in shapes: r the rank of a LoRA in a layer, R the sum of several LoRAs' ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .delta import Adapter, Dense, Fitted

FittedByLayer = Mapping[str, Mapping[int, Fitted]]
"""Per layer name, what each adapter (by number) that touches it does there."""

Factors = tuple[tuple[int, float], ...]
"""Some adapters by number, each with a factor."""


class Target(NamedTuple):
    """What a layer's output is like."""

    device: torch.device
    dtype: torch.dtype


class Stack(NamedTuple):
    """The low-rank changes of some LoRAs in one layer, one after another, at their strengths.

    Attributes:
        down: (R, in, …). up: (R, out).
        ranks: by LoRA, where in R it begins and ends.
        joined: what `down` is a part of, if it is joined with other layers' (`Stacks.joined`).
    """

    down: Tensor
    up: Tensor
    ranks: Mapping[int, tuple[int, int]]
    joined: Tensor | None = None


class Stacks:
    """The tensors of each LoRA for each layer, made at first use.

    Attributes:
        apart: numbers of the LoRAs that are kept separately, so that single ones can be released.
    """

    def __init__(self, adapters: Sequence[Adapter], fitted: FittedByLayer, apart: Iterable[int] = ()) -> None:
        self._strengths = [adapter.strength for adapter in adapters]
        self._fitted = fitted
        self.apart = frozenset(apart)
        self._low_rank: dict[tuple[str, tuple[int, ...]], tuple[Target, Stack]] = {}
        self._dense: dict[tuple[str, Target, Factors], Dense] = {}
        self._factors_by_row: dict[tuple[Any, ...], Tensor] = {}

    def prepare(self, where: Target) -> None:
        """Make the tensors of all LoRAs except those that are kept apart."""
        for name, by_number in self._fitted.items():
            for number in by_number:
                if number not in self.apart:
                    self.low_rank(name, number, where)
                    self.dense(name, {number: 1.0}, where)

    def drop(self, numbers: Iterable[int]) -> None:
        """Free the tensors of these LoRAs, which are kept apart. They are made again at the next use."""
        gone = set(numbers)
        for key in [key for key in self._low_rank if gone & set(key[1])]:
            del self._low_rank[key]
        for dense in [key for key in self._dense if gone & dict(key[2]).keys()]:
            del self._dense[dense]

    def drop_sums(self) -> None:
        """Free the dense sums of several LoRAs, and what rows are multiplied by."""
        self._factors_by_row.clear()
        for key in [key for key in self._dense if len(key[2]) > 1]:
            del self._dense[key]

    @property
    def sums(self) -> int:
        """How many dense sums of several LoRAs the layer with the most of them has."""
        counts: dict[str, int] = {}
        for name, _, factors in self._dense:
            if len(factors) > 1:
                counts[name] = counts.get(name, 0) + 1
        return max(counts.values(), default=0)

    def factors(self, name: str, mix: Sequence[float]) -> dict[int, float]:
        """By LoRA that this mix has and that touches this layer, its part in the mix."""
        return {
            number: mix[number] for number in self._fitted[name] if mix[number] and self._strengths[number]
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def low_rank(self, name: str, number: int, where: Target) -> Stack | None:
        """The stack of one layer in which a LoRA is, maybe among others; None where it has no low-rank change there."""
        own = self._fitted[name][number].low_rank
        if own is None or not self._strengths[number]:
            return None
        together = (number,) if number in self.apart else self._together(name)
        known = self._low_rank.get((name, together))
        if known is None or known[0] != where:
            # What was made for another dtype is not needed any more.
            known = self._low_rank[name, together] = (where, self._stack(name, together, where))
        return known[1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def joined(self, stacks: Mapping[str, Stack]) -> tuple[Tensor, Mapping[str, Stack]] | None:
        """The `down` of several layers' stacks in one tensor, and the stacks, by layer, whose `down` are parts of it.

        None for stacks that do not have all of a layer's LoRAs, for inputs of different size, and for convolutions.
        """
        keys = {name: (name, self._together(name)) for name in stacks}
        if any(
            self._low_rank.get(keys[name], (None, None))[1] is not stack for name, stack in stacks.items()
        ):
            return None
        first, *others = stacks.values()
        if first.down.ndim > 2 or any(stack.down.shape[1:] != first.down.shape[1:] for stack in others):
            return None
        if first.joined is not None and all(stack.joined is first.joined for stack in others):
            return first.joined, stacks
        whole = torch.cat([stack.down for stack in stacks.values()])
        joined, stop = {}, 0
        for name, stack in stacks.items():
            start, stop = stop, stop + len(stack.down)
            joined[name] = stack._replace(down=whole[start:stop], joined=whole)
            self._low_rank[keys[name]] = (self._low_rank[keys[name]][0], joined[name])
        return whole, joined

    @torch.inference_mode(False)
    @torch.no_grad()
    def factors_by_row(
        self, rows: tuple[tuple[float, ...], ...], ranks: tuple[int, ...], where: Target
    ) -> Tensor:
        """Each row's factors of some LoRAs, for each of their ranks: (rows, R). One tensor for all layers with these ranks."""
        key = (rows, ranks, where)
        if key not in self._factors_by_row:
            # Filled on the device: a tensor of numbers of ours would have to be copied there.
            parts = [
                torch.full((rank,), factor, device=where.device, dtype=where.dtype)
                for row in rows
                for factor, rank in zip(row, ranks, strict=True)
            ]
            self._factors_by_row[key] = torch.cat(parts).view(len(rows), -1)
        return self._factors_by_row[key]

    def has_dense(self, name: str, numbers: Iterable[int]) -> bool:
        """Whether any of these LoRAs changes this layer densely."""
        return any(self._fitted[name][number].dense is not None for number in numbers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense(self, name: str, factors: Mapping[int, float], where: Target) -> tuple[Dense, float] | None:
        """The dense change of one layer by these LoRAs, and the factor that it still needs; None where there is none."""
        active: Factors = tuple(
            (number, factor * self._strengths[number])
            for number, factor in factors.items()
            if self._fitted[name][number].dense is not None
        )
        if not active:
            return None
        factor = 1.0
        if len(active) == 1:  # one LoRA's own change serves all mixes, whatever its factor there
            factor = active[0][1]
            active = ((active[0][0], 1.0),)
        key = (name, where, active)
        if key not in self._dense:
            self._dense[key] = self._sum(name, active, where)
        return self._dense[key], factor

    def _together(self, name: str) -> tuple[int, ...]:
        return tuple(
            number
            for number, fitted in self._fitted[name].items()
            if number not in self.apart and fitted.low_rank is not None and self._strengths[number]
        )

    def _stack(self, name: str, numbers: Sequence[int], where: Target) -> Stack:
        downs, ups = [], []
        ranks: dict[int, tuple[int, int]] = {}
        start = 0
        for number in numbers:
            own = self._fitted[name][number].low_rank
            assert own is not None
            scale = own.scale * self._strengths[number]
            # Half of the scale to each side: a small alpha alone would push float16 numbers below its normal range.
            root = math.sqrt(abs(scale))
            downs.append((own.down.to(where.device, torch.float32) * root).to(where.dtype))
            ups.append(
                (own.up.T.to(where.device, torch.float32) * math.copysign(root, scale)).to(where.dtype)
            )
            ranks[number] = (start, start + own.rank)
            start += own.rank
        return Stack(torch.cat(downs), torch.cat(ups), ranks)

    def _sum(self, name: str, active: Factors, where: Target) -> Dense:
        changes = [(self._fitted[name][number].dense or Dense(), factor) for number, factor in active]
        return Dense(
            _weighted_sum([(change.weight, factor) for change, factor in changes], where),
            _weighted_sum([(change.bias, factor) for change, factor in changes], where),
        )


def _weighted_sum(parts: Sequence[tuple[Tensor | None, float]], where: Target) -> Tensor | None:
    present = [(part, factor) for part, factor in parts if part is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][1] == 1:
        return present[0][0].to(where.device, where.dtype)
    total = torch.zeros_like(present[0][0], device=where.device, dtype=torch.float32)
    for part, factor in present:
        total.add_(part.to(where.device, torch.float32), alpha=factor)
    return total.to(where.dtype)
