"""LoRAtorio's weights without a temperature: each LoRA's part of how far they diverge from the base."""

from __future__ import annotations

from .base import Entry
from .loratorio import Loratorio


class Divergence(Loratorio):
    """As LoRAtorio, with Ω ∝ 1 − S in place of SoftMin.

    SoftMin gives a LoRA that says nothing, S = 1, nearly as much as one that says something while S is near 1, as in the first steps:
    beside one with S = 0.99 it has 0.475 at τ = 0.1. Here it has exactly 0. Not in the paper (arXiv 2508.11624), which all else is from.
    """

    entry = Entry(
        "divergence",
        "LoRAtorio by divergence",
        "after arXiv 2508.11624",
        "As LoRAtorio, without a temperature: a LoRA that changes nothing in a patch has no part in it.",
    )
    knobs = tuple(name for name in Loratorio.knobs if name not in ("temperature", "adaptive"))


METHOD = Divergence()
