"""Which of a pool's candidates a prompt calls, if their files have no trigger words.

Letters in shapes: N LoRAs, Bc conditional and Bu unconditional rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .lazy_torch import torch
from .mixes import Branch, Participants

if TYPE_CHECKING:
    from torch import Tensor

    from .methods.base import Predictions

CALLED = 0.5
"""A candidate is called if its reaction (see `reactions`) is at least this: found by measurement (docs/lab/METHODS.md)."""


def branches_for_reactions(participants: Participants) -> list[Branch]:
    """The rows that `reactions` looks at."""
    mixes = [
        participants.reference,
        *(lora.mix for lora in participants.loras if lora.pooled),
    ]
    return [Branch(mix, cond) for mix in mixes for cond in (True, False)]


def reactions(predictions: Predictions, participants: Participants) -> dict[int, Tensor]:
    """By number of each candidate, how much further it is from the base under the prompt than under the negative one.

    In units of the prompt's own effect on the base's prediction. A LoRA whose trigger words are in the prompt changes more under it; one
    that draws the same for every prompt, or nothing, has about 0, however large its changes are. LoraRetriever (arXiv 2402.09997) has
    the same aim, to choose LoRAs by the prompt, but needs an encoder.

    Returns:
        Scalars, float32: (|e_i − e_0| − |u_i − u_0|) / |e_0 − u_0|, the mean over the conditional rows; e a conditional row, u the
        unconditional row of its image, e_0 and u_0 of what the LoRAs are compared with.
    """
    owners = list(predictions.owners)
    reference = participants.reference
    cond, uncond = (
        predictions.by_branch[Branch(reference, each)].to(torch.float32) for each in (True, False)
    )
    own_part = _norms(cond - torch.stack([uncond[image] for image in owners])).clamp_min(1e-12)
    found = {}
    for lora in participants.loras:
        if lora.pooled:
            mix = lora.mix
            more = _norms(predictions.by_branch[Branch(mix, True)].to(torch.float32) - cond)
            less = _norms(predictions.by_branch[Branch(mix, False)].to(torch.float32) - uncond)
            of_image = torch.stack([less[image] for image in owners])
            found[lora.number] = ((more - of_image) / own_part).mean()
    return found


def _norms(differences: Tensor) -> Tensor:
    """Of each row, (B,)."""
    norms: Tensor = differences.flatten(1).square().sum(dim=1).sqrt()
    return norms


def called(scores: Sequence[float], most: int) -> list[int]:
    """Positions of the candidates that are called: at most `most`, those with the highest scores."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(i for i in ranked[:most] if scores[i] >= CALLED)
