"""A toy, by docs/ARCHITECTURE.md: at every pixel the LoRA whose prediction is furthest from 0, softened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch
from .base import Entry, Predictions, StepContext
from .loratorio import Loratorio

if TYPE_CHECKING:
    from torch import Tensor


class Brightest(Loratorio):
    def __init__(self) -> None:
        self.entry = Entry(
            "brightest", "Brightest", "a toy", "Gives each place to the LoRA that predicts the most there."
        )
        self.knobs = ("sharpness", "yielding")

    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        size = torch.stack([predictions.noise(mix).float().norm(dim=1) for mix in now.participants.mixes])
        shares = torch.softmax(size * now.knobs["sharpness"], dim=0)
        return shares if now.masks is None else shares * now.masks.own.unsqueeze(1) * now.masks.coverage


BRIGHTEST = Brightest()
