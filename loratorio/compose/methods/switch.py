"""LoRA-Switch (arXiv 2402.16843)."""

from __future__ import annotations

from ..mixes import Mix
from .base import Entry, StepContext
from .merge import OneMix


class Switch(OneMix):
    """LoRA-Switch: one LoRA at a time, the next one every five steps.

    Taken from the paper: the rule and its interval for ordinary pictures (τ = 5). Left open there: what unconditional
    score goes with it; here the same LoRA's.
    """

    steps_per_lora = 5

    def mix(self, now: StepContext) -> Mix:
        mixes = now.participants.mixes
        return mixes[now.index // self.steps_per_lora % len(mixes)]


SWITCH = Switch(Entry("switch", "Switch", "arXiv 2402.16843", "One LoRA at a time, five steps each."))
