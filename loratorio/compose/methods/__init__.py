"""Ways to compose LoRAs, a file each: which model rows a step needs, and how one prediction is made of them.

Importing this imports no torch: a page and ``--help`` list the methods, and compute nothing.
"""

from __future__ import annotations

from .base import Changes, Composition, Entry, Method, Predictions, StepContext
from .cmlora import CMLoRA
from .composite import Composite
from .composite_anchored import RecentredComposite
from .frequency import Frequency
from .klora import KLoRA
from .loratorio import Loratorio
from .merge import Merge, MergeNamed
from .merge_anchored import RecentredMerge
from .switch import Switch
from .w_composite import WComposite

METHODS: dict[str, Method] = {
    method.entry.name: method
    for method in (
        Loratorio(),
        Merge(),
        Composite(),
        Switch(),
        CMLoRA(),
        KLoRA(),
        Frequency(),
        WComposite(),
        RecentredMerge(),
        RecentredComposite(),
    )
}
"""Every way to compose, by name, in the order in which a user sees them."""

__all__ = [
    "METHODS",
    "Changes",
    "Composition",
    "Entry",
    "MergeNamed",
    "Method",
    "Predictions",
    "StepContext",
]
