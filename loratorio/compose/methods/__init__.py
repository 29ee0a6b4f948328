"""Ways to compose LoRAs, a file each: which model rows a step needs, and how one prediction is made of them.

Importing this imports no torch: a page and ``--help`` list the methods, and compute nothing.
"""

from __future__ import annotations

from importlib import import_module

from .base import Changes, Composition, Entry, Method, Predictions, Product, StepContext

_NAMES = (
    "relative",
    "loratorio",
    "divergence",
    "merge",
    "composite",
    "switch",
    "cmlora",
    "klora",
    "lego",
    "frequency",
    "w_composite",
    "merge_anchored",
    "composite_anchored",
)

METHODS: dict[str, Method] = {name: import_module(f".{name}", __name__).METHOD for name in _NAMES}
"""Every way to compose, by its file's name, in the order in which a user sees them."""

FOR_PICTURES = ("relative", "loratorio", "divergence", "merge")
"""What a WebUI's panel lists. The others are there to compare with."""

__all__ = [
    "FOR_PICTURES",
    "METHODS",
    "Changes",
    "Composition",
    "Entry",
    "Method",
    "Predictions",
    "Product",
    "StepContext",
]
