"""Means of every LoRA's prediction: Composite, and W-Composite, which weighs them by the prompt."""

from __future__ import annotations

from .base import Branch, Composition, Method, Predictions, Situation, both, weighted_sum


class Composite(Method):
    """LoRA-Composite: the mean of every LoRA's guided prediction."""

    name = "composite"

    def branches(self, now: Situation) -> list[Branch]:
        return both(now.cast.solos, now)

    def shares(self, now: Situation) -> list[float]:
        """The weight of each solo; they sum to 1."""
        return [1 / len(now.cast.solos)] * len(now.cast.solos)

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        solos, shares = now.cast.solos, self.shares(now)
        # Guidance is linear, so the weighted mean of the guided scores is the guided weighted mean.
        cond = weighted_sum([predictions.cond(mix) for mix in solos], shares)
        if not now.has_uncond:
            return Composition(cond, None)
        return Composition(cond, weighted_sum([predictions.uncond(mix) for mix in solos], shares))


class WComposite(Composite):
    """W-Composite: Composite, with each LoRA weighted by how much its trigger words matter in the prompt.

    Taken from the paper: the weighted mean, and that the weight comes from the prompt's text alone, before sampling
    (`Cast.importance`, made by `loratorio.compose.importance`). Left open, as no code was released when this was written:
    which distance between texts; here the cosine distance between the prompt's conditioning with and without the trigger words.
    A LoRA whose trigger words nobody knows counts as an average one, so that without any this is Composite.
    """

    name = "w_composite"

    def shares(self, now: Situation) -> list[float]:
        importance = [max(0.0, each) for each in now.cast.importance]
        total = sum(importance)
        return [each / total for each in importance] if total > 0 else super().shares(now)
