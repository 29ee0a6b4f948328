"""Ways to compose LoRAs. A method says which model rows a step needs and makes one prediction of them.

One file per family; `METHODS` is the registry that every surface shows.
"""

from __future__ import annotations

from .anchored import AnchoredComposite, AnchoredMerge
from .base import (
    Branch,
    Cast,
    Change,
    Changes,
    Composition,
    LayeredMix,
    Method,
    Mix,
    Predictions,
    Situation,
    Tuning,
    both,
)
from .cmlora import CMLoRA
from .composite import Composite, WComposite
from .frequency import Frequency
from .klora import KLoRA
from .loratorio import Loratorio
from .single import Chosen, Merge, Switch

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Loratorio(),
        Merge(),
        Composite(),
        Switch(),
        CMLoRA(),
        KLoRA(),
        Frequency(),
        WComposite(),
        AnchoredMerge(),
        AnchoredComposite(),
    )
}
"""Every way to compose, by name, in the catalogue's order."""

__all__ = [
    "METHODS",
    "Branch",
    "Cast",
    "Change",
    "Changes",
    "Chosen",
    "Composition",
    "LayeredMix",
    "Method",
    "Mix",
    "Predictions",
    "Situation",
    "Tuning",
    "both",
]
