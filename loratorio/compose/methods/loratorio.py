"""LoRAtorio itself (arXiv 2508.11624)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ..guidance import compose
from ..mixes import Branch, Participants
from .base import Changes, Composition, Entry, Method, Predictions, StepContext
from .patches import patch_weights, with_styles
from .reuse import KNOBS, Reuse
from .weighted import Weighted

if TYPE_CHECKING:
    from torch import Tensor


class Loratorio(Weighted):
    """LoRAtorio: patch by patch, the LoRAs that diverge from the base; the unconditional score re-centred on the base.

    Taken from the paper: patches, cosine similarity, SoftMin, re-centring with λ = 0.5, top-k for pools. Left open there and
    measured here: patch size and temperature. Not in it: styles, softer patches, a temperature that follows the spread.

    A style is not weighed: the rows of all the others have it too, and are compared with those of the base under the style.
    """

    entry = Entry(
        "loratorio",
        "LoRAtorio",
        "arXiv 2508.11624",
        "Patch by patch, LoRAs count by how far their prediction diverges from the base model's.",
    )
    takes_places = True
    relative: ClassVar[bool] = False
    """Whether a LoRA's divergence counts beside its mean over the picture; for methods without a temperature."""
    knobs: ClassVar[tuple[str, ...]] = (
        "patch_size",
        "temperature",
        "adaptive",
        "top_k",
        "blend",
        "recentre",
        "share",
        "yielding",
        *KNOBS,
    )

    def branches(self, now: StepContext) -> list[Branch]:
        return super().branches(now.with_shared_parts())

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        composed = super().compose(now.with_shared_parts(), predictions)
        return replace(composed, weights=with_styles(composed.weights, now))

    def begin(self, participants: Participants, changes: Changes) -> Method:
        return Reuse(self)

    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        return patch_weights(now, predictions, self.relative)

    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        return compose(predictions, weights)

    def shown(self, weights: Tensor) -> Tensor | None:
        return weights


METHOD = Loratorio()
