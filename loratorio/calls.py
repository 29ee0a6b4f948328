"""A step's rows in several calls of the model, where they cannot share one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .adapters.bank import Bank


@dataclass(frozen=True)
class ModelCall:
    """One call of the model on some of a step's rows: their numbers, and what gives their predictions in that order."""

    numbers: tuple[int, ...]
    run: Callable[[], Tensor]


def by_kind(kinds: Sequence[Hashable], run: Callable[[tuple[int, ...]], Tensor]) -> list[ModelCall]:
    """A call for each kind of row. run: the predictions of the rows with these numbers."""
    calls = []
    for kind in dict.fromkeys(kinds):
        numbers = tuple(number for number, each in enumerate(kinds) if each == kind)
        calls.append(ModelCall(numbers, partial(run, numbers)))
    return calls


def predicted_by(calls: Sequence[ModelCall], bank: Bank) -> Tensor:
    """The predictions of all rows, (rows, …) in their order. `bank` is routed for all of them."""
    if len(calls) == 1:
        return calls[0].run()
    predicted: dict[int, Tensor] = {}
    for call in calls:
        with bank.routed_part(call.numbers):
            predicted.update(zip(call.numbers, call.run(), strict=True))
    return torch.stack([predicted[number] for number in sorted(predicted)])
