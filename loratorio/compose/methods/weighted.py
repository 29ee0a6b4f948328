"""What the methods that weigh LoRAs have in common: the rows, the re-centred unconditional score, and what is added in places."""

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
    compared = len(singles) > 1 or now.has_gap
    branches = [Branch(participants.compared, True)] if compared else []
    branches += [Branch(mix, True) for mix in singles]
    if now.has_uncond:
        branches += [Branch(base, False)] if strength > 0 else []
        branches += [Branch(mix, False) for mix in singles] if strength < 1 else []
        branches += [Branch(participants.compared, False)] if strength < 1 and now.has_gap else []
    branches += addition_rows(now, strength)
    # LoRAs that share all of themselves are all one mix.
    return list(dict.fromkeys(branches))


class Weighted(Method):
    """ẽ is a weighted sum of the LoRAs' predictions, by weights measured on the conditional branch against the base."""

    def branches(self, now: StepContext) -> list[Branch]:
        return rows(now)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        singles, strength = now.participants.singles, now.knobs["recentre"]
        weights = self.weights(now, predictions)
        compared = now.participants.compared
        cond = self.combine(torch.stack([predictions.cond(mix) for mix in singles]), weights)
        if now.has_gap:
            cond += where_none_acts(now, predictions.cond(compared))
        cond = with_additions(cond, now, predictions, True, strength)
        shown = self.shown(weights)
        if not now.has_uncond:
            return Composition(cond, None, shown)
        composed: Tensor | None = None
        if strength < 1:
            unconds = torch.stack([predictions.uncond(mix) for mix in singles])
            composed = self.combine(unconds, predictions.per_image(weights, unconds.shape[1]))
            if now.has_gap:
                composed += where_none_acts(now, predictions.uncond(compared))
        # At λ = 0 the base was not asked; its term is multiplied by 0.
        base = predictions.uncond(now.participants.base) if strength > 0 else None
        if base is None:
            assert composed is not None
            uncond = composed
        else:
            uncond = anchor(base, composed, strength)
        return Composition(cond, with_additions(uncond, now, predictions, False, strength), shown)

    @abstractmethod
    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        """Weights of the conditional rows, (N, Bc, …) float32, summing to 1 over N, or to the coverage of their places."""

    @abstractmethod
    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of (N, B, C, H, W) by the weights of the same rows, (B, C, H, W) float32."""

    def shown(self, weights: Tensor) -> Tensor | None:
        """Ω↑ for the weight maps, (N, Bc, H, W), where the weights are of that kind."""
        return None


def stacked_noise(now: StepContext, predictions: Predictions) -> Tensor:
    """Each single's conditional noise, (N, Bc, C, H, W)."""
    return torch.stack([predictions.noise(mix) for mix in now.participants.singles])


def where_none_acts(now: StepContext, reference: Tensor) -> Tensor:
    """The reference's prediction (B, C, H, W) times what no LoRA's place covers, float32."""
    masks = now.masks(reference.device)
    assert masks is not None
    return reference.to(torch.float32) * (1 - masks.coverage)


def addition_rows(now: StepContext, recentre: float) -> list[Branch]:
    """Rows of the LoRAs that are added inside their places, and of the reference, from which they differ."""
    branches = []
    for added in now.participants.additions:
        pair = (now.participants.compared, added.mix)
        branches += [Branch(mix, True) for mix in pair]
        if now.has_uncond and (added.always or recentre < 1):
            branches += [Branch(mix, False) for mix in pair]
    return branches


def with_additions(
    composed: Tensor, now: StepContext, predictions: Predictions, cond: bool, recentre: float
) -> Tensor:
    """ẽ + Σ over the added LoRAs of mask·(e(reference and LoRA) − e(reference)), (B, C, H, W) float32.

    In the unconditional prediction a style's part is (1 − λ), as the others' is; what always acts is in the base's too.
    """
    compared = now.participants.compared
    for added in now.participants.additions:
        part = 1.0 if cond or added.always else 1 - recentre
        if part == 0:
            continue
        own = predictions.by_branch[Branch(added.mix, cond)].to(torch.float32)
        difference = own - predictions.by_branch[Branch(compared, cond)].to(torch.float32)
        assert now.size is not None
        composed = composed + part * now.canvas.mask(added.place, now.size, own.device) * difference
    return composed
