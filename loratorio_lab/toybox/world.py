"""The toybox's world: what a picture shows, as data, its caption and its picture.

A `Scene` has one to four figures side by side, large and small, on a ground of one colour or a graded one, drawn by one artist.
The base model sees its own artist's drawings of `SUBJECTS` only; each LoRA learns one of `ELEMENTS`. Any combination can be drawn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loratorio.errors import LoratorioError
from loratorio.standalone.model_files import LATENT_PIXEL
from loratorio.toybox.elements import BY_NAME, ELEMENTS, Element
from loratorio_lab.toybox.art import ARTISTS, INK, OUTLINED, PAPER, STYLES, Art, Colour, cover, paste
from loratorio_lab.toybox.subjects import BASE_ARTIST, LACKING, SEVERAL, SUBJECTS, icon

HEIGHT = 128
PARTS = {2: 96, 3: 64, 4: 64}
"""Width of each figure's part of a picture, by how many stand beside each other: what the base draws best. It learned 192 px at most."""
WIDTHS = (128, 192)
WIDE = 0.25
"""Share of the wider pictures."""

GROUNDS: dict[str, Colour] = {
    "white": (246, 246, 246),
    "grey": (172, 176, 184),
    "pink": (250, 186, 204),
    "blue": (118, 178, 244),
    "green": (146, 210, 148),
    "yellow": (250, 224, 126),
    "purple": (188, 156, 232),
    "navy": (42, 54, 112),
}
STRUCTURE = ("a", "an", "large", "small", "on", "the", "left", "right", "to", "background", "style", "and")

LARGE, SMALL = 96, 56
"""Figures' sides. They and the figures' places are multiples of a latent's pixel: a drawing then has two latents, one for
each side, wherever it stands. A small base has less to learn so."""
_PAIRS = (("", ""), ("", ""), ("", ""), ("small", "small"), ("large", "small"), ("small", "large"))
"""Sizes of two figures; a large one has room in wide pictures alone."""


OTHER_ARTISTS, STYLED = 0.35, 0.6
"""How many of the autoencoder's and the classifier's pictures are not drawn by the base's artist; how many of the others are in a style."""


@dataclass(frozen=True)
class Figure:
    """One drawing: the name of a subject or an element, the middle and side in pixels, and the words for size and place."""

    name: str
    x: float
    y: float
    side: float
    size: str = ""
    place: str = ""
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A picture as data.

    figures: from left to right.
    ground: colours of the top and the bottom, by name or as RGB.
    background, style: an element's name, or none.
    artist: who draws it all.
    phase: which part of a background is seen.
    """

    figures: tuple[Figure, ...]
    width: int = 128
    ground: tuple[str | Colour, str | Colour] = ("white", "white")
    background: str = ""
    style: str = ""
    artist: str = BASE_ARTIST
    phase: float = 0.5
    mirrored: bool = False

    def elements(self) -> tuple[str, ...]:
        """Names of the LoRA elements in the scene, in the order of `ELEMENTS`."""
        held = {self.background, self.style, *(figure.name for figure in self.figures)}
        return tuple(element.name for element in ELEMENTS if element.name in held)


def caption(scene: Scene) -> str:
    """The words of a scene, as in training and as a prompt should be written."""
    parts = []
    for figure in scene.figures:
        element = BY_NAME.get(figure.name)
        thing = element.trigger if element else SUBJECTS[figure.name]
        words = " ".join(filter(None, (figure.size, thing)))
        if element is None and thing not in SEVERAL:
            words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        parts.append(f"{words}{place_words(figure.place)}")
    top, bottom = scene.ground
    ground = f"{top}" if top == bottom else f"{top} to {bottom}"
    parts.append(f"{BY_NAME[scene.background].trigger if scene.background else ground} background")
    if scene.style:
        parts.append(f"{BY_NAME[scene.style].trigger} style")
    return ", ".join(parts)


def place_words(place: str) -> str:
    """A place in a caption: `` on the left``, or nothing."""
    return f" on the {place}" if place else ""


def words() -> list[str]:
    """Every word that a caption can have, once, in a fixed order."""
    subjects = " ".join(SUBJECTS.values()).split()
    every = [*STRUCTURE, *GROUNDS, *subjects, *(element.trigger for element in ELEMENTS)]
    return list(dict.fromkeys(every))


def random_ground(rng: random.Random) -> tuple[str, str]:
    """One colour, or in a third of the scenes a graded one."""
    top = rng.choice(list(GROUNDS))
    return top, rng.choice(list(GROUNDS)) if rng.random() < 0.38 else top


PLACES = {2: ("left", "right"), 3: ("left", "", "right"), 4: ("left", "", "", "right")}
"""Words for the equal parts of a picture's width, by how many there are. The base has no words for those between."""


def arrange(rng: random.Random, names: Sequence[str], width: int) -> tuple[Figure, ...]:
    """One or two figures at random places that fit the picture, from left to right. Without a word, one alone is large, two are small."""
    if len(names) == 1:
        size = rng.choice(("", "", "large", "small"))
        side = SMALL if size == "small" else LARGE
        place = rng.choice(("", "", "", "left", "right")) if width > HEIGHT or side == SMALL else ""
        free = width - side
        near = LATENT_PIXEL * rng.randint(1, max(1, free // (6 * LATENT_PIXEL)))
        corner = {"": _middle(rng, free), "left": near, "right": free - near}[place]
        return (_figure(rng, names[0], corner, side, size, place),)
    sizes = rng.choice([pair for pair in _PAIRS if width > HEIGHT or "large" not in pair])
    sides = [LARGE if size == "large" else SMALL for size in sizes]
    free = (width - sum(sides)) // LATENT_PIXEL
    gaps = [LATENT_PIXEL * rng.randint(free // 5, max(1, free * 2 // 5)) for _ in sizes]
    corners = (gaps[0], width - gaps[1] - sides[1])
    return tuple(_figure(rng, *each) for each in zip(names, corners, sides, sizes, PLACES[2], strict=True))


def abreast(rng: random.Random, names: Sequence[str]) -> tuple[Figure, ...]:
    """Small figures from left to right, each at a random place in an equal part of the width of its own."""
    part = PARTS[len(names)]
    free = (part - SMALL) // LATENT_PIXEL
    return tuple(
        _figure(rng, name, part * i + LATENT_PIXEL * rng.randint(0, free), SMALL, "small", place)
        for i, (name, place) in enumerate(zip(names, PLACES[len(names)], strict=True))
    )


def _figure(rng: random.Random, name: str, left: int, side: int, size: str, place: str) -> Figure:
    top = min(_middle(rng, HEIGHT - side) + rng.choice((0, 0, LATENT_PIXEL)), HEIGHT - side)
    return Figure(name, left + side / 2, top + side / 2, side, size, place)


def _middle(rng: random.Random, free: int) -> int:
    """Half of what is free, rounded to a latent pixel on either side."""
    cells, odd = divmod(free, 2 * LATENT_PIXEL)
    return LATENT_PIXEL * (cells + (rng.randint(0, 1) if odd else 0))


class World:
    """The world, with the art to draw it; without, it has words alone.

    Attributes:
        elements: what its LoRAs teach.
        pixels: height of a picture, and its usual width.
        widths, shares: widths of the pictures that the base is trained on, and how much of the training each has.
        scenes: scenes of the base domain that the base is trained on.
        judged: what the classifier tells apart: elements and subjects.
        own_pictures: pictures that a LoRA is trained on.
        plain: a ground of the base domain, as a caption says it.
    """

    elements: tuple[Element, ...] = ELEMENTS
    pixels = HEIGHT
    widths = WIDTHS
    shares = (1 - WIDE, WIDE)
    scenes = 24_000
    judged = (*(element.name for element in ELEMENTS), *SUBJECTS)
    own_pictures = 80
    plain = "blue"
    words = staticmethod(words)
    caption = staticmethod(caption)

    def __init__(self, art: Art | None = None) -> None:
        self._art = art

    @property
    def art(self) -> Art:
        """The drawings. Raises LoratorioError where there are none."""
        if self._art is None:
            raise LoratorioError(
                "The picture book can be drawn only with the artists' packages: give --art FOLDER."
            )
        return self._art

    def shows(self, scene: Scene) -> set[str]:
        """What of `judged` is in the scene."""
        return {scene.background, scene.style, *(figure.name for figure in scene.figures)} - {""}

    def undecided(self, scene: Scene) -> set[str]:
        """What of `judged` may be in the scene or not: other artists' inked and outlined drawings are not quite the styles'."""
        return {INK: {"ink"}, OUTLINED: {"outline"}}.get(scene.artist, set())

    def drawn(self, artist: str, name: str) -> bool:
        """Whether an artist has drawn a subject or an element, alone and without a frame."""
        return name not in LACKING.get(artist, ())

    def random_scene(self, rng: random.Random, *names: str, width: int | None = None) -> Scene:
        """A scene with the named elements; all else is drawn from the base domain.

        Two characters come from left to right in the order named.
        """
        kinds = {name: BY_NAME[name].category for name in names}
        style = next((n for n, kind in kinds.items() if kind == "style"), "")
        shown = [n for n, kind in kinds.items() if kind in ("character", "object")]
        beside = any(kind == "object" for kind in kinds.values()) and rng.random() < 0.5
        if len(shown) < 2 and (not shown or beside or rng.random() < 0.35):
            count = 2 if rng.random() < 0.5 or shown else 1
            shown += rng.sample(list(SUBJECTS), count - len(shown))
        if sum(kind == "character" for kind in kinds.values()) < 2:
            rng.shuffle(shown)
        if width is None:
            width = rng.choices(self.widths, self.shares)[0]
        return Scene(
            arrange(rng, shown[:2], width),
            width,
            random_ground(rng),
            next((n for n, kind in kinds.items() if kind == "background"), ""),
            style,
            phase=rng.uniform(0.15, 0.85),
        )

    def random_beside(self, rng: random.Random, *names: str) -> Scene:
        """A wide scene with two to four characters, from left to right in the order named."""
        shown = [name for name in names if BY_NAME[name].category == "character"]
        scene = self.random_scene(rng, *names, width=self.width_beside(len(shown)))
        return scene if len(shown) == 2 else replace(scene, figures=abreast(rng, shown))

    @staticmethod
    def width_beside(count: int) -> int:
        """Width of a picture with two to four figures beside each other, in pixels."""
        return count * PARTS[count]

    @staticmethod
    def positions(count: int) -> list[str]:
        """Words for where each of two to four figures stands, as a caption has them after a figure's name."""
        return [place_words(place) for place in PLACES[count]]

    def any_scene(self, rng: random.Random, width: int | None = None, artist: str = "") -> Scene:
        """A scene by this artist, or by any, for the autoencoder and the classifier. Only the base's artist's drawings come in styles."""
        shares = {"character": 0.3, "object": 0.25, "background": 0.22, "style": STYLED}
        drawer = artist or (BASE_ARTIST if rng.random() > OTHER_ARTISTS else rng.choice(list(ARTISTS)))
        chosen = [
            rng.choice([each.name for each in ELEMENTS if each.category == category])
            for category, share in shares.items()
            if rng.random() < share and (category != "style" or drawer == BASE_ARTIST)
        ]
        return replace(self.random_scene(rng, *chosen, width=width), artist=drawer)

    def prompts(self, element: Element, count: int) -> list[str]:
        """Captions of random scenes with the element, 128 wide."""
        rng = random.Random(element.name)
        return [caption(self.random_scene(rng, element.name, width=HEIGHT)) for _ in range(count)]

    def varied_scene(self, rng: random.Random, width: int | None = None) -> Scene:
        """As `any_scene`, in any sizes, mirrored, on any colours: for the autoencoder."""
        scene = self.any_scene(rng, width)
        figures = tuple(
            replace(f, side=f.side * rng.uniform(0.8, 1.5), mirrored=rng.random() < 0.5)
            for f in scene.figures
        )
        ground = scene.ground
        if rng.random() < 0.5:
            top, bottom = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
            ground = (top, bottom if rng.random() < 0.5 else top)  # type: ignore[assignment]
        return replace(scene, figures=figures, ground=ground, phase=rng.random(), mirrored=rng.random() < 0.5)

    def render(self, scene: Scene) -> np.ndarray:
        """The scene's picture, (128, width, 3) uint8."""
        artist = scene.artist
        if scene.background:
            name = icon(scene.background)
            # Streamline has no whole-frame scenes: the base's stands in.
            by = artist if self.drawn(artist, scene.background) else BASE_ARTIST
            picture = cover(self.art.scene(by, name), scene.width, HEIGHT, scene.phase, scene.mirrored)
        elif artist == INK:
            picture = np.full((HEIGHT, scene.width, 3), PAPER, np.float32)
        else:
            top, bottom = (np.array(GROUNDS.get(c, c), np.float32) for c in scene.ground)  # type: ignore[arg-type]
            down = np.linspace(0, 1, HEIGHT, dtype=np.float32)[:, None, None]
            picture = np.broadcast_to(top + (bottom - top) * down, (HEIGHT, scene.width, 3)).copy()
        for figure in scene.figures:
            by = artist if self.drawn(artist, figure.name) else BASE_ARTIST
            paste(
                picture,
                self.art.drawing(by, icon(figure.name)),
                figure.x,
                figure.y,
                figure.side,
                figure.mirrored,
            )
        if scene.style:
            picture = STYLES[scene.style](picture.clip(0, 255))
        return picture.clip(0, 255).astype(np.uint8)


def add_art(parser: argparse.ArgumentParser) -> None:
    """The option that `open_world` takes."""
    parser.add_argument(
        "--art",
        type=Path,
        help="folder of the artists' packages (docs/lab/TOYBOX.md); for what draws pictures",
    )


def open_world(art: Path | None) -> World:
    """The world. art: the folder of the artists' packages; without it, nothing can be drawn."""
    return World(None if art is None else Art(art))
