"""A first prompt for the toybox."""

from __future__ import annotations

LORAS = ("cat", "cactus", "night")
"""A character, an object and a background."""

TEXT = "mimsy, kakto on the right, lunara background"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
