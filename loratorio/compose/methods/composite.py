"""LoRA-Composite (arXiv 2402.16843)."""

from __future__ import annotations

from ..mixes import Branch
from .base import Composition, Entry, Method, Predictions, StepContext, both, weighted_sum


class Composite(Method):
    """LoRA-Composite: the mean of every LoRA's guided prediction."""

    entry = Entry("composite", "Composite", "arXiv 2402.16843")

    def branches(self, now: StepContext) -> list[Branch]:
        return both(now.participants.singles, now)

    def shares(self, now: StepContext) -> list[float]:
        """The weight of each single; they sum to 1."""
        return [1 / len(now.participants.singles)] * len(now.participants.singles)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        singles, shares = now.participants.singles, self.shares(now)
        # Guidance is linear, so the weighted mean of the guided scores is the guided weighted mean.
        cond = weighted_sum([predictions.cond(mix) for mix in singles], shares)
        if not now.has_uncond:
            return Composition(cond, None)
        return Composition(cond, weighted_sum([predictions.uncond(mix) for mix in singles], shares))


METHOD = Composite()
