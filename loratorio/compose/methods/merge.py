"""Merge: what the WebUIs do without this extension."""

from __future__ import annotations

from ..mixes import Mix
from .base import Entry, StepContext
from .one_mix import OneMix


class Merge(OneMix):
    """W + Σᵢ sᵢ·ΔWᵢ: what the WebUIs do without this extension."""

    entry = Entry(
        "merge",
        "Merge",
        "the hosts' own way",
        "All LoRAs in the model at once, as the WebUI does without this extension.",
    )


class MergeNamed(OneMix):
    """Merge for the steps that are not composed: the LoRAs that the prompt names, without a pool's candidates."""

    entry = Entry(
        "merge_named", "Merge of the named", "the hosts' own way", "All LoRAs that the prompt names at once."
    )

    def mix(self, now: StepContext) -> Mix:
        return now.participants.named


METHOD = Merge()
