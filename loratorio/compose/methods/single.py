"""Methods that ask the model under a single mix a step: as cheap as a plain step."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import Branch, Composition, Method, Mix, Predictions, Situation, both


class OneMix(Method):
    """A method that asks the model under a single mix and takes its word."""

    @abstractmethod
    def mix(self, now: Situation) -> Mix:
        """The mix of this step."""

    def branches(self, now: Situation) -> list[Branch]:
        return both([self.mix(now)], now)

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        mix = self.mix(now)
        uncond = predictions.uncond(mix).to(torch.float32) if now.has_uncond else None
        return Composition(predictions.cond(mix).to(torch.float32), uncond)


class Merge(OneMix):
    """W + Σᵢ sᵢ·ΔWᵢ: what the WebUIs do without this extension."""

    name = "merge"

    def mix(self, now: Situation) -> Mix:
        return now.cast.merged


class Chosen(OneMix):
    """Merge for the steps that are not composed: the LoRAs that the prompt names, without a pool's candidates."""

    name = "chosen"

    def mix(self, now: Situation) -> Mix:
        return now.cast.chosen


class Switch(OneMix):
    """LoRA-Switch: one LoRA at a time, the next one every five steps.

    Taken from the paper: the rule and its interval for ordinary pictures (τ = 5). Left open there: what unconditional
    score goes with it; here the same LoRA's.
    """

    name = "switch"
    steps_per_lora = 5

    def mix(self, now: Situation) -> Mix:
        return now.cast.solos[now.index // self.steps_per_lora % len(now.cast.solos)]
