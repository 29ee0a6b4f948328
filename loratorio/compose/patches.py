"""Patches: what LoRAs and base predict in each, compared; and patches' weights brought back to the pixels.

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches with h = ⌈H/P⌉ and w = ⌈W/P⌉.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BLENDS = ("hard", "interpolated", "overlapping")
"""How weights change from patch to patch: at once, by interpolation between patch centres, or as the mean of overlapping patches."""

NEAR = 0.01
"""Below this part of the base's square a patch's divergence is computed from its difference: a cosine near 1 has lost its figures."""


def patch_similarity(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """Cosine similarity of each LoRA's patches, over all channels, with the base's: S, (N, B, h, w) float32.

    Patches lie side by side; with `stride` 1 there is one at every place where it fits whole, so h = H − P + 1.

    A patch that equals the base's has exactly S = 1, two empty patches count as equal, and an empty patch
    against one that is not empty has S = 0. Raises ValueError when shapes do not fit or P < 1.
    """
    _check(base, adapters, patch_size)
    scale = _scale(base)
    reference, _ = _patch_products(base, base, scale, patch_size, stride)
    similarity = base.new_empty((adapters.shape[0], *reference.shape), dtype=torch.float32)
    for own, adapter in zip(similarity, adapters, strict=True):
        square, dot = _patch_products(adapter, base, scale, patch_size, stride)
        both_empty = (square == 0) & (reference == 0)
        # √(a·a) is exactly a in binary floating point, so that equal patches give exactly 1.
        norm = square.mul_(reference).sqrt_()
        torch.div(dot, norm, out=own)
        own.clamp_(-1.0, 1.0).masked_fill_(norm == 0, 0.0).masked_fill_(both_empty, 1.0)
    return similarity


def patch_divergence(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """D = 1 − S of each LoRA's patches, (N, B, h, w) float32 from 0 to 2, with all its figures where S is nearly 1, as in the first steps.

    With d = a − b: 1 − a·b / |a||b| = (|d|² − (|a| − |b|)²) / 2|a||b|, and |a| − |b| = d·(a + b) / (|a| + |b|); so where |d|² is below
    `NEAR` of |b|².

    A patch that equals the base's has exactly 0. The rest as in `patch_similarity`.
    """
    _check(base, adapters, patch_size)
    scale = _scale(base)
    reference, _ = _patch_products(base, base, scale, patch_size, stride)
    divergence = base.new_empty((adapters.shape[0], *reference.shape), dtype=torch.float32)
    for own, adapter in zip(divergence, adapters, strict=True):
        square, dot = _patch_products(adapter, base, scale, patch_size, stride)
        moved = base.new_zeros((len(base), *base.shape[2:]), dtype=torch.float32)
        longer = torch.zeros_like(moved)
        for one, other in zip(adapter.unbind(1), base.unbind(1), strict=True):
            here, there = one.to(torch.float32), other.to(torch.float32)
            # Subtracted before anything is rounded: of numbers that are close, the difference is exact.
            difference = (here - there) * scale
            moved.addcmul_(difference, difference)
            longer.addcmul_(difference, (here + there) * scale)
        moved, longer = (_patch_sum(each, patch_size, stride) for each in (moved, longer))
        both_empty = (square == 0) & (reference == 0)
        norm = (square * reference).sqrt_()
        longer = longer / square.sqrt_().add_(reference.sqrt())
        own[:] = torch.where(
            moved < NEAR * reference, (moved - longer.square_()) / (2 * norm), 1 - dot / norm
        )
        own.clamp_(0.0, 2.0).masked_fill_(norm == 0, 1.0).masked_fill_(both_empty, 0.0)
    return divergence


def _check(base: Tensor, adapters: Tensor, patch_size: int) -> None:
    if base.ndim != 4 or adapters.ndim != 5 or adapters.shape[1:] != base.shape or adapters.shape[0] < 1:
        raise ValueError(
            f"base must be (B, C, H, W) and adapters (N, B, C, H, W) with N of at least 1, "
            f"not {tuple(base.shape)} and {tuple(adapters.shape)}"
        )
    if patch_size < 1:
        raise ValueError(f"the patch size must be at least 1, not {patch_size}")


def at_pixels(weights: Tensor, patch_size: int, height: int, width: int, blend: str) -> Tensor:
    """Patches' values (N, B, h, w) as pixels' (N, B, height, width), by one of `BLENDS`."""
    if blend == "overlapping" and patch_size > 1:
        return _mean_of_covering(weights, patch_size, height, width)
    if blend == "interpolated" and patch_size > 1:
        return _interpolated(weights, patch_size, height, width)
    return upsample(weights, patch_size, height, width)


def upsample(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Give every latent pixel its patch's weight: (N, B, h, w) to (N, B, height, width)."""
    if patch_size == 1:
        return weights
    rows = torch.arange(height, device=weights.device) // patch_size
    columns = torch.arange(width, device=weights.device) // patch_size
    return weights[..., rows, :][..., columns]


def _interpolated(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Weights between the patches' centres by linear interpolation: (N, B, h, w) to (N, B, height, width)."""
    size = (weights.shape[-2] * patch_size, weights.shape[-1] * patch_size)
    return torch.nn.functional.interpolate(weights, size=size, mode="bilinear", align_corners=False)[
        ..., :height, :width
    ]


def _mean_of_covering(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The mean, at every pixel, of the weights of all patches that lie over it: (N, B, h, w) to (N, B, height, width)."""
    side = (height - weights.shape[-2] + 1, width - weights.shape[-1] + 1)
    padding = (side[1] - 1, side[1] - 1, side[0] - 1, side[0] - 1)
    summed = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(weights, padding), side, 1)
    covered = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(torch.ones_like(weights[:1, :1]), padding), side, 1
    )
    return summed / covered


def _scale(base: Tensor) -> Tensor:
    """(B, 1, 1) float32: what brings each image's largest magnitude to 1, so that squares neither overflow nor vanish."""
    dims = (-3, -2, -1)
    largest = torch.maximum(base.amax(dims), -base.amin(dims)).to(torch.float32)
    return torch.where(largest > 0, 1 / largest.clamp_min(1e-30), torch.ones_like(largest)).view(-1, 1, 1)


def _patch_products(
    prediction: Tensor, base: Tensor, scale: Tensor, patch_size: int, stride: int | None
) -> tuple[Tensor, Tensor]:
    """The patches' products p·p and p·b over all channels, (B, h, w) each, of predictions times `scale`."""
    square = prediction.new_zeros((len(prediction), *prediction.shape[2:]), dtype=torch.float32)
    dot = torch.zeros_like(square)
    # Channel by channel, so that no prediction is ever held in float32 as a whole.
    for own, other in zip(prediction.unbind(1), base.unbind(1), strict=True):
        scaled = own.to(torch.float32) * scale
        square.addcmul_(scaled, scaled)
        dot.addcmul_(scaled, other.to(torch.float32) * scale)
    return _patch_sum(square, patch_size, stride), _patch_sum(dot, patch_size, stride)


def _patch_sum(values: Tensor, patch_size: int, stride: int | None) -> Tensor:
    """Sum over each patch's pixels: (B, H, W) to (B, h, w). Of overlapping patches the mean, which is as good for a cosine."""
    if patch_size == 1:
        return values
    height, width = values.shape[-2:]
    # A patch never reaches over more than the picture.
    rows, columns = min(patch_size, height), min(patch_size, width)
    if stride is not None:
        return torch.nn.functional.avg_pool2d(values.unsqueeze(1), (rows, columns), stride).squeeze(1)
    # Zeros add nothing to a border patch's sums: it is made of the pixels that are there.
    padded = torch.nn.functional.pad(values, (0, -width % columns, 0, -height % rows))
    across = padded.shape[-1] // columns
    return padded.reshape(len(values), -1, rows, across, columns).sum(dim=(2, 4))
