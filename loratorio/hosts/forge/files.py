"""LoRA files that were read, kept for the next job."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]
"""By name, those of a file."""

KEPT = 2**29
"""Bytes of main memory that files may take between jobs: three LoRAs of rank 32 for SDXL. What does not fit is read again."""


class Files:
    """The files that were used last, as long as they are unchanged on disk."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._kept: dict[str, tuple[tuple[int, int], Tensors]] = {}

    def of(self, path: str, written: tuple[int, int], read: Callable[[str], Tensors]) -> Tensors:
        """The tensors of a file, read unless they are known. written: its time of modification and size; zeros if unknown."""
        known = self._kept.pop(path, None)
        tensors = known[1] if known is not None and known[0] == written else read(path)
        if any(written):
            self._kept[path] = written, tensors
            while sum(_bytes(kept) for _, kept in self._kept.values()) > self._most:
                del self._kept[next(iter(self._kept))]
        return tensors

    def forget(self) -> None:
        """Free all of them."""
        self._kept.clear()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, Tensor))


FILES = Files()
