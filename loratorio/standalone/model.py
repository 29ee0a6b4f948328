"""The model of the commands and of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import toybox
from ..errors import LoratorioError
from .model_files import check_model

if TYPE_CHECKING:
    from PIL import Image

    from .checkpoint import Checkpoint
    from .generate import Outcome
    from .request import Request


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model and its LoRAs, and its device; checked, not yet read."""

    checkpoint: Path
    lora_dir: Path | None
    config: Path | None
    device: str
    dtype: str

    @classmethod
    def of(
        cls,
        checkpoint: Path | None = None,
        lora_dir: Path | None = None,
        config: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> ModelFiles:
        """The checkpoint in that file or folder; None: the toybox, with its LoRAs unless `lora_dir` names others. Imports no torch.

        Raises:
            LoratorioError: a file is missing, or is unusable as far as that is known without reading it.
        """
        if checkpoint is None:
            if not toybox.CHECKPOINT.exists():
                raise LoratorioError(
                    "The toybox is missing from this installation: give --checkpoint and --lora-dir."
                )
            checkpoint, lora_dir = toybox.CHECKPOINT, lora_dir or toybox.LORA_DIR
        check_model(checkpoint, config, device, dtype)
        return cls(checkpoint, lora_dir, config, device, dtype)

    def load(self) -> LoadedModel:
        """Read it. Raises LoratorioError: damaged, not Stable Diffusion, no such device."""
        from .checkpoint import load_checkpoint

        if self.checkpoint == toybox.CHECKPOINT:
            _use_one_thread()
        return LoadedModel(
            load_checkpoint(self.checkpoint, self.config, self.device, self.dtype), self.lora_dir
        )


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint with its LoRA folder."""

    checkpoint: Checkpoint
    lora_dir: Path | None

    def run(self, request: Request, label: str = "") -> Outcome:
        """`generate` with a progress bar on stderr."""
        from .generate import generate
        from .progress import bar

        with bar(label) as progress:
            return generate(self.checkpoint, self.lora_dir, request, progress)


def weight_maps(outcome: Outcome, image: int) -> list[Image.Image]:
    """Pictures of where each LoRA was used: first all in one, then each if requested. None if no weights were recorded."""
    from ..pictures.maps import render

    if not outcome.history.weights:
        return []
    weights = [step[:, image] for step in outcome.history.weights]
    single = outcome.request.settings.single_maps
    history = outcome.history
    return render(weights, outcome.composed, outcome.images[image], history.steps, single, history.styles)


def map_files(outcome: Outcome, image: int, path: Path) -> dict[Path, bytes]:
    """The weight maps as files: `path`, with ``all`` or a LoRA's name added to its stem."""
    from .output import LONGEST_NAME, file_labels, png

    maps = weight_maps(outcome, image)
    room = LONGEST_NAME - len(path.name.encode("utf-8", "replace"))
    labels = ["all", *file_labels(outcome.composed, room, taken=["all"])]
    return {
        path.with_name(f"{path.stem}{label}{path.suffix}"): png(each)
        for label, each in zip(labels, maps, strict=False)
    }


def _use_one_thread() -> None:
    """A model as small as the toybox does not profit from more threads. If other programs use the processors, it takes four times as
    long with them, because the threads of each small product wait for each other."""
    import torch

    torch.set_num_threads(1)
