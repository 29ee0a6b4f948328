"""Checks of a model's files before they are read. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import LoratorioError
from .lora_lookup import check_safetensors

LATENT_PIXEL = 8
"""Picture pixels per latent pixel, a side."""

MODEL_INDEX = "model_index.json"
"""In a folder, what says that it is a diffusers model, and of which kind."""

_KNOWN_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_DTYPES = ("auto", "fp32", "fp16", "bf16")


def check_model(path: Path, config: Path | None = None, device: str = "auto", dtype: str = "auto") -> None:
    """Raise LoratorioError for a checkpoint that is not there or no Stable Diffusion, and for names of devices and dtypes that are none."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise LoratorioError(f"The device must be auto, cpu, cuda, cuda:1 or mps, not {device!r}.")
    if dtype not in _DTYPES:
        raise LoratorioError(f"The dtype must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, not {dtype!r}.")
    if not path.exists():
        raise LoratorioError(f"There is no checkpoint {path}: check the path.")
    if config is not None and not config.exists():
        raise LoratorioError(f"There is no model configuration {config}: check the path.")
    if path.is_dir():
        _check_folder(path)
    else:
        check_safetensors(path, f"The checkpoint {path.name}")


def _check_folder(path: Path) -> None:
    index = path / MODEL_INDEX
    if not index.is_file():
        raise LoratorioError(f"{path} is a folder without {MODEL_INDEX}, so it is not a diffusers model.")
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as problem:
        raise LoratorioError(f"{index} is damaged ({problem}): get it again.") from problem
    if kind not in _KNOWN_PIPELINES:
        raise LoratorioError(f"{path} is a {kind}. Only {' and '.join(_KNOWN_PIPELINES)} are supported.")
