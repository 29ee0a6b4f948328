"""Which LoRAs are styles: by where they diverge.

A style diverges evenly over the whole picture, or where another LoRA does, but more evenly than that one. A background diverges where the
others do not, and two figures diverge equally unevenly.

Letters in shapes: N LoRAs, B images, h×w patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EVENNESS = 0.9
"""A style's coefficient of variation of D is at most this part of that of a LoRA which diverges in the same places. Found by measurement
(docs/lab/METHODS.md), as are the other two."""

UNEVEN = 1.4
"""No style has a larger one."""

EVEN = 0.7
"""A LoRA with a smaller one is a style wherever the others diverge."""


def are_styles(divergence: Tensor) -> list[bool]:
    """Which of N LoRAs are styles. The one that diverges least evenly never is.

    Args:
        divergence: D = 1 − S of each LoRA, (N, B, h, w), from 0. The images of a batch decide together, by their mean.
    """
    patches = divergence.flatten(2)
    roots = patches.sqrt()
    roots = roots - roots.mean(dim=2, keepdim=True)
    roots = roots / roots.norm(dim=2, keepdim=True).clamp_min(1e-20)
    alike = (roots.unsqueeze(0) * roots.unsqueeze(1)).sum(dim=3).mean(dim=2)  # (N, N)
    mean = patches.mean(dim=2)
    # One that changes nothing is no style.
    uneven = torch.where(mean > 0, patches.std(dim=2, correction=0) / mean, torch.inf).mean(dim=1)
    less_uneven = (uneven.unsqueeze(1) < EVENNESS * uneven) & (uneven < UNEVEN).unsqueeze(1)
    styles = ((alike > 0) & less_uneven).any(dim=1)
    # Of those that change all of the picture only the most even one: the others may be backgrounds.
    most = int(uneven.argmin())
    styles[most] |= (uneven[most] < EVEN) & (uneven[most] < EVENNESS * uneven.max())
    return [bool(each) for each in styles]
