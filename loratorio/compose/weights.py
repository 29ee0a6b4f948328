"""How much each LoRA is trusted in each patch of the latent (LoRAtorio, arXiv 2508.11624, section on skill composition).

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches with h = ⌈H/P⌉ and w = ⌈W/P⌉.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spatial_weights(
    base: Tensor, adapters: Tensor, patch_size: int, temperature: float, top_k: int = 0
) -> Tensor:
    """Ω↑, the weight of every LoRA at every latent pixel.

    Args:
        base: noise predicted by the base model, (B, C, H, W), any floating dtype.
        adapters: noise predicted with each LoRA alone, (N, B, C, H, W).
        patch_size: side P of a patch in latent pixels. A border patch is made of the pixels that are there.
        temperature: τ of the SoftMin; towards 0 the most divergent LoRA alone, towards ∞ the plain mean.
        top_k: how many LoRAs a patch may use; 0, or N and more, means all.

    Returns:
        (N, B, H, W) float32, summing to 1 over N.

    Raises:
        ValueError: shapes that do not fit, P < 1, τ ≤ 0 or not finite, k < 0.
    """
    similarity = patch_similarity(base, adapters, patch_size)
    weights = keep_top_k(softmin(similarity, temperature), top_k)
    return upsample(weights, patch_size, base.shape[-2], base.shape[-1])


def patch_similarity(base: Tensor, adapters: Tensor, patch_size: int) -> Tensor:
    """Cosine similarity of each LoRA's patches, over all channels, with the base's: S, (N, B, h, w) float32.

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
    reference_square = _patch_mean((base.to(torch.float32) * scale).square_(), patch_size)
    similarity = base.new_empty((adapters.shape[0], *reference_square.shape), dtype=torch.float32)
    # One LoRA at a time, and the base in its own dtype: two float32 copies of one prediction are all the extra memory.
    for row, adapter in zip(similarity, adapters, strict=True):
        prediction = adapter.to(torch.float32) * _power_of_two_scale(adapter)
        square = _patch_mean(prediction * prediction, patch_size)
        # (p·base)·scale has the bits of p·(base·scale), because scale is a power of two.
        dot = _patch_mean(prediction.mul_(base).mul_(scale), patch_size)
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


def _patch_mean(values: Tensor, patch_size: int) -> Tensor:
    """Mean over channels and over the pixels of each patch that exist: (B, C, H, W) to (B, h, w)."""
    channel_mean = values.mean(dim=1)
    if patch_size == 1:
        return channel_mean
    # A patch never reaches over more than the picture; avg_pool2d refuses kernels that are much larger than it.
    kernel = (min(patch_size, values.shape[-2]), min(patch_size, values.shape[-1]))
    return F.avg_pool2d(channel_mean.unsqueeze(1), kernel, ceil_mode=True, count_include_pad=False).squeeze(1)
