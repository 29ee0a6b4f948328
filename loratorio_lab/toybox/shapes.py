"""Flat coloured polygons and how a style paints them. The world is 128 units wide and high, y down, whatever the pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
"""Width and height of the world, units."""

PIXELS = 64
"""Width and height of a picture, pixels. docs/lab/TOYBOX.md says why it is not 128."""

OVERSAMPLE = 4
"""Pictures are drawn this much larger and averaged down, which is the antialiasing."""

Point = tuple[float, float]
Colour = tuple[int, int, int]

PAPER: Colour = (250, 246, 232)
INK: Colour = (18, 16, 24)
LINE = 5.0
"""Width of an inked line, units."""


@dataclass(frozen=True)
class Shape:
    """One filled polygon. `outlined` says whether a line style draws its edge."""

    points: tuple[Point, ...]
    fill: Colour
    outlined: bool = True


def ellipse(x: float, y: float, rx: float, ry: float, fill: Colour, outlined: bool = True) -> Shape:
    """An ellipse around (x, y) as a 40-gon."""
    turns = [2 * math.pi * i / 40 for i in range(40)]
    points = tuple((x + rx * math.cos(a), y + ry * math.sin(a)) for a in turns)
    return Shape(points, fill, outlined)


def polygon(points: Sequence[Point], fill: Colour, outlined: bool = True) -> Shape:
    return Shape(tuple(points), fill, outlined)


def box(left: float, top: float, right: float, bottom: float, fill: Colour, outlined: bool = True) -> Shape:
    return polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, outlined)


def star(x: float, y: float, radius: float, fill: Colour, outlined: bool = True) -> Shape:
    """A five-pointed star, one point up."""
    points = []
    for i in range(10):
        r = radius if i % 2 == 0 else radius * 0.45
        a = math.pi * i / 5 - math.pi / 2
        points.append((x + r * math.cos(a), y + r * math.sin(a)))
    return polygon(points, fill, outlined)


def luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _fill_in_ink(colour: Colour) -> Colour:
    return INK if luminance(colour) < 100 else PAPER


def paint(shapes: Sequence[Shape], ink: bool = False) -> np.ndarray:
    """Draw the shapes in order; the first one is the backdrop.

    With `ink`, fills become paper or black and every outlined edge a thick black line.
    Returns (PIXELS, PIXELS, 3) uint8.
    """
    side = PIXELS * OVERSAMPLE
    unit = side / SIZE
    picture = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(picture)
    for shape in shapes:
        points = [(x * unit, y * unit) for x, y in shape.points]
        if not ink:
            draw.polygon(points, fill=shape.fill)
            continue
        draw.polygon(points, fill=_fill_in_ink(shape.fill))
        if shape.outlined:
            draw.line([*points, points[0], points[1]], fill=INK, width=round(LINE * unit), joint="curve")
    return np.asarray(picture.reduce(OVERSAMPLE))


def duotone(
    picture: np.ndarray,
    stops: Sequence[float] = (0.0, 110.0, 190.0, 255.0),
    ramp: Sequence[Colour] = ((48, 8, 72), (196, 44, 60), (255, 140, 30), (255, 226, 140)),
) -> np.ndarray:
    """Map luminance onto a ramp of colours, by default from deep purple over glowing orange to pale yellow. (H, W, 3) uint8 in and out."""
    grey = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    colours = np.array(ramp, np.float32)
    channels = [np.interp(grey, stops, colours[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)
