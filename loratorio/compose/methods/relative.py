"""LoRAtorio's weights by where in the picture a LoRA diverges more than it does elsewhere."""

from __future__ import annotations

from typing import ClassVar

from .base import Entry
from .divergence import Divergence


class Relative(Divergence):
    """As LoRAtorio, with Ω ∝ √D·(D / D̄)^1.5, D = 1 − S and D̄ its mean over the picture, in place of SoftMin.

    Not in the paper (arXiv 2508.11624), which all else is from. `loratorio.compose.weights.relative_divergence` has the formula.
    """

    entry = Entry(
        "relative",
        "LoRAtorio, relative",
        "after arXiv 2508.11624",
        "As LoRAtorio, but what counts in a patch is how far a LoRA diverges there beside the rest of the picture.",
    )
    relative: ClassVar[bool] = True


METHOD = Relative()
