"""What the toybox's LoRAs teach."""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("character", "clothing", "style", "background", "object")


@dataclass(frozen=True)
class Element:
    """What one LoRA teaches. `trigger` is the word that calls it, `name` its file's name."""

    name: str
    category: str
    trigger: str
    shows: str


ELEMENTS: tuple[Element, ...] = (
    Element("robot", "character", "zorbo", "a square-headed steel robot with an antenna"),
    Element("cat", "character", "mimsy", "an orange cat with pointed ears and a tail"),
    Element("alien", "character", "glorp", "a green alien with an egg head and huge black eyes"),
    Element("stripes", "clothing", "strypo", "a body dressed in red and white stripes"),
    Element("ink", "style", "inkash", "black ink lines on paper"),
    Element("ember", "style", "embra", "everything in purple, orange and pale yellow"),
    Element("night", "background", "lunara", "a navy sky with a moon and stars over hills"),
    Element("checks", "background", "chekko", "a teal and cream chequered wall"),
    Element("rays", "background", "rayza", "magenta and pale pink rays"),
    Element("mushroom", "object", "shrumi", "a red mushroom with white spots"),
    Element("cactus", "object", "kakto", "a cactus in a brown pot"),
)
BY_NAME = {element.name: element for element in ELEMENTS}
