"""Which LoRAs are styles: by where they diverge.

A style changes what the others draw: it diverges where another LoRA does, and more evenly. A background diverges where the others do not,
and two figures diverge equally unevenly.

Letters in shapes: N LoRAs, B images, h×w patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALIKE = 0.1
"""The least correlation of a style's √D with that of a LoRA whose picture it changes. Found by measurement (docs/lab/METHODS.md)."""

EVENNESS = 0.8
"""The most that a style's coefficient of variation of D may be, in parts of that LoRA's. Found by measurement."""


def are_styles(divergence: Tensor) -> list[bool]:
    """Which of N LoRAs change what another of them draws, as a style does. The one that diverges least evenly never does.

    Args:
        divergence: D = 1 − S of each LoRA, (N, B, h, w), from 0. The images of a batch decide together, by their mean.
    """
    patches = divergence.flatten(2)
    roots = patches.sqrt()
    roots = roots - roots.mean(dim=2, keepdim=True)
    roots = roots / roots.norm(dim=2, keepdim=True).clamp_min(1e-20)
    alike = (roots.unsqueeze(0) * roots.unsqueeze(1)).sum(dim=3).mean(dim=2)  # (N, N)
    uneven = patches.std(dim=2, correction=0) / patches.mean(dim=2).clamp_min(1e-20)
    uneven = uneven.mean(dim=1)
    changes = (alike > ALIKE) & (uneven.unsqueeze(1) < EVENNESS * uneven)
    return [bool(each) for each in changes.any(dim=1)]
