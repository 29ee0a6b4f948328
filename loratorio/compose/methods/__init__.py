"""Ways to compose LoRAs, a file each: which model rows a step needs, and how one prediction is made of them.

Importing this does not import torch: a page and ``--help`` list the methods and compute nothing.
"""

from __future__ import annotations

from .base import Composition, Entry, Method, Predictions, StepContext, Weights
from .cmlora import CMLORA
from .composite import BY_IMPORTANCE as W_COMPOSITE
from .composite import PLAIN as COMPOSITE
from .frequency import FREQUENCY
from .klora import KLORA
from .lego import LEGO
from .loratorio import DIVERGENCE, PUBLISHED, RELATIVE
from .merge import MERGE
from .switch import SWITCH

METHODS: dict[str, Method] = {
    method.entry.name: method
    for method in (
        RELATIVE,
        PUBLISHED,
        DIVERGENCE,
        MERGE,
        COMPOSITE,
        SWITCH,
        CMLORA,
        KLORA,
        LEGO,
        FREQUENCY,
        W_COMPOSITE,
    )
}
"""Every way to compose, by its name, in the order in which a user sees them."""

FOR_PICTURES = ("relative", "loratorio", "divergence", "merge")
"""The methods that a WebUI's panel lists. The others are there to compare with."""

__all__ = [
    "FOR_PICTURES",
    "METHODS",
    "Composition",
    "Entry",
    "Method",
    "Predictions",
    "StepContext",
    "Weights",
]
