"""A first prompt for the toybox."""

from __future__ import annotations

LORAS = ("cat", "cactus", "night")
"""A character, an object and a background."""

TEXT = "mimsy, kakto on the right, lunara background"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


PAIR = ("cat", "alien")
"""Two characters, for a place each."""

PAIR_TEXT = "mimsy, glorp, sky background"


def pair_prompt(*places: str) -> str:
    """The text and tags of two characters, each with its place, or everywhere."""
    options = [f":at={place}" for place in places] or [""] * len(PAIR)
    tags = (f"<lora:{name}{option}:1>" for name, option in zip(PAIR, options, strict=True))
    return f"{PAIR_TEXT} {' '.join(tags)}"


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
