"""Weights patch by patch, as the steps with and without a pool take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..mixes import Participants
from ..weights import spatial_weights, spread_styles
from .base import Predictions, StepContext
from .weighted import stacked_noise

if TYPE_CHECKING:
    from torch import Tensor


def patch_weights(now: StepContext, predictions: Predictions) -> Tensor:
    """Ω↑ of the conditional rows, (N, Bc, H, W) float32."""
    participants, knobs = now.participants, now.knobs
    noise = stacked_noise(now, predictions)
    if len(participants.singles) == 1:
        return noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
    weights = spatial_weights(
        predictions.noise_by_mix[participants.compared],
        noise,
        knobs["patch_size"],
        knobs["temperature"],
        knobs["top_k"],
        blend=knobs["blend"],
        adaptive=knobs["adaptive"],
    )
    return spread_styles(weights, participants.styles) if any(participants.styles) else weights


def with_styles(weights: Tensor | None, participants: Participants) -> Tensor | None:
    """Ω↑ of all singles out of that of those without the shared styles: such a style acts everywhere, by 1."""
    styles = participants.shared_styles
    if weights is None or not styles:
        return weights
    shown = weights.new_ones((len(participants.singles), *weights.shape[1:]))
    left = [i for i in range(len(participants.singles)) if i not in styles]
    for place, own in zip(left, weights, strict=False):  # styles alone have one weight and no place
        shown[place] = own
    return shown
