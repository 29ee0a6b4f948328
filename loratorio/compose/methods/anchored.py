"""Merge and Composite with LoRAtorio's re-centred unconditional score, to tell what re-centring alone is worth."""

from __future__ import annotations

from ..guidance import anchor
from .base import Branch, Composition, Method, Predictions, Situation
from .composite import Composite
from .single import Merge


class Anchored(Method):
    """A method whose unconditional score is drawn towards the base model's: λ·e₀(∅) + (1−λ)·ẽ(∅)."""

    inner: Method

    def branches(self, now: Situation) -> list[Branch]:
        strength = now.tuning.recentre
        inner = [branch for branch in self.inner.branches(now) if branch.cond or strength < 1]
        base = [Branch(now.cast.base, False)] if now.has_uncond and strength > 0 else []
        return base + inner

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        strength = now.tuning.recentre
        if not now.has_uncond or strength == 0:
            return self.inner.compose(now, predictions)
        base = predictions.uncond(now.cast.base)
        if strength == 1:
            without = Situation(now.cast, now.tuning, now.index, now.total, has_uncond=False)
            return Composition(self.inner.compose(without, predictions).cond, anchor(base, None, strength))
        composed = self.inner.compose(now, predictions)
        return Composition(composed.cond, anchor(base, composed.uncond, strength))


class AnchoredMerge(Anchored):
    """Merge, guided away from the base's unconditional score: one row a picture more than Merge."""

    name = "merge_anchored"
    inner = Merge()


class AnchoredComposite(Anchored):
    """Composite, guided away from the base's unconditional score."""

    name = "composite_anchored"
    inner = Composite()
