"""Which LoRAs are styles, found at a sampling's first step, and how they act then."""

from __future__ import annotations

import torch

from ..compose.methods import Predictions, StepContext
from ..compose.mixes import Branch, ComposedLora, Participants
from ..compose.patches import patch_divergence
from ..compose.styles import are_styles

PATCH = 2
"""The side of a patch, in latent pixels."""


class StyleSearch:
    """The styles among the LoRAs: those with role=style, and those that are found.

    Args:
        begin: the part of the steps after which styles act.
        sought: whether styles are found too.
        found: numbers of those found in a pass before; None: not known.

    Attributes:
        found: numbers of the LoRAs that were found to be styles; None while they are sought.
    """

    def __init__(
        self, participants: Participants, begin: float, sought: bool, found: frozenset[int] | None = None
    ) -> None:
        is_sought = sought and any(map(_may_be_style, participants.loras))
        self.found: frozenset[int] | None = found if is_sought else frozenset()
        self._begin = begin

    def settles_at(self, now: StepContext) -> bool:
        """Whether styles are found at this step."""
        return self.found is None and "find_styles" in now.knobs and len(_compared(now.participants)) > 1

    def branches(self, now: StepContext) -> list[Branch]:
        """The rows that `settle` looks at."""
        mixes = (lora.mix for lora in _compared(now.participants))
        return [Branch(mix, True) for mix in (now.participants.reference, *mixes)]

    def settle(self, now: StepContext, predictions: Predictions) -> bool:
        """Find the styles in a step's predictions. Waits for the device, once. Returns whether there are any."""
        loras = _compared(now.participants)
        base = predictions.noise(now.participants.reference)
        noise = torch.stack([predictions.noise(lora.mix) for lora in loras])
        styles = are_styles(patch_divergence(base, noise, PATCH).to("cpu", torch.float64))
        self.found = frozenset(
            lora.number
            for lora, is_style in zip(loras, styles, strict=True)
            if is_style and _may_be_style(lora)
        )
        return bool(self.found)

    def acting(self, participants: Participants, index: int, total: int) -> Participants:
        """The participants at step `index` of `total`: styles are left out until they act in the others' passes."""
        acting = participants.with_styles(self.found or ())
        styles = {lora.number for lora in acting.loras if lora.is_unweighed}
        is_early = index < self._begin * total and len(styles) < len(acting.loras)
        return acting.without(styles) if is_early else acting


def _compared(participants: Participants) -> list[ComposedLora]:
    return [lora for lora in participants.loras if not lora.pooled]


def _may_be_style(lora: ComposedLora) -> bool:
    return not lora.is_private and not lora.style
