"""How many rows a model call may have, by the memory that a row was seen to need.

Running out of memory is no guide everywhere: under Windows NVIDIA's driver goes on in main memory instead of failing, ten times slower.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

MARGIN = 0.1
"""Part of the free memory that is left alone: it is fragmented, and other programs want some."""

_COSTS: dict[Hashable, float] = {}
"""Bytes that a row needs, by model and size: kept for the next pictures."""


class RowMemory(Protocol):
    """What the engine asks before it runs rows."""

    def fitting(self, wanted: int) -> int:
        """How many of `wanted` rows may go into the next call, at least 1."""
        ...

    def observed(self, rows: int) -> AbstractContextManager[None]:
        """Surrounds a call of so many rows."""
        ...


class DeviceMemory(Protocol):
    """A device's memory, in bytes."""

    def allocated(self) -> int: ...

    def peak(self) -> int:
        """The most that was allocated since `reset_peak`."""
        ...

    def reset_peak(self) -> None: ...

    def free(self) -> int:
        """What may be allocated without driving anything out."""
        ...


class CudaMemory:
    """Of one CUDA device. Reading it makes nothing wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def free(self) -> int:
        unused: int = torch.cuda.mem_get_info(self._device)[0]
        return unused + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


class MeasuredRows:
    """Learns a row's cost from the first call, and takes no more rows than fit.

    Args:
        memory: the device's.
        size: what a row's cost depends on: the model, the latents' shape, the dtype.
        first: how many rows the first call has: what a plain step has, which fits as it fits without us.
        costs: bytes a row by `size`, as learnt before.
    """

    def __init__(
        self, memory: DeviceMemory, size: Hashable, first: int, costs: dict[Hashable, float] | None = None
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
    """For a device whose memory can be measured; None for others, where running out of it is the guide."""
    return MeasuredRows(CudaMemory(device), (device, size), first) if device.type == "cuda" else None
