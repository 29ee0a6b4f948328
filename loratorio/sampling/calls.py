"""A step's rows in several model calls, each with rows of one kind and as many as limits and memory allow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.bank import Bank, Regrouped
from ..compose.mixes import NO_WORDS, Words
from ..errors import LoratorioError
from .memory import RowMemory


class Row(NamedTuple):
    """One row of a model call.

    Attributes:
        mix: which LoRAs act on it; the host gives it the text conditioning of the same mix.
        cond: whether it is a conditional row.
        slot: its number among the step's conditional rows, or among its unconditional rows.
        words: what it reads other than the common prompt.
    """

    mix: tuple[float, ...]
    cond: bool
    slot: int
    words: Words = NO_WORDS


POOL_ROWS = 8
"""How many rows a model call has at most while a pool's candidates are scored."""


class RowCalls:
    """Runs rows in as few model calls as the limits and the memory allow.

    Attributes:
        limit: how many rows a call may have; 0 for no limit. Halved when memory runs out.
        scores_pool: whether many LoRAs are run only to be scored, which is limited to `POOL_ROWS` per call.
        one_mix: whether each call has rows of one mix only, and of all pictures, so that other extensions may repeat, regroup, add
            or join rows within it. Set by the host, and once a layer's entries are not the call's rows.
        memory: how many rows fit into a call; None if only out-of-memory errors show that.
    """

    def __init__(self, limit: int = 0, scores_pool: bool = False) -> None:
        self.limit = limit
        self.scores_pool = scores_pool
        self.one_mix = False
        self._were_regrouped = False
        self.memory: RowMemory | None = None

    @property
    def _is_apart(self) -> bool:
        return self.one_mix or self._were_regrouped

    def run(self, rows: Sequence[Row], call: Callable[[Sequence[Row]], Tensor]) -> Tensor:
        """The predictions of all rows, (rows, …), in order.

        Raises:
            LoratorioError: not even a single row fits into memory.
        """
        done: list[Tensor] = []
        start = 0
        while start < len(rows):
            part = self._next(rows[start:])
            try:
                predicted = self._predicted(part, call)
            except Regrouped:
                self._were_regrouped = True
                continue
            if predicted is None:
                # Only here, where nothing holds the failed call's tensors any more, can their memory be given back.
                _empty_cache()
                self.limit = len(part) // 2
                continue
            if len(predicted) != len(part):
                raise ValueError(f"the host predicted {len(predicted)} rows where {len(part)} were requested")
            done.append(predicted)
            start += len(part)
        return done[0] if len(done) == 1 else torch.cat(done)

    def _next(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The first of these rows, those of the next call."""
        if self._is_apart:
            rows = [*takewhile(lambda row: row.mix == rows[0].mix, rows)]
        wanted = len(rows)
        most = min(wanted, self.limit or wanted, POOL_ROWS if self.scores_pool else wanted)
        if self.memory is not None:
            most = max(1, min(most, self.memory.fitting(most)))
        return rows[: _first_block(rows) if self._is_apart and most < wanted else most]

    def _predicted(self, rows: Sequence[Row], call: Callable[[Sequence[Row]], Tensor]) -> Tensor | None:
        """These rows in one call; None if there was not enough memory, and there are fewer rows to try."""
        try:
            with nullcontext() if self.memory is None else self.memory.observed(len(rows)):
                return call(rows)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            if len(rows) == (_first_block(rows) if self._is_apart else 1):
                raise LoratorioError(
                    "Out of memory even with as few rows per call as possible. Make the picture or the batch smaller, or close "
                    "other programs that use the GPU."
                ) from problem
            return None


def _first_block(rows: Sequence[Row]) -> int:
    """How many rows all of the step's pictures have of the first row's branch, of rows under one mix."""
    return sum(row.cond == rows[0].cond for row in rows)


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "could not allocate", "alloc_failed")


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether this is the device's, or the CPU allocator's, way to say that memory ran out."""
    if isinstance(problem, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # Allocators other than CUDA's, and CUDA's libraries, raise plain RuntimeErrors.
    text = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


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
