"""Which LoRAs are styles: by where they diverge.

A style diverges evenly over the whole picture, or where another LoRA does, but more evenly than that one, or gives the whole picture other
colours. A background diverges where the others do not, and two figures diverge equally unevenly.

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

EVENNESS = 0.9
"""A style's coefficient of variation of D is at most this part of that of a LoRA which diverges in the same places. Found by measurement
(docs/lab/METHODS.md), as are the others."""

UNEVEN = 1.25
"""No style has a larger one."""

EVEN = 0.7
"""A LoRA with a smaller one is a style wherever the others diverge."""

UNIFORM = 0.5
"""A LoRA is a style if at least this part of its change is the same everywhere."""


def uniform_part(change: Tensor) -> Tensor:
    """The part of a change's energy that is the same at all pixels, (…, C, H, W) to (…), from 0 to 1; 0 of no change."""
    energy = change.square().sum(dim=(-3, -2, -1))
    same = change.mean(dim=(-2, -1)).square().sum(dim=-1) * (change.shape[-2] * change.shape[-1])
    return torch.where(energy > 0, same / energy.clamp_min(1e-30), 0.0)


def are_styles(divergence: Tensor, uniform: Tensor) -> list[bool]:
    """Which of N LoRAs are styles. The one that diverges least evenly never is.

    Args:
        divergence: D = 1 − S of each LoRA, (N, B, h, w), from 0. The images of a batch decide together, by their mean.
        uniform: `uniform_part` of what each LoRA changes, (N, B).
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
    styles[most] |= uneven[most] < EVEN
    styles |= uniform.mean(dim=1) >= UNIFORM
    # Where all are as even, none is a style for the others.
    styles &= uneven < EVENNESS * uneven.max()
    return [bool(each) for each in styles]
