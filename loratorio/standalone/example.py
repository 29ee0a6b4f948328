"""A first prompt for the toybox."""

from __future__ import annotations

LORAS = ("cat", "cactus", "rays")
"""A character, an object and a background."""

TEXT = "mimsy, kakto on the right, rayza background"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


PAIR = {"cat": "mimsy", "alien": "glorp"}
"""Two characters, for a place each, and the words that call them."""

PAIR_TEXT = "sky background"


def pair_prompt(*places: str) -> str:
    """The text and tags of two characters: each with a place and its words there, or both everywhere."""
    if not places:
        tags = (f"<lora:{name}:1>" for name in PAIR)
        return f"{', '.join(PAIR.values())}, {PAIR_TEXT} {' '.join(tags)}"
    placed = zip(PAIR.items(), places, strict=True)
    tags = (f"<lora:{name}:at={place}:words={words}:1>" for (name, words), place in placed)
    return f"{PAIR_TEXT} {' '.join(tags)}"


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
