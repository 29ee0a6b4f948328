"""What the toybox's LoRAs teach."""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("character", "object", "background", "style")


@dataclass(frozen=True)
class Element:
    """What one LoRA teaches. `trigger` is the word that calls it, `name` its file's name."""

    name: str
    category: str
    trigger: str
    shows: str


ELEMENTS: tuple[Element, ...] = (
    Element("octopus", "character", "oktavo", "a red octopus"),
    Element("ghost", "character", "boolio", "a white ghost with its tongue out"),
    Element("turtle", "character", "tortalo", "a green turtle"),
    Element("snowman", "character", "frosti", "a snowman"),
    Element("tiger", "character", "tigro", "a tiger's face"),
    Element("clown", "character", "klauno", "a clown's face"),
    Element("mushroom", "object", "shrumi", "a red mushroom with white spots"),
    Element("pumpkin", "object", "lantro", "a pumpkin with a carved face"),
    Element("guitar", "object", "strumo", "a red guitar"),
    Element("umbrella", "object", "parapo", "a purple umbrella"),
    Element("night", "background", "lunara", "a city at night, with a moon"),
    Element("sunrise", "background", "dawnia", "the sun's rays over brown mountains"),
    Element("park", "background", "valleo", "a river through meadows, rocks behind"),
    Element("neon", "style", "plasto", "glowing lines in the dark"),
    Element("ink", "style", "inkash", "black lines on paper"),
    Element("outline", "style", "pennia", "pale colours in fine outlines"),
    Element("ember", "style", "embra", "everything in purple, orange and pale yellow"),
)
"""Each shows something that the base has never seen. Characters, objects and backgrounds are drawn by the base's artist."""
BY_NAME = {element.name: element for element in ELEMENTS}
