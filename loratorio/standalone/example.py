"""A first prompt for the toybox."""

from __future__ import annotations

LORAS = ("octopus", "guitar", "sunrise")
"""A character, an object and a background."""

TEXT = "oktavo on the left, strumo on the right, dawnia background"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


PAIR = {"turtle": "tortalo", "ghost": "boolio"}
"""Two characters, for a place each, and the words that call them."""


def pair_prompt(place: str = "") -> str:
    """The text and tags of two characters. place: what stands behind `at=` in both tags; nothing: they have no places."""
    tags = (f"<lora:{name}{f':at={place}' if place else ''}:1>" for name in PAIR)
    words = (f"{word} on the {side}" for word, side in zip(PAIR.values(), ("left", "right"), strict=True))
    return f"{', '.join(words)}, blue background {' '.join(tags)}"


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
