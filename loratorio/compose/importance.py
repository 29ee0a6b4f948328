"""How much a LoRA's trigger words matter in a prompt (after W-Composite, arXiv 2606.03792)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def importance(prompt: Tensor, without: Sequence[Tensor]) -> list[float]:
    """Cosine distance between a prompt's conditioning and the same prompt's without each LoRA's trigger words.

    Args:
        prompt: conditioning of the whole prompt, (T, D) tokens by features.
        without: per LoRA, conditioning of the prompt without its trigger words, (T′, D); the longer of two is cut.

    Returns:
        One number ≥ 0 per LoRA, with mean 1; all 1 where no words make a difference.
    """
    distances = [_distance(prompt.to(torch.float32), each.to(torch.float32)) for each in without]
    mean = sum(distances) / len(distances) if distances else 0.0
    return [each / mean for each in distances] if mean > 0 else [1.0] * len(distances)


def without_words(prompt: str, words: Sequence[str]) -> str:
    """`prompt` without these trigger words or phrases, whatever their case; left-over commas and blanks tidied up."""
    for word in sorted((word.strip() for word in words), key=len, reverse=True):
        at = prompt.lower().find(word.lower()) if word else -1
        while at >= 0:
            prompt = prompt[:at] + prompt[at + len(word) :]
            at = prompt.lower().find(word.lower())
    parts = (" ".join(part.split()) for part in prompt.split(","))
    return ", ".join(part for part in parts if part)


def _distance(first: Tensor, second: Tensor) -> float:
    length = min(len(first), len(second))
    cosine = torch.nn.functional.cosine_similarity(first[:length].flatten(), second[:length].flatten(), dim=0)
    return max(0.0, 1.0 - float(cosine))
