"""Merge with a re-centred unconditional score."""

from __future__ import annotations

from .base import Entry
from .merge import Merge
from .recentred import Recentred


class RecentredMerge(Recentred):
    """Merge, guided away from the base's unconditional score: one row a picture more than Merge."""

    entry = Entry(
        "merge_anchored",
        "Merge, re-centred",
        "re-centring after arXiv 2508.11624",
        "All LoRAs at once, with the base model's unconditional prediction.",
    )
    inner = Merge()


METHOD = RecentredMerge()
