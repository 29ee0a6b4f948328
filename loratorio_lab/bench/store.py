"""Results on disk: one file per cell, written completely or not at all, so that a grid can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .plan import Cell


@dataclass(frozen=True)
class ImageResult:
    """One picture as it was judged.

    Attributes:
        found: every element that the classifier finds, wanted or not.
        edges: mean step over patch borders by mean step elsewhere; 1 is a picture without borders.
        saturation: mean of (max − min)/max of R, G, B, from 0 to 1. clipped: share of values at either end.
        features: of the classifier, for the Fréchet distance.
    """

    seed: int
    found: tuple[str, ...]
    edges: float
    saturation: float
    clipped: float
    features: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """A finished cell. `seconds`: processor time for sampling and decoding all of its pictures."""

    cell: Cell
    images: tuple[ImageResult, ...]
    seconds: float
    model_rows: int = 0


class Store:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"

    def has(self, cell: Cell) -> bool:
        return self.file(cell).is_file()

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if not self.has(cell)]

    def write(self, result: Result) -> None:
        file = self.file(result.cell)
        # Of its own name for each process, in case two write at once; the last move is whole either way.
        temporary = file.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
        os.replace(temporary, file)

    def read(self, cells: Sequence[Cell] | None = None) -> Iterator[Result]:
        """All results, or the existing ones of these cells."""
        files = sorted(self.folder.glob("*.json")) if cells is None else [self.file(cell) for cell in cells]
        for file in files:
            if file.is_file():
                yield _result(json.loads(file.read_text(encoding="utf-8")))


def _result(values: dict[str, Any]) -> Result:
    cell = values["cell"]
    images = tuple(
        ImageResult(**{**image, "found": tuple(image["found"]), "features": tuple(image["features"])})
        for image in values["images"]
    )
    return Result(
        Cell(**{**cell, "elements": tuple(cell["elements"])}), images, values["seconds"], values["model_rows"]
    )
