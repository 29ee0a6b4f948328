"""A first prompt for the toybox."""

from __future__ import annotations

LORAS = ("cat", "cactus", "rays")
"""A character, an object and a background."""

TEXT = "mimsy, kakto on the right, rayza background"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


PAIR = {"cat": "mimsy", "alien": "glorp"}
"""Two characters, for a place each, and the words that call them."""


def pair_prompt(place: str = "") -> str:
    """The text and tags of two characters. place: what stands behind `at=` in both tags; nothing: they have no places."""
    tags = (f"<lora:{name}{f':at={place}' if place else ''}:1>" for name in PAIR)
    return f"{', '.join(PAIR.values())}, sky background {' '.join(tags)}"


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
