"""The LoRAs' deltas in the form the device computes with: strengths multiplied in, stacked over mixes, each made once.

Letters in shapes: G mixes, r the highest rank among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .delta import Adapter, Dense, Fitted

Coefficients = tuple[float, ...]
"""How much of each adapter acts on a row; the engine's mixes are of this kind."""
FittedByLayer = Mapping[str, Mapping[int, Fitted]]
"""Per layer name, what each adapter (by number) that touches it does there."""

Stack = tuple[Tensor, Tensor]
"""Low-rank changes of G mixes: down (G, r, in, …) and up (G, r, out), ranks padded with zeros."""

_Key = tuple[str, torch.device, torch.dtype]


class Stacks:
    """What layers need under any mixes, made when first asked for. `like` gives device and dtype, those of an output."""

    def __init__(self, adapters: Sequence[Adapter], fitted: FittedByLayer) -> None:
        self._strengths = [adapter.strength for adapter in adapters]
        self._fitted = fitted
        self._low_rank: dict[_Key, dict[tuple[Coefficients, ...], Stack | None]] = {}
        self._dense: dict[_Key, dict[tuple[tuple[int, float], ...], Dense]] = {}

    @property
    def most(self) -> int:
        """How many stacks, or dense changes, the layer with the most of them has."""
        return max(
            (len(known) for made in (self._low_rank, self._dense) for known in made.values()), default=0
        )

    def clear(self) -> None:
        """Free what was made; it is made again when asked for."""
        self._low_rank.clear()
        self._dense.clear()

    def touches(self, name: str, mix: Coefficients) -> bool:
        """Whether this mix changes this layer at all."""
        return any(True for _ in self._active(name, mix))

    @torch.inference_mode(False)
    @torch.no_grad()
    def low_rank(self, name: str, mixes: tuple[Coefficients, ...], like: Tensor) -> Stack | None:
        """The stack of these mixes in one layer; None where none of them has a low-rank change there."""
        known = self._low_rank.setdefault((name, like.device, like.dtype), {})
        for others, stack in known.items():
            # When memory is short a step's rows are run in parts: their stacks are slices of the whole one.
            start = _position(mixes, others)
            if start is not None:
                part = slice(start, start + len(mixes))
                return None if stack is None else (stack[0][part], stack[1][part])
        known[mixes] = self._stack(name, mixes, like)
        return known[mixes]

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense(self, name: str, mix: Coefficients, like: Tensor) -> tuple[Dense, float] | None:
        """A mix's dense change of one layer, and the factor that it still needs; None where it has none."""
        active = tuple((number, factor) for number, factor, own in self._active(name, mix) if own.dense)
        if not active:
            return None
        factor = 1.0
        if len(active) == 1:  # one LoRA's own change serves all mixes, whatever its factor there
            factor = active[0][1]
            active = ((active[0][0], 1.0),)
        known = self._dense.setdefault((name, like.device, like.dtype), {})
        if active not in known:
            known[active] = self._sum(name, active, like)
        return known[active], factor

    def _active(self, name: str, mix: Coefficients) -> Iterator[tuple[int, float, Fitted]]:
        for number, fitted in self._fitted[name].items():
            factor = mix[number] * self._strengths[number]
            if factor:
                yield number, factor, fitted

    def _stack(self, name: str, mixes: tuple[Coefficients, ...], like: Tensor) -> Stack | None:
        factors = [self._factors(name, mix, like.device) for mix in mixes]
        present = [pair for pair in factors if pair is not None]
        if not present:
            return None
        rank = max(len(down) for down, _ in present)
        down_stack = like.new_zeros((len(mixes), rank, *present[0][0].shape[1:]))
        up_stack = like.new_zeros((len(mixes), rank, present[0][1].shape[1]))
        for place, pair in enumerate(factors):
            if pair is not None:
                down_stack[place, : len(pair[0])], up_stack[place, : len(pair[0])] = pair
        return down_stack, up_stack

    def _factors(self, name: str, mix: Coefficients, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """One mix's down (r, in, …) and up (r, out) in float32, the ranks of its LoRAs one after another."""
        downs, ups = [], []
        for _, factor, fitted in self._active(name, mix):
            if fitted.low_rank is not None:
                scale = fitted.low_rank.scale * factor
                # Half of the scale to each side: a small alpha alone would push float16 numbers below its normal range.
                root = math.sqrt(abs(scale))
                downs.append(fitted.low_rank.down.to(device, torch.float32) * root)
                ups.append(fitted.low_rank.up.T.to(device, torch.float32) * math.copysign(root, scale))
        return (torch.cat(downs), torch.cat(ups)) if downs else None

    def _sum(self, name: str, active: tuple[tuple[int, float], ...], like: Tensor) -> Dense:
        changes = [(self._fitted[name][number].dense or Dense(), factor) for number, factor in active]
        return Dense(
            _weighted_sum([(change.weight, factor) for change, factor in changes], like),
            _weighted_sum([(change.bias, factor) for change, factor in changes], like),
        )


def _weighted_sum(parts: Sequence[tuple[Tensor | None, float]], like: Tensor) -> Tensor | None:
    present = [(part, factor) for part, factor in parts if part is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][1] == 1:
        return present[0][0].to(like.device, like.dtype)
    total = torch.zeros_like(present[0][0], device=like.device, dtype=torch.float32)
    for part, factor in present:
        total.add_(part.to(like.device, torch.float32), alpha=factor)
    return total.to(like.dtype)


def _position(part: tuple[Coefficients, ...], whole: tuple[Coefficients, ...]) -> int | None:
    """Where `part` stands in `whole`, in one piece."""
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), None)
