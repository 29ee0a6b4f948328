"""Other methods with LoRAtorio's re-centred unconditional score, to tell what re-centring alone is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ..guidance import anchor
from ..mixes import Branch
from .base import Composition, Method, Predictions, StepContext


class Recentred(Method):
    """A method whose unconditional score is drawn towards the base model's: λ·e₀(∅) + (1−λ)·ẽ(∅)."""

    inner: Method
    knobs: ClassVar[tuple[str, ...]] = ("recentre",)

    def branches(self, now: StepContext) -> list[Branch]:
        strength = now.knobs["recentre"]
        inner = [branch for branch in self.inner.branches(now) if branch.cond or strength < 1]
        base = [Branch(now.participants.base, False)] if now.has_uncond and strength > 0 else []
        return base + inner

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        strength = now.knobs["recentre"]
        if not now.has_uncond or strength == 0:
            return self.inner.compose(now, predictions)
        base = predictions.uncond(now.participants.base)
        if strength == 1:
            cond = self.inner.compose(replace(now, has_uncond=False), predictions).cond
            return Composition(cond, anchor(base, None, strength))
        composed = self.inner.compose(now, predictions)
        return Composition(composed.cond, anchor(base, composed.uncond, strength))
