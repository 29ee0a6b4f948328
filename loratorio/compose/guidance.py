"""Composed scores and re-centred classifier-free guidance (LoRAtorio, arXiv 2508.11624).

Works on noise e and on denoised latents D alike: the weights sum to 1 over the LoRAs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compose(adapters: Tensor, weights: Tensor) -> Tensor:
    """ẽ = Σᵢ Ω↑[i]·eᵢ in float32.

    Args:
        adapters: each LoRA's prediction, (N, B, C, H, W).
        weights: Ω↑, (N, B, H, W).

    Returns:
        (B, C, H, W) float32.
    """
    composed = adapters[0].to(torch.float32) * weights[0].unsqueeze(1)
    for adapter, weight in zip(adapters[1:], weights[1:], strict=True):
        composed.addcmul_(adapter.to(torch.float32), weight.unsqueeze(1))
    return composed


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
    if strength == 1:
        return base_uncond.to(torch.float32)
    composed = compose(adapter_unconds, weights)
    if strength == 0:
        return composed
    return composed.lerp_(base_uncond.to(torch.float32), strength)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, e = ẽ(∅) + s·(ẽ(c) − ẽ(∅)); tensors of one shape, s the CFG scale."""
    return uncond + scale * (cond - uncond)
