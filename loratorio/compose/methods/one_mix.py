"""What the methods have in common that ask the model under a single mix a step: as cheap as a plain step."""

from __future__ import annotations

from ..lazy_torch import torch
from ..mixes import Branch, Mix
from .base import Composition, Method, Predictions, StepContext, both


class OneMix(Method):
    """A method that asks the model under a single mix and takes its prediction."""

    def mix(self, now: StepContext) -> Mix:
        """The mix of this step: all LoRAs at once, unless a method says otherwise."""
        return now.participants.merged

    def branches(self, now: StepContext) -> list[Branch]:
        return both([self.mix(now)], now)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        mix = self.mix(now)
        uncond = predictions.uncond(mix).to(torch.float32) if now.has_uncond else None
        return Composition(predictions.cond(mix).to(torch.float32), uncond)
