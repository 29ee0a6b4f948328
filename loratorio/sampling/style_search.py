"""Which LoRAs are styles, found at a sampling's first step."""

from __future__ import annotations

import torch

from ..compose.methods import Predictions, StepContext
from ..compose.mixes import Branch, ComposedLora, Participants
from ..compose.patches import patch_divergence
from ..compose.styles import are_styles, uniform_part

PATCH = 2
"""The side of a patch, in latent pixels."""


class StyleSearch:
    """Finds the LoRAs that act from the second step on as those with role=style do.

    Args:
        sought: whether there is anything to find.
        found: numbers of those found in a pass before; None: not known.

    Attributes:
        found: numbers of the LoRAs that were found to be styles; None while they are sought.
    """

    def __init__(self, participants: Participants, sought: bool, found: frozenset[int] | None = None) -> None:
        is_sought = sought and any(lora.may_be_style for lora in participants.loras)
        self.found: frozenset[int] | None = found if is_sought else frozenset()

    @property
    def numbers(self) -> frozenset[int]:
        """Those that were found, none while they are sought."""
        return self.found or frozenset()

    def settles_at(self, now: StepContext) -> bool:
        """Whether styles are found at this step."""
        return self.found is None and "find_styles" in now.knobs and len(_compared(now.participants)) > 1

    def branches(self, now: StepContext) -> list[Branch]:
        """The rows that `settle` looks at."""
        mixes = (lora.mix for lora in _compared(now.participants))
        return [Branch(mix, True) for mix in (now.participants.reference, *mixes)]

    def possible(self, participants: Participants) -> list[Participants]:
        """The participants if one of them is found to be a style."""
        return [participants.with_styles({lora.number}) for lora in participants.loras if lora.may_be_style]

    def settle(self, now: StepContext, predictions: Predictions) -> None:
        """Find the styles in a step's predictions. Waits for the device."""
        loras = _compared(now.participants)
        base = predictions.noise(now.participants.reference)
        noise = torch.stack([predictions.noise(lora.mix) for lora in loras])
        divergence = patch_divergence(base, noise, PATCH).to("cpu", torch.float64)
        change = noise.to(torch.float32) - base.to(torch.float32)
        styles = are_styles(divergence, uniform_part(change).to("cpu", torch.float64))
        self.found = frozenset(
            lora.number
            for lora, is_style in zip(loras, styles, strict=True)
            if is_style and lora.may_be_style
        )


def _compared(participants: Participants) -> list[ComposedLora]:
    return [lora for lora in participants.loras if not lora.pooled]
