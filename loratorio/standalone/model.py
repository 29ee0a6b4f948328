"""A model that commands and page work with: what they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError

if TYPE_CHECKING:
    from PIL import Image

    from .checkpoint import Checkpoint
    from .generate import Outcome, Request

TOYBOX_CFG = 2.0


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint with its LoRA folder, and what fits it.

    Attributes:
        cfg: guidance scale. size: side of a picture in pixels.
    """

    checkpoint: Checkpoint
    lora_dir: Path | None
    cfg: float
    size: int

    @classmethod
    def load(
        cls,
        checkpoint: Path | None = None,
        lora_dir: Path | None = None,
        config: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> LoadedModel:
        """The checkpoint in that file or folder; None: the toybox, with its LoRAs unless `lora_dir` names others.

        Raises:
            LoratorioError: anything that cannot be used, or is not there.
        """
        from .checkpoint import load_checkpoint

        device = _device(device)
        cfg = 7.0
        if checkpoint is None:
            checkpoint, toybox_loras = _toybox()
            lora_dir, cfg = lora_dir or toybox_loras, TOYBOX_CFG
            _use_one_thread()
        loaded = load_checkpoint(checkpoint, config, device, _dtype(dtype, device))
        return cls(loaded, lora_dir, cfg, loaded.native_size)

    def run(self, request: Request, label: str = "") -> Outcome:
        """`generate` with a progress bar on stderr."""
        from tqdm import tqdm

        from .generate import generate

        bars: list[Any] = []  # only once sampling begins, so that what is wrong with the input stands alone

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(
                    tqdm(total=total, desc=label or None, unit="step", leave=False, dynamic_ncols=True)
                )
            bars[0].update(done - bars[0].n)

        try:
            return generate(self.checkpoint, self.lora_dir, request, progress)
        finally:
            for bar in bars:
                bar.close()


def weight_maps(outcome: Outcome, image: int) -> list[Image.Image]:
    """Pictures of where each LoRA was used: first all in one, then, if asked for, each; none if none were recorded."""
    from ..maps import render

    if not outcome.history.weights:
        return []
    weights = [step[:, image] for step in outcome.history.weights]
    single = outcome.request.settings.single_maps
    return render(weights, outcome.composed, outcome.images[image], outcome.history.steps, single)


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


def _toybox() -> tuple[Path, Path]:
    """The toybox's checkpoint and LoRA folder."""
    from .. import toybox

    if not toybox.CHECKPOINT.exists():
        raise LoratorioError(
            "The toybox is missing from this installation: give --checkpoint and --lora-dir."
        )
    return toybox.CHECKPOINT, toybox.LORA_DIR


def _use_one_thread() -> None:
    """For a model as small as the toybox more threads gain nothing, and where other programs want the processors they cost four times as
    long: the threads of each small product wait for one another."""
    import torch

    torch.set_num_threads(1)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise LoratorioError(f"device must be auto, cpu, cuda or mps, not {name!r}.")
    if not there[kind]:
        raise LoratorioError(f"This machine, or its torch, has no {kind}: use --device cpu.")
    return name


def _dtype(name: str, device: str) -> Any:
    import torch

    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if name == "auto":
        return torch.float16 if device.startswith("cuda") else torch.float32
    if name not in known:
        raise LoratorioError(f"dtype must be auto, fp32, fp16 or bf16, not {name!r}.")
    return known[name]
