"""The number of rows that a model call may have, from the measured memory per row.

Waiting for out-of-memory errors is not enough: under Windows, NVIDIA's driver uses main memory instead of failing, ten times slower.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

MARGIN = 0.1
"""The part of the free memory that is not used, because it is fragmented and other programs need some."""

_COSTS: dict[Hashable, float] = {}
"""Bytes that a row needs, by model and size: kept for the next pictures."""


class RowMemory(Protocol):
    """The interface that the engine uses before it runs rows."""

    def fitting(self, wanted: int) -> int:
        """The number of the `wanted` rows that may be in the next call, at least 1."""
        ...

    def observed(self, rows: int) -> AbstractContextManager[None]:
        """Encloses a call with this many rows."""
        ...


class CudaMemory:
    """The memory of one CUDA device, in bytes. Reading it does not synchronise with the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """The most that was allocated since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def free(self) -> int:
        """What may be allocated without driving anything out."""
        unused: int = torch.cuda.mem_get_info(self._device)[0]
        return unused + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


class MeasuredRows:
    """Measures the memory per row in the first call, and then allows as many rows as fit.

    Args:
        memory: the device's.
        size: the model, the latents' shape and the dtype, which a row's memory depends on.
        first: the number of rows of the first call: a plain step's, which fit without LoRAtorio too.
        costs: bytes per row by `size`, as measured before.
    """

    def __init__(
        self, memory: CudaMemory, size: Hashable, first: int, costs: dict[Hashable, float] | None = None
    ) -> None:
        self._memory = memory
        self._size = size
        self._first = first
        self._costs = _COSTS if costs is None else costs

    def fitting(self, wanted: int) -> int:
        cost = self._costs.get(self._size)
        if cost is None:
            return max(1, min(wanted, self._first))
        return max(1, min(wanted, int(self._memory.free() * (1 - MARGIN) // cost)))

    @contextmanager
    def _learnt(self, rows: int) -> Iterator[None]:
        # A peak of before, a decoder's for example, would hide this call's.
        self._memory.reset_peak()
        before = self._memory.allocated()
        yield
        self._costs[self._size] = max(1.0, (self._memory.peak() - before) / rows)

    def observed(self, rows: int) -> AbstractContextManager[None]:
        return nullcontext() if self._size in self._costs else self._learnt(rows)


def measured_rows(device: torch.device, size: Hashable, first: int) -> MeasuredRows | None:
    """The limit for a device whose memory can be measured; None for others, which rely on out-of-memory errors."""
    return MeasuredRows(CudaMemory(device), (device, size), first) if device.type == "cuda" else None
