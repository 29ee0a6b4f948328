"""The toybox: a tiny Stable Diffusion and seventeen LoRAs, trained from scratch on emojis. See docs/lab/TOYBOX.md."""

from __future__ import annotations

from pathlib import Path

from .elements import ELEMENTS, Element

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "model" / "toybox.safetensors"
CONFIG = FOLDER / "model" / "toybox.yaml"
TEXT_DIR = FOLDER / "model" / "toybox_text"
LORA_DIR = FOLDER / "lora"
THUMBNAIL_DIR = FOLDER / "thumbs"


def lora_file(element: Element) -> Path:
    """Where an element's LoRA lies."""
    return LORA_DIR / f"{element.name}.safetensors"


def thumbnail_file(element: Element) -> Path:
    return THUMBNAIL_DIR / f"{element.name}.png"


__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "ELEMENTS",
    "FOLDER",
    "LORA_DIR",
    "TEXT_DIR",
    "THUMBNAIL_DIR",
    "Element",
    "lora_file",
    "thumbnail_file",
]
