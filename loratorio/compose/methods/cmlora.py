"""CMLoRA: one LoRA dominates, the others' part comes from a cache for some steps (arXiv 2502.04923)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..mixes import Branch, Mix, Participants
from .base import Composition, Entry, Method, Predictions, StepContext, Weights, both

if TYPE_CHECKING:
    from torch import Tensor


class CMLoRA(Method):
    """Cached Multi-LoRA.

    Taken from the paper and its code (Yqcca/CMLoRA): a dominant LoRA with a larger weight, starting at N − 0.5 times the others' and
    falling by halves towards theirs; the turns are ordered by high-frequency energy, most first; all LoRAs are run at refreshes,
    every 2 steps at the beginning and the end (first 3/8, last 1/8) and every 3 in between, when dominance moves on.
    Different: the paper caches features inside the UNet, which no host but its own fork offers. Here the other LoRAs' difference
    from the dominant one is cached, so a step between refreshes costs a plain step.
    Left open: what ranks the LoRAs where nobody profiled them beforehand (here the share of energy above half the highest
    frequency in their first predictions), and a weight below the others' where the code's schedule ends (here it stops at theirs).
    """

    entry = Entry(
        "cmlora",
        "CMLoRA",
        "arXiv 2502.04923",
        "One LoRA after the other, first those that change high frequencies. The others' latest predictions are added.",
    )

    def begin(self, participants: Participants, weights: Weights) -> Method:
        return _Cached()

    def branches(self, now: StepContext) -> list[Branch]:
        return both(now.participants.mixes, now)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        return _Cached().compose(now, predictions)


class _Cached(CMLoRA):
    """One generation's turns and cache."""

    def __init__(self) -> None:
        self._order: list[int] = []
        self._refreshes = 0
        self._refreshed_at = -1
        self._others: dict[bool, Tensor] = {}  # by cond: Σ over the others of (theirs − the dominant's)

    def branches(self, now: StepContext) -> list[Branch]:
        if self._refreshes_at(now):
            return both(now.participants.mixes, now)
        return both([self._dominant(now)], now)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        if self._refreshes_at(now):
            self._refresh(now, predictions)
        dominant = self._dominant(now)
        count = len(now.participants.mixes)
        # Weights: dominance d against 1 for each of the others, over their sum. As Σ w = 1, the mean is
        # the dominant's prediction plus the others' differences from it.
        share = 1 / (dominance(count, self._refreshes - 1) + count - 1)

        def composed(cond: bool) -> Tensor:
            own = predictions.by_branch[Branch(dominant, cond)].to(torch.float32)
            return own + share * self._others[cond]

        return Composition(composed(True), composed(False) if now.has_uncond else None)

    def _refreshes_at(self, now: StepContext) -> bool:
        # A sampler may evaluate a step twice, or the cache may not fit what is asked now.
        stale = not self._others or (now.has_uncond and False not in self._others)
        return stale or (now.index != self._refreshed_at and now.index in refresh_steps(now.total))

    def _dominant(self, now: StepContext) -> Mix:
        return now.participants.mixes[self._order[(self._refreshes - 1) % len(self._order)]]

    def _refresh(self, now: StepContext, predictions: Predictions) -> None:
        mixes = now.participants.mixes
        if not self._order:
            energies = [high_frequency_share(predictions.noise(mix)) for mix in mixes]
            self._order = sorted(range(len(mixes)), key=lambda i: -energies[i])
        self._refreshes += 1
        self._refreshed_at = now.index
        dominant = self._dominant(now)
        self._others = {}
        for cond in (True, False) if now.has_uncond else (True,):
            each = [predictions.by_branch[Branch(mix, cond)] for mix in mixes]
            own = predictions.by_branch[Branch(dominant, cond)].to(torch.float32)
            total = torch.zeros_like(own)
            for prediction in each:
                total += prediction.to(torch.float32)
            self._others[cond] = total - len(each) * own


def dominance(count: int, turn: int) -> float:
    """How many times a non-dominant LoRA's weight the dominant one of `count` has at turn 0, 1, …; never less than once."""
    return max(1.0, count - 0.5 - sum(0.5**k for k in range(1, turn + 1)))


def refresh_steps(total: int) -> set[int]:
    """The steps, of `total`, at which all LoRAs are run."""
    early, late = int(0.375 * total), int(0.875 * total)
    return {*range(0, early, 2), *range(early, late, 3), *range(late, total, 2)}


def high_frequency_share(noise: Tensor) -> float:
    """Share of the energy of (B, C, H, W) that lies above half the highest frequency of either axis."""
    spectrum = torch.fft.fft2(noise.to(torch.float32)).abs().square()
    rows = torch.fft.fftfreq(noise.shape[-2], device=noise.device).abs()
    columns = torch.fft.fftfreq(noise.shape[-1], device=noise.device).abs()
    high = torch.maximum(rows[:, None], columns[None, :]) > 0.25
    total = float(spectrum.sum())
    return float((spectrum * high).sum()) / total if total > 0 else 0.0


CMLORA = CMLoRA()
