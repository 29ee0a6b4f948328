"""How much each LoRA is trusted in each patch of the latent (LoRAtorio, arXiv 2508.11624, section on skill composition).

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches with h = ⌈H/P⌉ and w = ⌈W/P⌉.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLENDS = ("patches", "smooth", "overlap")
"""How weights go over from patch to patch: at once, by interpolation between patch centres, or as the mean of overlapping patches."""

REFERENCE_SPREAD = 0.03
"""The spread of S at which an adaptive temperature equals the fixed one: what is typical of the middle of sampling."""


def spatial_weights(
    base: Tensor,
    adapters: Tensor,
    patch_size: int,
    temperature: float,
    top_k: int = 0,
    *,
    blend: str = "patches",
    adaptive: bool = False,
) -> Tensor:
    """Ω↑, the weight of every LoRA at every latent pixel.

    Args:
        base: noise predicted by the base model, (B, C, H, W), any floating dtype.
        adapters: noise predicted with each LoRA alone, (N, B, C, H, W).
        patch_size: side P of a patch in latent pixels. A border patch is made of the pixels that are there.
        temperature: τ of the SoftMin; towards 0 the most divergent LoRA alone, towards ∞ the plain mean.
        top_k: how many LoRAs a patch may use; 0, or N and more, means all.
        blend: one of `BLENDS`. The paper's is "patches"; with P = 1 all are alike.
        adaptive: τ is multiplied by the spread of S in this image at this step, over `REFERENCE_SPREAD`.

    Returns:
        (N, B, H, W) float32, summing to 1 over N.

    Raises:
        ValueError: shapes that do not fit, P < 1, τ ≤ 0 or not finite, k < 0, an unknown blend.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, not {blend!r}")
    height, width = base.shape[-2:]
    overlap = blend == "overlap" and patch_size > 1
    similarity = patch_similarity(base, adapters, patch_size, stride=1 if overlap else None)
    if adaptive:
        similarity = at_reference_spread(similarity)
    weights = keep_top_k(softmin(similarity, temperature), top_k)
    if overlap:
        return _mean_of_covering(weights, patch_size, height, width)
    if blend == "smooth" and patch_size > 1:
        return _interpolated(weights, patch_size, height, width)
    return upsample(weights, patch_size, height, width)


def patch_similarity(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """Cosine similarity of each LoRA's patches, over all channels, with the base's: S, (N, B, h, w) float32.

    Patches lie side by side; with `stride` 1 there is one at every place where it fits whole, so h = H − P + 1.

    A patch that equals the base's has exactly S = 1, two empty patches count as equal, and an empty patch
    against one that is not empty has S = 0. Raises ValueError when shapes do not fit or P < 1.
    """
    if base.ndim != 4 or adapters.ndim != 5 or adapters.shape[1:] != base.shape or adapters.shape[0] < 1:
        raise ValueError(
            f"base must be (B, C, H, W) and adapters (N, B, C, H, W) with N of at least 1, "
            f"not {tuple(base.shape)} and {tuple(adapters.shape)}"
        )
    if patch_size < 1:
        raise ValueError(f"the patch size must be at least 1, not {patch_size}")
    scale = _power_of_two_scale(base)
    reference_square = _patch_mean((base.to(torch.float32) * scale).square_(), patch_size, stride)
    similarity = base.new_empty((adapters.shape[0], *reference_square.shape), dtype=torch.float32)
    # One LoRA at a time, and the base in its own dtype: two float32 copies of one prediction are all the extra memory.
    for row, adapter in zip(similarity, adapters, strict=True):
        prediction = adapter.to(torch.float32) * _power_of_two_scale(adapter)
        square = _patch_mean(prediction * prediction, patch_size, stride)
        # (p·base)·scale has the bits of p·(base·scale), because scale is a power of two.
        dot = _patch_mean(prediction.mul_(base).mul_(scale), patch_size, stride)
        # √(a·a) is exactly a in binary floating point, so that equal patches give exactly 1.
        norm = (square * reference_square).sqrt()
        both_empty = (square == 0) & (reference_square == 0)
        row.copy_(torch.where(norm > 0, dot / norm, both_empty.to(dot.dtype)).clamp_(-1.0, 1.0))
    return similarity


def softmin(similarity: Tensor, temperature: float) -> Tensor:
    """Ω[i] = exp(−S[i]/τ) / Σⱼ exp(−S[j]/τ) over the first dimension. Raises ValueError unless τ is finite and > 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature must be a finite number above 0, not {temperature}")
    # Differences to the smallest S, so that a tiny τ cannot overflow float32.
    distance = similarity - similarity.amin(dim=0, keepdim=True)
    return torch.softmax(-distance / max(temperature, 1e-30), dim=0)


def keep_top_k(weights: Tensor, top_k: int) -> Tensor:
    """Keep each patch's k largest weights (N, …), renormalised to sum to 1; k = 0 or k ≥ N keeps all.

    LoRAs that tie with the k-th largest are all kept: which of them came first in the prompt must not matter.
    Raises ValueError for k < 0.
    """
    if top_k < 0:
        raise ValueError(f"top-k must be 0 (all) or more, not {top_k}")
    if top_k == 0 or top_k >= weights.shape[0]:
        return weights
    smallest_kept = weights.topk(top_k, dim=0).values[-1:]
    kept = torch.where(weights >= smallest_kept, weights, torch.zeros_like(weights))
    return kept / kept.sum(dim=0, keepdim=True)


def at_reference_spread(similarity: Tensor) -> Tensor:
    """S stretched, per image, to the spread `REFERENCE_SPREAD`; (N, B, h, w) to the same.

    S lies close to 1 early in sampling and spreads later, so that a fixed temperature is undecided early. The spread is the
    root mean square, over patches, of the LoRAs' differences from their mean. It is stretched a hundredfold at most, so that
    differences that are only rounding stay small.
    """
    deviation = similarity - similarity.mean(dim=0, keepdim=True)
    spread = deviation.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()
    return similarity * (REFERENCE_SPREAD / spread.clamp_min(0.01 * REFERENCE_SPREAD))


def spread_styles(weights: Tensor, styles: Sequence[bool]) -> Tensor:
    """Give every style its mean weight over the picture, everywhere; the other LoRAs share what is left as before.

    weights: Ω↑, (N, B, H, W), summing to 1 over N; styles: which of the N are styles. Sums to 1 again.
    """
    style = torch.tensor(list(styles), device=weights.device).view(-1, 1, 1, 1)
    means = weights.mean(dim=(2, 3), keepdim=True)
    if bool(style.all()):
        return means.expand_as(weights).contiguous()
    left = 1 - torch.where(style, means, torch.zeros_like(means)).sum(dim=0, keepdim=True)
    contents = torch.where(style, torch.zeros_like(weights), weights)
    total = contents.sum(dim=0, keepdim=True)
    even = (~style).to(weights.dtype) / (~style).sum()
    # A pixel that belonged to styles alone has no shares among the others to keep.
    shares = torch.where(total > 0, contents / total.clamp_min(torch.finfo(weights.dtype).tiny), even)
    return torch.where(style, means, shares * left)


def upsample(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Give every latent pixel its patch's weight: (N, B, h, w) to (N, B, height, width)."""
    if patch_size == 1:
        return weights
    rows = torch.arange(height, device=weights.device) // patch_size
    columns = torch.arange(width, device=weights.device) // patch_size
    return weights[..., rows, :][..., columns]


def _power_of_two_scale(prediction: Tensor) -> Tensor:
    """(B, 1, 1, 1) float32: what brings each image's largest magnitude near 1, so that squares neither overflow nor vanish."""
    dims = (-3, -2, -1)
    largest = torch.maximum(prediction.amax(dims, keepdim=True), -prediction.amin(dims, keepdim=True))
    exponent = torch.frexp(largest.to(torch.float32)).exponent
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float32), -exponent.clamp(-120, 120))


def _patch_mean(values: Tensor, patch_size: int, stride: int | None) -> Tensor:
    """Mean over channels and over the pixels of each patch that exist: (B, C, H, W) to (B, h, w)."""
    channel_mean = values.mean(dim=1)
    if patch_size == 1:
        return channel_mean
    # A patch never reaches over more than the picture; avg_pool2d refuses kernels that are much larger than it.
    kernel = (min(patch_size, values.shape[-2]), min(patch_size, values.shape[-1]))
    pooled = F.avg_pool2d(
        channel_mean.unsqueeze(1), kernel, stride, ceil_mode=stride is None, count_include_pad=False
    )
    return pooled.squeeze(1)


def _interpolated(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Weights between the patches' centres by linear interpolation: (N, B, h, w) to (N, B, height, width)."""
    size = (weights.shape[-2] * patch_size, weights.shape[-1] * patch_size)
    return F.interpolate(weights, size=size, mode="bilinear", align_corners=False)[..., :height, :width]


def _mean_of_covering(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The mean, at every pixel, of the weights of all patches that lie over it: (N, B, h, w) to (N, B, height, width)."""
    side = (height - weights.shape[-2] + 1, width - weights.shape[-1] + 1)
    padding = (side[1] - 1, side[1] - 1, side[0] - 1, side[0] - 1)
    summed = F.avg_pool2d(F.pad(weights, padding), side, 1)
    covered = F.avg_pool2d(F.pad(torch.ones_like(weights[:1, :1]), padding), side, 1)
    return summed / covered
