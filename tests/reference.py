"""The paper's formulas (arXiv 2508.11624), read literally and slowly: float64, one patch after the other."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def spatial_weights(
    base: Tensor,
    adapters: Tensor,
    patch_size: int,
    temperature: float | None,
    top_k: int = 0,
    relative: bool = False,
) -> Array:
    """Ω↑, (N, B, H, W), of base (B, C, H, W), adapters (N, B, C, H, W). Without a temperature Ω ∝ D = 1 − S; `relative`: √D·(D / D̄)^1.5."""
    e0, ei = base.double().numpy(), adapters.double().numpy()
    count, batch, _, height, width = ei.shape
    weights = np.zeros((count, batch, height, width))
    for image in range(batch):
        similarities = {}
        for top in range(0, height, patch_size):
            for left in range(0, width, patch_size):
                # Slices end at the border: a border patch is made of the pixels that are there.
                patch = np.s_[:, top : top + patch_size, left : left + patch_size]
                similarities[top, left] = [
                    cosine(ei[i, image][patch], e0[image][patch]) for i in range(count)
                ]
        means = [sum(1 - each[i] for each in similarities.values()) / len(similarities) for i in range(count)]
        for (top, left), similarity in similarities.items():
            if relative:
                all_shares = relative_shares(similarity, means)
            else:
                all_shares = softmin(similarity, temperature) if temperature else divergence(similarity)
            shares = top_shares(all_shares, top_k)
            for i in range(count):
                weights[i, image, top : top + patch_size, left : left + patch_size] = shares[i]
    return weights


def cosine(a: Array, b: Array) -> float:
    """cos(a, b); two empty patches are equal, an empty one and another have nothing in common."""
    norms = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
    if norms == 0:
        return float(not a.any() and not b.any())
    return float((a * b).sum()) / norms


def softmin(similarity: list[float], temperature: float) -> list[float]:
    smallest = min(similarity)
    powers = [math.exp(-(each - smallest) / temperature) for each in similarity]
    return [power / sum(powers) for power in powers]


def divergence(similarity: list[float]) -> list[float]:
    parts = [1 - each for each in similarity]
    total = sum(parts)
    return [part / total if total else 1 / len(parts) for part in parts]


def relative_shares(similarity: list[float], means: list[float]) -> list[float]:
    parts = []
    for each, mean in zip(similarity, means, strict=True):
        own = 1 - each
        parts.append(math.sqrt(own) * (own / mean) ** 1.5 if own > 0 else 0.0)
    total = sum(parts)
    return [part / total if total else 1 / len(parts) for part in parts]


def top_shares(weights: list[float], top_k: int) -> list[float]:
    if top_k == 0 or top_k >= len(weights):
        return weights
    threshold = sorted(weights, reverse=True)[top_k - 1]
    kept = [weight if weight >= threshold else 0.0 for weight in weights]
    return [weight / sum(kept) for weight in kept]


def compose(adapters: Tensor, weights: Array) -> Array:
    """ẽ = Σᵢ Ω↑[i]·eᵢ, (B, C, H, W)."""
    return sum((w[:, None] * e for w, e in zip(weights, adapters.double().numpy(), strict=True)), np.zeros(1))


def recentre(base_uncond: Tensor, adapter_unconds: Tensor, weights: Array, strength: float) -> Array:
    """ẽ(∅) = λ·e₀(∅) + (1−λ)·Σᵢ Ω↑[i]·eᵢ(∅)."""
    return strength * base_uncond.double().numpy() + (1 - strength) * compose(adapter_unconds, weights)
