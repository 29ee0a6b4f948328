"""A backend without a model: coloured noise for pictures, and LoRAtorio finds everything. Each call leaves a line in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loratorio_lab.bench.plan import Cell


class FakeBackend:
    def __init__(self) -> None:
        self._cell: Cell | None = None

    def generate(self, cell: Cell) -> tuple[list[NDArray[np.uint8]], int]:
        self._cell = cell
        log = os.environ.get("FAKE_BACKEND_LOG")
        if log:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()} {cell.key}\n")
        time.sleep(float(os.environ.get("FAKE_BACKEND_SECONDS", "0")))
        die = os.environ.get("FAKE_BACKEND_DIE")
        if die and not Path(die).exists():
            with suppress(FileExistsError):  # two workers may come here at once: one dies
                with Path(die).open("x") as file:
                    file.write(str(os.getpid()))
                os._exit(1)  # like a worker that is killed in the middle of a cell
        rng = np.random.default_rng(len(cell.elements))
        return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(cell.count)], 40 * cell.count

    def classify(
        self, pictures: Sequence[NDArray[np.uint8]], cell: Cell | None = None
    ) -> list[tuple[tuple[str, ...], NDArray[np.float32]]]:
        assert self._cell is not None
        good = self._cell.made == "truth" or self._cell.knobs.get("method") == "loratorio"
        found = self._cell.elements if good else self._cell.elements[:1]
        features = np.random.default_rng(0).normal(size=(len(pictures), 4)).astype(np.float32)
        return [(found, feature) for feature in features]


def make() -> FakeBackend:
    return FakeBackend()
