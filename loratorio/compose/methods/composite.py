"""LoRA-Composite (arXiv 2402.16843) and W-Composite (arXiv 2606.03792). Both can be re-centred, as LoRAtorio is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..lazy_torch import torch
from .base import Entry, Predictions, StepContext
from .loratorio import Loratorio, in_proportion

if TYPE_CHECKING:
    from torch import Tensor


class Composite(Loratorio):
    """The mean of every LoRA's guided prediction: LoRAtorio with Ω = 1/N and λ = 0.

    Guidance is linear, so the mean of the guided predictions is the guided mean.

    W-Composite weights the mean by how much a LoRA's trigger words matter in the prompt. Taken from its paper: the weighted mean, and
    that the weight comes from the prompt's text alone, before sampling (`ComposedLora.importance`, made by
    `loratorio.compose.importance`). Left open, as no code was released when this was written: which distance between texts; here the
    cosine distance between the prompt's conditioning with and without the trigger words. A LoRA whose trigger words are unknown counts
    as an average one, so that without any this is Composite.
    """

    compares: ClassVar[bool] = False

    def __init__(self, entry: Entry, uses_importance: bool = False) -> None:
        self.entry = entry
        self.knobs = ("recentre", "yielding", "find_after")
        self.uses_importance = uses_importance

    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        loras = now.participants.loras
        masks = None if now.masks is None else now.masks.of(predictions.owners)
        first = predictions.cond(loras[0].mix)
        parts = [max(0.0, lora.importance) if self.uses_importance else 1.0 for lora in loras]
        if not any(parts):
            parts = [1.0] * len(loras)
        shape = (len(first), *(now.size if masks is not None else (1, 1)))
        shares = torch.stack([torch.full(shape, part / sum(parts), device=first.device) for part in parts])
        if masks is None:
            return shares
        allowed = masks.own.expand_as(shares)
        return in_proportion(shares * allowed, allowed) * masks.coverage

    def shown(self, weights: Tensor) -> Tensor | None:
        return None


PLAIN = Composite(Entry("composite", "Composite", "arXiv 2402.16843", "The mean of the LoRAs' predictions."))

BY_IMPORTANCE = Composite(
    Entry(
        "w_composite",
        "W-Composite",
        "arXiv 2606.03792",
        "The mean of the LoRAs' predictions, weighted by how much their trigger words matter in the prompt.",
    ),
    uses_importance=True,
)
