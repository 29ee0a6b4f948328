"""Composed scores and re-centred classifier-free guidance (LoRAtorio, arXiv 2508.11624), and guidance rescale (2305.08891).

Works on noise e and on denoised latents D alike: the weights sum to 1 over the LoRAs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def compose(adapters: Tensor, weights: Tensor) -> Tensor:
    """ẽ = Σᵢ Ω↑[i]·eᵢ in float32.

    Args:
        adapters: each LoRA's prediction, (N, B, C, H, W).
        weights: Ω↑, (N, B, H, W).

    Returns:
        (B, C, H, W) float32.
    """
    return (adapters.to(torch.float32) * weights.unsqueeze(2)).sum(dim=0)


def recentre(base_uncond: Tensor, adapter_unconds: Tensor, weights: Tensor, strength: float) -> Tensor:
    """ẽ(∅) = λ·e₀(∅) + (1−λ)·Σᵢ Ω↑[i]·eᵢ(∅): the unconditional score brought back to the base model's domain.

    Args:
        base_uncond: the base's unconditional prediction, (B, C, H, W).
        adapter_unconds: each LoRA's, (N, B, C, H, W).
        weights: Ω↑ of the conditional branch, (N, B, H, W).
        strength: λ, from 0 (the LoRAs' own) to 1 (the base's alone).

    Returns:
        (B, C, H, W) float32; exactly one of the two terms when λ is 0 or 1.
    """
    composed = compose(adapter_unconds, weights) if strength < 1 else None
    return recentred(base_uncond, composed, strength)


def recentred(base_uncond: Tensor, composed_uncond: Tensor | None, strength: float) -> Tensor:
    """λ·e₀(∅) + (1−λ)·ẽ(∅), (B, C, H, W) float32, for an ẽ(∅) that is composed already; it is not needed at λ = 1."""
    if strength == 1 or composed_uncond is None:
        return base_uncond.to(torch.float32)
    if strength == 0:
        return composed_uncond
    return composed_uncond.lerp(base_uncond.to(torch.float32), strength)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, e = ẽ(∅) + s·(ẽ(c) − ẽ(∅)); tensors of one shape, s the CFG scale."""
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, strength: float) -> Tensor:
    """Guidance rescale against over-saturation: φ·g·std(ẽ(c))/std(g) + (1−φ)·g, per image (arXiv 2305.08891, section 3.4).

    Args:
        guided: the guided prediction g, (B, C, H, W).
        cond: the conditional prediction, same shape; its contrast is the wanted one.
        strength: φ, from 0 (no change) to 1.
    """
    dims = tuple(range(1, guided.ndim))
    spread = guided.std(dim=dims, keepdim=True)
    ratio = torch.where(spread > 0, cond.std(dim=dims, keepdim=True) / spread, torch.ones_like(spread))
    return guided * (strength * ratio + (1 - strength))


def rescaled_cond(cond: Tensor, uncond: Tensor, scale: float, strength: float) -> Tensor:
    """The conditional prediction with which a sampler's own guidance (`guide` at `scale`) ends at the rescaled result.

    cond, uncond: (B, C, H, W), row by row, or (B, T, C, H, W), clip by clip; `scale` must not be 0.
    """
    return uncond + (rescale(guide(cond, uncond, scale), cond, strength) - uncond) / scale
