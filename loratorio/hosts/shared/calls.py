"""A step's rows in as many calls of the WebUI's model as its own rules take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.bank import Bank


@dataclass(frozen=True)
class ModelCall:
    """One call of the WebUI's model on some of a step's rows: their numbers, and what gives their predictions in that order."""

    numbers: tuple[int, ...]
    run: Callable[[], Tensor]


def predicted_by(calls: Sequence[ModelCall], bank: Bank) -> Tensor:
    """The predictions of all rows, (rows, …) in their order. `bank` is routed for all of them."""
    if len(calls) == 1:
        return calls[0].run()
    predicted: dict[int, Tensor] = {}
    for call in calls:
        with bank.routed_part(call.numbers):
            predicted.update(zip(call.numbers, call.run(), strict=True))
    return torch.stack([predicted[number] for number in sorted(predicted)])
