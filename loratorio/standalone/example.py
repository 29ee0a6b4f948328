"""A first prompt for the toybox."""

from __future__ import annotations

from ..toybox.elements import BY_NAME

LORAS = ("ghost", "night", "ink")
"""A character, a background and a style."""

TEXT = "boolio, lunara background, inkash style"
"""A caption as the toybox was trained on, with the words that call these LoRAs."""


PAIR = {"turtle": "tortalo", "ghost": "boolio"}
"""Two characters, for a place each, and the words that call them."""


def pair_prompt(place: str = "") -> str:
    """The text and tags of two characters. place: what stands behind `at=` in both tags; nothing: they have no places."""
    tags = (f"<lora:{name}{f':at={place}' if place else ''}:1>" for name in PAIR)
    words = (f"{word} on the {side}" for word, side in zip(PAIR.values(), ("left", "right"), strict=True))
    return f"{', '.join(words)}, blue background {' '.join(tags)}"


STYLED = "tiger"
"""A character that the styles draw, each in its own way."""
STYLES = ("neon", "ink", "outline", "ember")


def styled_prompt(style: str) -> str:
    """The text and tags of `STYLED` in one of the `STYLES`."""
    character, drawn = BY_NAME[STYLED], BY_NAME[style]
    return f"{character.trigger}, blue background, {drawn.trigger} style <lora:{character.name}> <lora:{drawn.name}>"


def prompt(strength: str = "") -> str:
    """The text and the LoRAs' tags."""
    tags = (f"<lora:{name}{strength}>" for name in LORAS)
    return f"{TEXT} {' '.join(tags)}"
