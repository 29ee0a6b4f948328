"""W-Composite (arXiv 2606.03792)."""

from __future__ import annotations

from .base import Entry, StepContext
from .composite import Composite


class WComposite(Composite):
    """W-Composite: Composite, with each LoRA weighted by how much its trigger words matter in the prompt.

    Taken from the paper: the weighted mean, and that the weight comes from the prompt's text alone, before sampling
    (`Participants.importance`, made by `loratorio.compose.importance`). Left open, as no code was released when this was written:
    which distance between texts; here the cosine distance between the prompt's conditioning with and without the trigger words.
    A LoRA whose trigger words nobody knows counts as an average one, so that without any this is Composite.
    """

    entry = Entry(
        "w_composite",
        "W-Composite",
        "arXiv 2606.03792",
        "The mean of what the LoRAs predict, by how much their trigger words matter in the prompt.",
    )
    uses_importance = True

    def shares(self, now: StepContext) -> list[float]:
        importance = [max(0.0, each) for each in now.participants.importance]
        total = sum(importance)
        return [each / total for each in importance] if total > 0 else super().shares(now)


METHOD = WComposite()
