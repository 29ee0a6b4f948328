"""An example of a method."""

from __future__ import annotations

from ..mixes import Mix
from .base import Entry, StepContext
from .one_mix import OneMix


class FirstOnly(OneMix):
    """The prompt's first LoRA alone."""

    entry = Entry("first_only", "First only", "an example")

    def mix(self, now: StepContext) -> Mix:
        return now.participants.singles[0]


METHOD = FirstOnly()
