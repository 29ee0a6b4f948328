"""Where a cell's pictures are made and judged: the toybox on the standalone host, and its classifier."""

from __future__ import annotations

import argparse
import importlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loratorio.errors import LoratorioError
from loratorio_lab.chosen_toybox import ChosenToybox, chosen_toybox

from . import beside, measures
from .plan import Cell
from .store import ImageResult, Result

Pixels = NDArray[np.uint8]


class Backend(Protocol):
    """What a worker needs; made once per process."""

    def generate(self, cell: Cell) -> tuple[list[Pixels], int]:
        """A cell's pictures, (H, W, 3) each, one per seed, and how many model rows were run for them."""
        ...

    def classify(
        self, pictures: Sequence[Pixels], cell: Cell | None = None
    ) -> list[tuple[tuple[str, ...], NDArray[np.float32]]]:
        """Per picture the elements that are found in it, and the features (D,)."""
        ...


def make_backend(path: str) -> Backend:
    """The backend that ``module:function`` makes, of text after ``|`` if there is any: a name, so that a worker on another machine can
    make its own."""
    path, *given = path.split("|")
    module, _, name = path.partition(":")
    maker: Callable[..., Backend] = getattr(importlib.import_module(module), name)
    return maker(*given)


def do_cell(backend: Backend, cell: Cell) -> Result:
    """Make and judge one cell."""
    # Of the processor, not of the clock: on a shared machine only that compares.
    since = time.process_time()
    pictures, rows = backend.generate(cell)
    seconds = time.process_time() - since
    period = 8 * int(cell.knobs.get("patch_size", default_patch_size()))
    images = tuple(
        ImageResult(
            cell.seed + i,
            found,
            measures.border_ratio(picture, period),
            measures.saturation(picture),
            measures.clipped(picture),
            tuple(round(float(value), 5) for value in features),
        )
        for i, (picture, (found, features)) in enumerate(
            zip(pictures, backend.classify(pictures, cell), strict=True)
        )
    )
    return Result(cell, images, seconds, rows)


def default_patch_size() -> int:
    from loratorio.settings import Settings

    return Settings().patch_size


class ToyboxBackend:
    """A toybox: its world, model, LoRAs and classifier."""

    def __init__(self, toybox: ChosenToybox) -> None:
        from loratorio.standalone.checkpoint import load_checkpoint
        from loratorio_lab.toybox import classifier

        judge = classifier.classifier_file(toybox.folder)
        missing = [file for file in (toybox.checkpoint, toybox.loras, judge) if not file.exists()]
        if missing:
            raise LoratorioError(f"The toybox is not whole: {missing[0]} is missing.")
        self._world, self._loras, self._size = toybox.world, toybox.loras, toybox.world.pixels
        self._of = {element.name: element for element in self._world.elements}
        self._classify = classifier
        self._unlabelled = tempfile.TemporaryDirectory(prefix="loratorio-bench-")
        self._checkpoint = load_checkpoint(toybox.checkpoint)
        # A processor does convolutions a fifth faster so; the numbers are the same.
        self._checkpoint.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._known: dict[tuple[Any, ...], Any] = {}
        self._classifier = classifier.load_classifier(judge)

    def prompt(self, cell: Cell) -> str:
        """The caption of a scene with these elements, and the tags."""
        if cell.beside:
            return beside.prompt(cell, self._world)
        # The same scene for every variant and seed of a combination.
        rng = random.Random("+".join(cell.elements))
        scene = self._world.random_scene(rng, *cell.elements, width=self._size)
        caption = self._world.caption(scene)
        if cell.pool:
            return f"{caption} <pool:*>"
        tags = [f"<lora:{name}{self._role(name, cell)}>" for name in cell.elements]
        return f"{caption} {' '.join(tags)}"

    def _role(self, name: str, cell: Cell) -> str:
        style = self._of[name].category == "style"
        return f":role={cell.role}" if style and cell.role else ""

    def generate(self, cell: Cell) -> tuple[list[Pixels], int]:
        if cell.made == "truth":
            rng = random.Random(f"truth {'+'.join(cell.elements)} {cell.seed}")
            if cell.beside:
                scenes = [self._world.random_beside(rng, *cell.elements) for _ in range(cell.count)]
            else:
                drawn = partial(self._world.random_scene, width=self._size)
                scenes = [drawn(rng, *cell.elements) for _ in range(cell.count)]
            return [self._world.render(scene) for scene in scenes], 0
        from loratorio.settings import KNOB_BY_NAME, Settings
        from loratorio.standalone.generate import Request, generate
        from loratorio_lab.toybox.unlabelled import without_metadata

        settings = Settings(enabled=True).with_values(
            {k: v for k, v in cell.knobs.items() if k in KNOB_BY_NAME}
        )
        sampling = {k: v for k, v in cell.knobs.items() if k not in KNOB_BY_NAME}
        request = Request(
            self.prompt(cell),
            settings=settings,
            seed=cell.seed,
            batch=cell.count,
            width=beside.width(cell, self._world) if cell.beside else self._size,
            height=self._size,
            **sampling,
        )
        rows = RowCount(self._checkpoint.unet)
        with rows:
            folder = self._loras
            if cell.unlabelled:
                folder = without_metadata(folder, Path(self._unlabelled.name))
            outcome = generate(self._checkpoint, folder, request, progress=False, load=self._load)
        return [np.asarray(image) for image in outcome.images], rows.count

    def _load(self, file: Path, name: str, *given: Any) -> Any:
        """`load_lora`, every file once: there are few, and thousands of cells."""
        from loratorio.standalone.lora_files import load_lora

        key = (file, name, *given[1:])
        if key not in self._known:
            self._known[key] = load_lora(file, name, *given)
        return self._known[key]

    def classify(
        self, pictures: Sequence[Pixels], cell: Cell | None = None
    ) -> list[tuple[tuple[str, ...], NDArray[np.float32]]]:
        array = np.stack(list(pictures))
        if cell is not None and cell.beside:
            split = np.split(array, beside.parts(cell, self._world), axis=2)
            judged = zip(*(self.classify(list(part)) for part in split), strict=True)
            return [
                (beside.found_in([names for names, _ in parts]), np.mean([own for _, own in parts], axis=0))
                for parts in judged
            ]
        found = self._classify.classify(array, self._classifier)
        features = self._classify.features(array, self._classifier)
        # The classifier knows what the base draws, too.
        names = [
            tuple(sorted(name for name, there in each.items() if there and name in self._of))
            for each in found
        ]
        return list(zip(names, features, strict=True))


class RowCount:
    """Counts the rows that go through a model while it is entered."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.count = 0

    def __enter__(self) -> None:
        def count(module: Any, args: tuple[Any, ...]) -> None:
            self.count += len(args[0])

        self._handle = self._model.register_forward_pre_hook(count)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def backend_of(art: str, folder: str, unregularised: str) -> Backend:
    """The backend of a toybox, by text alone (`named`)."""
    return ToyboxBackend(chosen_toybox(Path(art) if art else None, Path(folder), unregularised == "True"))


def named(options: argparse.Namespace) -> str:
    """What `make_backend` makes the toybox of, which these options name (`chosen_toybox.add_toybox`)."""
    given = (options.art or "", options.toybox, options.unregularised)
    return "|".join([f"{__name__}:{backend_of.__name__}", *map(str, given)])
