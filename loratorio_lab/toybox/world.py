"""The toybox's world: what a picture shows, as data, its caption and its picture.

A `Scene` names one choice per ComposLoRA category (character, clothing, style, background, object) and the nuisances (colours,
places, sizes). The base model sees scenes of plain choices only; each LoRA learns one `Element`. Any combination can be drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from loratorio.toybox.elements import BY_NAME, CATEGORIES, ELEMENTS
from loratorio_lab.toybox import drawing
from loratorio_lab.toybox.shapes import Colour, duotone, paint

DOLL_COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "blue": (45, 98, 214),
    "green": (46, 160, 67),
    "yellow": (246, 205, 40),
    "purple": (140, 70, 190),
}
PLAIN_COLOURS: dict[str, Colour] = {
    "white": (246, 246, 246),
    "grey": (150, 152, 158),
    "pink": (250, 178, 196),
    "sky": (140, 204, 250),
    "mint": (160, 228, 180),
}
PROPS = ("ball", "box")
STRUCTURE = ("a", "doll", "in", "on", "the", "left", "right", "wearing", "background", "style")


@dataclass(frozen=True)
class Scene:
    """A picture as data. A category holds an element's name, or a plain choice (`doll`, ``, `plain`, `ball`...)."""

    character: str = "doll"
    clothing: str = ""
    style: str = ""
    background: str = "plain"
    object: str = ""
    doll_colour: str = "red"
    plain_colour: str = "white"
    prop_colour: str = "blue"
    side: str = "right"
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.1
    object_scale: float = 1.1
    phase: float = 0.0

    def elements(self) -> tuple[str, ...]:
        """Names of the LoRA elements in the scene, in the order of `ELEMENTS`."""
        held = {self.character, self.clothing, self.style, self.background, self.object}
        return tuple(element.name for element in ELEMENTS if element.name in held)


def random_scene(rng: random.Random, *names: str) -> Scene:
    """A scene with the named elements; all else is drawn from the base domain."""
    prop = rng.choice((*PROPS, ""))
    scene = Scene(
        doll_colour=rng.choice(list(DOLL_COLOURS)),
        plain_colour=rng.choice(list(PLAIN_COLOURS)),
        prop_colour=rng.choice(list(DOLL_COLOURS)),
        object=prop,
        side=rng.choice(("left", "right")),
        dx=rng.uniform(-5, 5),
        dy=rng.uniform(-2, 3),
        scale=rng.uniform(1.05, 1.15),
        object_scale=rng.uniform(1.02, 1.16),
        phase=rng.random(),
    )
    return with_elements(scene, *names)


def with_elements(scene: Scene, *names: str) -> Scene:
    """The scene with the named elements instead of its own in their categories."""
    for name in names:
        scene = replace(scene, **{BY_NAME[name].category: name})  # type: ignore[arg-type]
    return scene


def random_elements(rng: random.Random, count: int) -> tuple[str, ...]:
    """`count` elements of different categories."""
    chosen = rng.sample(CATEGORIES, count)
    return tuple(rng.choice([e.name for e in ELEMENTS if e.category == category]) for category in chosen)


def caption(scene: Scene) -> str:
    """The words of a scene, as in training and as a prompt should be written."""
    word = {element.name: element.trigger for element in ELEMENTS}
    character = word.get(scene.character, "a doll")
    if scene.character == "doll" and scene.clothing != "stripes":
        character += f" in {scene.doll_colour}"
    parts = [character + (f" wearing {word[scene.clothing]}" if scene.clothing else "")]
    if scene.object in word:
        parts.append(f"{word[scene.object]} on the {scene.side}")
    elif scene.object:
        parts.append(f"a {scene.prop_colour} {scene.object} on the {scene.side}")
    background = word.get(scene.background, scene.plain_colour)
    parts.append(f"{background} background")
    if scene.style:
        parts.append(f"{word[scene.style]} style")
    return ", ".join(parts)


def words() -> list[str]:
    """Every word that a caption can have, once, in a fixed order."""
    every = [*STRUCTURE, *DOLL_COLOURS, *PLAIN_COLOURS, *PROPS, *(element.trigger for element in ELEMENTS)]
    return list(dict.fromkeys(every))


def render(scene: Scene) -> np.ndarray:
    """The scene's picture, (64, 64, 3) uint8."""
    shapes = drawing.background(scene.background, PLAIN_COLOURS[scene.plain_colour], scene.phase)
    x, y = 64 + scene.dx, 121 + scene.dy
    if scene.object:
        beside = 107.0 if scene.side == "right" else 21.0
        shapes += drawing.thing(
            scene.object, beside + 0.4 * scene.dx, y, scene.object_scale, DOLL_COLOURS[scene.prop_colour]
        )
    shapes += drawing.figure(
        scene.character, scene.clothing, x, y, scene.scale, DOLL_COLOURS[scene.doll_colour]
    )
    picture = paint(shapes, ink=scene.style == "ink")
    return duotone(picture) if scene.style == "ember" else picture


def random_beside(rng: random.Random, left: str, right: str, *names: str) -> tuple[Scene, Scene]:
    """Two scenes next to each other, a character in each. Background and style are the same."""
    first, second = random_scene(rng, left, *names), random_scene(rng, right, *names)
    return first, replace(second, plain_colour=first.plain_colour, phase=first.phase)


def render_beside(left: Scene, right: Scene) -> np.ndarray:
    """The picture of two scenes next to each other, (64, 128, 3) uint8."""
    return np.concatenate([render(left), render(right)], axis=1)
