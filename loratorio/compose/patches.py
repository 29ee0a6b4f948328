"""Patches: what LoRAs and base predict in each, compared; and patches' weights brought back to the pixels.

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches with h = ⌈H/P⌉ and w = ⌈W/P⌉.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BLENDS = ("hard", "interpolated", "overlapping")
"""How weights change from patch to patch: at once, by interpolation between patch centres, or as the mean of overlapping patches."""

AT_ONCE = 2**20
"""The most numbers of the LoRAs' predictions that are compared in one go."""

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
    reference = base.to(torch.float32) * scale
    (reference_square,) = _patch_sums([(reference * reference).unsqueeze(0)], patch_size, stride)

    def of_some(some: Tensor) -> Tensor:
        own = some.to(torch.float32) * scale
        square, dot = _patch_sums([own * own, own * reference], patch_size, stride)
        both_empty = (square == 0) & (reference_square == 0)
        # √(a·a) is exactly a in binary floating point, so that equal patches give exactly 1.
        norm = (square * reference_square).sqrt_()
        similarity: Tensor = (dot / norm).clamp_(-1.0, 1.0)
        return similarity.masked_fill_(norm == 0, 0.0).masked_fill_(both_empty, 1.0)

    each = _at_once(base)
    return torch.cat([of_some(adapters[i : i + each]) for i in range(0, len(adapters), each)])


def patch_divergence(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """D = 1 − S of each LoRA's patches, (N, B, h, w) float32 from 0 to 2, with all its figures where S is nearly 1, as in the first steps.

    With d = a − b: 1 − a·b / |a||b| = (|d|² − (|a| − |b|)²) / 2|a||b|, and |a| − |b| = d·(a + b) / (|a| + |b|); so where |d|² is below
    `NEAR` of |b|².

    A patch that equals the base's has exactly 0. The rest as in `patch_similarity`.
    """
    _check(base, adapters, patch_size)
    scale, whole = _scale(base), base.to(torch.float32)
    reference = whole * scale
    (reference_square,) = _patch_sums([(reference * reference).unsqueeze(0)], patch_size, stride)

    def of_some(some: Tensor) -> Tensor:
        own = some.to(torch.float32)
        # Subtracted before anything is rounded: of numbers that are close, the difference is exact.
        difference, both, own = (own - whole) * scale, (own + whole) * scale, own * scale
        products = [own * own, own * reference, difference * difference, difference * both]
        square, dot, moved, longer = _patch_sums(products, patch_size, stride)
        both_empty = (square == 0) & (reference_square == 0)
        norm = (square * reference_square).sqrt_()
        longer = longer / (square.sqrt_() + reference_square.sqrt())
        near = (moved - longer.square_()) / (2 * norm)
        divergence: Tensor = torch.where(moved < NEAR * reference_square, near, 1 - dot / norm).clamp_(
            0.0, 2.0
        )
        return divergence.masked_fill_(norm == 0, 1.0).masked_fill_(both_empty, 0.0)

    each = _at_once(base)
    return torch.cat([of_some(adapters[i : i + each]) for i in range(0, len(adapters), each)])


def _at_once(base: Tensor) -> int:
    """How many LoRAs are compared in one go: few operations for pictures, little memory for many LoRAs and for clips."""
    return max(1, AT_ONCE // max(1, base.numel()))


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
    *count, rows, columns = weights.shape
    each = weights[..., :, None, :, None].expand(*count, rows, patch_size, columns, patch_size)
    return each.reshape(*count, rows * patch_size, columns * patch_size)[..., :height, :width]


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
    """(B, 1, 1, 1) float32: what brings each image's largest magnitude to 1, so that squares neither overflow nor vanish."""
    largest = base.abs().amax((-3, -2, -1), keepdim=True).to(torch.float32)
    return torch.where(largest > 0, 1 / largest.clamp_min(1e-30), 1.0)


def _patch_sums(products: Sequence[Tensor], patch_size: int, stride: int | None) -> Tensor:
    """Sums over all channels and each patch's pixels: k times (N, B, C, H, W) to (k, N, B, h, w).

    Of overlapping patches the mean, which is as good for a cosine. Equal products give equal sums.
    """
    values = torch.stack(list(products))
    if patch_size == 1:
        return values.sum(dim=3)
    height, width = values.shape[-2:]
    # A patch never reaches over more than the picture.
    rows, columns = min(patch_size, height), min(patch_size, width)
    if stride is not None:
        summed = values.sum(dim=3)
        means = torch.nn.functional.avg_pool2d(summed.flatten(0, 1), (rows, columns), stride)
        return means.reshape(*summed.shape[:-2], *means.shape[-2:])
    # Zeros add nothing to a border patch's sums: it is made of the pixels that are there.
    if height % rows or width % columns:
        values = torch.nn.functional.pad(values, (0, -width % columns, 0, -height % rows))
    down, across = values.shape[-2] // rows, values.shape[-1] // columns
    return values.reshape(*values.shape[:-2], down, rows, across, columns).sum(dim=(3, 5, 7))
