"""LoRA files without trigger words."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def without_metadata(loras: Path, into: Path) -> Path:
    """Copies of a folder's LoRAs without their metadata, unless they exist; returns `into`."""
    for file in loras.glob("*.safetensors"):
        if not (into / file.name).exists():
            save_file(load_file(file), into / file.name)
    return into
