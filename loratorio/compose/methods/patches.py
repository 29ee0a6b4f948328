"""Weights patch by patch, as the steps with and without a pool take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..weights import spatial_weights, spread_styles
from .base import Predictions, StepContext
from .weighted import stacked_noise

if TYPE_CHECKING:
    from torch import Tensor


def patch_weights(now: StepContext, predictions: Predictions, relative: bool = False) -> Tensor:
    """Ω↑ of the conditional rows, (N, Bc, H, W) float32: by SoftMin for methods with a temperature, else by divergence, or by relative
    divergence."""
    participants, knobs = now.participants, now.knobs
    noise = stacked_noise(now, predictions)
    masks = now.masks(noise.device)
    if len(participants.singles) == 1:
        ones = noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
        return ones if masks is None else ones * masks.coverage
    weights = spatial_weights(
        predictions.noise(participants.compared),
        noise,
        knobs["patch_size"],
        knobs.get("temperature"),
        knobs["top_k"],
        blend=knobs["blend"],
        adaptive=knobs.get("adaptive", False),
        relative=relative,
        masks=masks,
    )
    return spread_styles(weights, participants.styles) if any(participants.styles) else weights


def with_styles(weights: Tensor | None, now: StepContext) -> Tensor | None:
    """Ω↑ of all singles out of that of those without the styles that are not weighed: such a style acts by 1 in all of its place."""
    participants = now.participants
    styles = participants.unweighed_styles
    if weights is None or not styles:
        return weights
    shown = weights.new_ones((len(participants.singles), *weights.shape[1:]))
    for position in styles:
        place = participants.places[position] if participants.places else None
        if place is not None and now.size is not None:
            shown[position] = now.canvas.mask(place, now.size, weights.device)
    left = [i for i in range(len(participants.singles)) if i not in styles]
    for position, own in zip(left, weights, strict=False):  # styles alone have one weight and no position
        shown[position] = own
    return shown
