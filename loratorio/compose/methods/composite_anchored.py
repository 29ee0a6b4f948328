"""Composite with a re-centred unconditional score."""

from __future__ import annotations

from .base import Entry
from .composite import Composite
from .recentred import Recentred


class RecentredComposite(Recentred):
    """Composite, guided away from the base's unconditional score."""

    entry = Entry(
        "composite_anchored",
        "Composite, re-centred",
        "re-centring after arXiv 2508.11624",
        "The plain mean of what the LoRAs predict, with the base model's unconditional prediction.",
    )
    inner = Composite()
    knobs = ("recentre", "yielding")


METHOD = RecentredComposite()
