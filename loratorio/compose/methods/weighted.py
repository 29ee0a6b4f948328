"""What the methods that weigh LoRAs against the base have in common: the rows, and the re-centred unconditional score."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ..guidance import anchor
from ..lazy_torch import torch
from ..mixes import Branch
from .base import Composition, Method, Predictions, StepContext

if TYPE_CHECKING:
    from torch import Tensor


def rows(now: StepContext) -> list[Branch]:
    """Rows of the base and of the LoRAs, without those whose weight or factor is known to be 1 or 0 beforehand."""
    participants, strength = now.participants, now.knobs["recentre"]
    singles, base = participants.singles, participants.base
    # With one LoRA its weight is 1 whatever the base says, so the base's conditional rows are not run.
    branches = [Branch(participants.compared, True)] if len(singles) > 1 else []
    branches += [Branch(mix, True) for mix in singles]
    if now.has_uncond:
        branches += [Branch(base, False)] if strength > 0 else []
        branches += [Branch(mix, False) for mix in singles] if strength < 1 else []
    # LoRAs that share all of themselves are all one mix.
    return list(dict.fromkeys(branches))


class Weighted(Method):
    """ẽ is a weighted sum of the LoRAs' predictions, by weights measured on the conditional branch against the base."""

    def branches(self, now: StepContext) -> list[Branch]:
        return rows(now)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        singles, strength = now.participants.singles, now.knobs["recentre"]
        weights = self.weights(now, predictions)
        cond = self.combine(torch.stack([predictions.cond(mix) for mix in singles]), weights)
        shown = self.shown(weights)
        if not now.has_uncond:
            return Composition(cond, None, shown)
        composed: Tensor | None = None
        if strength < 1:
            unconds = torch.stack([predictions.uncond(mix) for mix in singles])
            composed = self.combine(unconds, predictions.per_image(weights, unconds.shape[1]))
        # At λ = 0 the base was not asked; its term is multiplied by 0.
        base = predictions.uncond(now.participants.base) if strength > 0 else None
        if base is None:
            assert composed is not None
            return Composition(cond, composed, shown)
        return Composition(cond, anchor(base, composed, strength), shown)

    @abstractmethod
    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        """Weights of the conditional rows, (N, Bc, …) float32, summing to 1 over N."""

    @abstractmethod
    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of (N, B, C, H, W) by the weights of the same rows, (B, C, H, W) float32."""

    def shown(self, weights: Tensor) -> Tensor | None:
        """Ω↑ for the weight maps, (N, Bc, H, W), where the weights are of that kind."""
        return None


def stacked_noise(now: StepContext, predictions: Predictions) -> Tensor:
    """Each single's conditional noise, (N, Bc, C, H, W)."""
    return torch.stack([predictions.noise_by_mix[mix] for mix in now.participants.singles])
