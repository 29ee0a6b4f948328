"""The worlds that a model can be trained on: dolls (`loratorio_lab.toybox.world`) and the picture book (`loratorio_lab.book.world`)."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loratorio.toybox.elements import ELEMENTS, Element
from loratorio_lab.book.art import Art
from loratorio_lab.book.world import Book
from loratorio_lab.toybox import world as dolls
from loratorio_lab.toybox.shapes import PIXELS


class World(Protocol):
    """Scenes as data, in the world's own type, their captions and pictures."""

    name: str
    elements: tuple[Element, ...]
    pixels: int
    """Height of a picture and the least width."""
    widths: tuple[int, ...]
    """Widths of the pictures that the base is trained on; a batch has one."""
    shares: tuple[float, ...]
    """How much of the training each width has."""
    scenes: int
    """Scenes of the base domain that the base is trained on."""
    judged: tuple[str, ...]
    """What the classifier distinguishes: the elements, and possibly more."""
    own_pictures: int
    """Pictures that a LoRA is trained on."""
    beside_width: int
    """Width of a picture of two characters beside each other."""
    plain: str
    """A background of the base domain, as a caption says it."""
    sides: tuple[str, ...]
    """Words for where each of two characters stands; none where captions say nothing of it."""

    def words(self) -> list[str]:
        """Every word that a caption can have, once, in a fixed order."""

    def caption(self, scene: Any) -> str:
        """The words of a scene, as a prompt should be written."""

    def render(self, scene: Any) -> np.ndarray:
        """The scene's picture, (H, W, 3) uint8."""

    def shows(self, scene: Any) -> set[str]:
        """What of `judged` is in the scene."""

    def undecided(self, scene: Any) -> set[str]:
        """What of `judged` may be seen in the scene or not."""

    def random_scene(self, rng: random.Random, *names: str, width: int | None = None) -> Any:
        """A scene with the named elements; all else is drawn from the base domain."""

    def random_beside(self, rng: random.Random, left: str, right: str, *names: str) -> Any:
        """A scene with two characters beside each other, `beside_width` wide."""

    def any_scene(self, rng: random.Random, width: int | None = None) -> Any:
        """A scene of the whole world, with or without elements, for the classifier."""

    def prompts(self, element: Element, count: int) -> list[str]:
        """Prompts of an element alone, all else from the base domain."""

    def varied_scene(self, rng: random.Random, width: int | None = None, fine: bool = False) -> Any:
        """As `any_scene`, for the autoencoder. fine: for the stage that trains the decoder alone."""


BLURRED = ("robot", "robot", "cat", "alien")
"""Dolls that the coarse stage leaves blurred; the fine stage draws them more often."""


class Dolls:
    """The toybox's world."""

    name = "toybox"
    elements = ELEMENTS
    pixels = PIXELS
    widths: tuple[int, ...] = (PIXELS,)
    shares: tuple[float, ...] = (1.0,)
    scenes = 6000
    judged = tuple(element.name for element in ELEMENTS)
    own_pictures = 500
    beside_width = 2 * PIXELS
    plain = "sky"
    sides: tuple[str, ...] = ()
    words = staticmethod(dolls.words)
    caption = staticmethod(dolls.caption)
    random_beside = staticmethod(dolls.random_beside)

    def render(self, scene: dolls.Scene | tuple[dolls.Scene, dolls.Scene]) -> np.ndarray:
        return dolls.render_beside(*scene) if isinstance(scene, tuple) else dolls.render(scene)

    def shows(self, scene: dolls.Scene) -> set[str]:
        return set(scene.elements())

    def undecided(self, scene: dolls.Scene) -> set[str]:
        return set()

    def random_scene(self, rng: random.Random, *names: str, width: int | None = None) -> dolls.Scene:
        return dolls.random_scene(rng, *names)

    def any_scene(self, rng: random.Random, width: int | None = None) -> dolls.Scene:
        """A quarter of the base domain, the rest with one to five elements."""
        count = rng.choices((0, 1, 2, 3, 4, 5), (5, 8, 3, 2, 1, 1))[0]
        return dolls.random_scene(rng, *dolls.random_elements(rng, count))

    def prompts(self, element: Element, count: int) -> list[str]:
        """The element's own, a plain choice for the rest that changes with the number."""
        made = []
        for i in range(count):
            doll = list(dolls.DOLL_COLOURS)[i % len(dolls.DOLL_COLOURS)]
            plain = list(dolls.PLAIN_COLOURS)[(i // 2) % len(dolls.PLAIN_COLOURS)]
            side = ("left", "right")[i % 2]
            word = element.trigger
            made.append(
                {
                    "character": f"{word}, {plain} background",
                    "clothing": f"a doll wearing {word}, {plain} background",
                    "style": f"a doll in {doll}, {plain} background, {word} style",
                    "background": f"a doll in {doll}, {word} background",
                    "object": f"a doll in {doll}, {word} on the {side}, {plain} background",
                }[element.category]
            )
        return made

    def varied_scene(self, rng: random.Random, width: int | None = None, fine: bool = False) -> dolls.Scene:
        scene = self.any_scene(rng)
        if fine and rng.random() < 0.35:
            return replace(scene, character=rng.choice(BLURRED))
        return scene


def add_world(parser: argparse.ArgumentParser) -> None:
    """The options that `open_world` takes."""
    parser.add_argument(
        "--world", choices=["toybox", "book"], default="toybox", help="dolls, or the picture book"
    )
    parser.add_argument("--art", type=Path, help="folder of the artists' packages, for the book")


def open_world(name: str, art: Path | None) -> World:
    """The world of this name. art: the folder of the artists' packages, for the book; without it, the book cannot be drawn."""
    if name == "toybox":
        return Dolls()
    return Book(None if art is None else Art(art))
