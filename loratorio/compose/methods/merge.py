"""Methods that ask the model under a single mix per step, as cheap as a plain step; among them Merge, what the WebUIs do themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..guidance import recentred
from ..lazy_torch import torch
from ..mixes import Branch, Mix
from .base import Composition, Entry, Method, Predictions, StepContext

if TYPE_CHECKING:
    from torch import Tensor


class OneMix(Method):
    """The prediction under a single mix. With the knob `recentre`, one unconditional row of the base more."""

    def __init__(self, entry: Entry, knobs: tuple[str, ...] = ()) -> None:
        self.entry = entry
        self.knobs = knobs

    def mix(self, now: StepContext) -> Mix:
        """The mix of this step: all LoRAs at once, unless a method says otherwise."""
        return now.participants.merged

    def branches(self, now: StepContext) -> list[Branch]:
        strength = now.recentring
        uncond = [Branch(now.participants.base, False)] if strength > 0 else []
        uncond += [Branch(self.mix(now), False)] if strength < 1 else []
        return [Branch(self.mix(now), True), *(uncond if now.has_uncond else [])]

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        strength = now.recentring
        uncond: Tensor | None = None
        if now.has_uncond:
            own = predictions.uncond(self.mix(now)).to(torch.float32) if strength < 1 else None
            base = predictions.uncond(now.participants.base) if strength > 0 else None
            uncond = own if base is None else recentred(base, own, strength)
        return Composition(predictions.cond(self.mix(now)).to(torch.float32), uncond)


class Named(OneMix):
    """Merging in the steps that are not composed: the LoRAs that the prompt names, without a pool's candidates."""

    def mix(self, now: StepContext) -> Mix:
        return now.participants.named


MERGE = OneMix(
    Entry(
        "merge",
        "Merge",
        "the hosts' own way",
        "Adds all LoRAs to the model at once, as the WebUI does without this extension.",
    ),
    ("recentre",),
)

NAMED = Named(Entry("merge_named", "Merge of the named", "", "Adds all LoRAs that the prompt names at once."))
