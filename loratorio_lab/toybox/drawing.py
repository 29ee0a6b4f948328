"""How each thing of the world is built from polygons. A figure stands with its feet at (x, y), lengths in pixels times `scale`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from loratorio_lab.toybox.shapes import SIZE, Colour, Point, Shape, box, ellipse, polygon, star

SKIN: Colour = (250, 214, 180)
DARK: Colour = (28, 26, 36)
WHITE: Colour = (250, 250, 250)
STEEL: Colour = (126, 142, 160)
ORANGE: Colour = (240, 138, 36)
LIME: Colour = (122, 196, 60)
RED: Colour = (216, 36, 40)


class Pen:
    """Places shapes of a figure: its own coordinates are centred, y up from the feet, before scaling."""

    def __init__(self, x: float, y: float, scale: float) -> None:
        self.x, self.y, self.scale = x, y, scale

    def at(self, dx: float, up: float) -> Point:
        return self.x + dx * self.scale, self.y - up * self.scale

    def oval(self, dx: float, up: float, rx: float, ry: float, fill: Colour, outlined: bool = True) -> Shape:
        x, y = self.at(dx, up)
        return ellipse(x, y, rx * self.scale, ry * self.scale, fill, outlined)

    def poly(self, points: Sequence[Point], fill: Colour, outlined: bool = True) -> Shape:
        return polygon([self.at(*p) for p in points], fill, outlined)

    def rect(
        self, left: float, bottom: float, right: float, top: float, fill: Colour, outlined: bool = True
    ) -> Shape:
        return self.poly([(left, bottom), (right, bottom), (right, top), (left, top)], fill, outlined)


def background(kind: str, plain: Colour, phase: float) -> list[Shape]:
    """The backdrop. `phase` in [0, 1) moves its parts."""
    if kind == "night":
        return _night(phase)
    if kind == "checks":
        return _checks()
    if kind == "rays":
        return _rays()
    floor: Colour = (int(plain[0] * 0.8), int(plain[1] * 0.8), int(plain[2] * 0.8))
    return [box(0, 0, SIZE, SIZE, plain, False), box(-9, 108, SIZE + 9, SIZE + 9, floor)]


def _night(phase: float) -> list[Shape]:
    sky: Colour = (24, 32, 96)
    moon_x = 22.0 if phase < 0.5 else 106.0
    far_x = 128 - moon_x
    shapes = [box(0, 0, SIZE, SIZE, sky, False)]
    shapes += [ellipse(moon_x, 24, 17, 17, (255, 238, 150)), ellipse(moon_x + 9, 19, 13, 13, sky, False)]
    shapes += [star(x, y, 10, WHITE, False) for x, y in ((far_x, 24.0), (moon_x, 62.0))]
    shapes += [ellipse(20, 132, 52, 40, (22, 78, 74)), ellipse(108, 134, 56, 36, (30, 98, 84))]
    return shapes


def _checks() -> list[Shape]:
    shapes = [box(0, 0, SIZE, SIZE, (255, 240, 205), False)]
    for row in range(8):
        for column in range(row % 2, 8, 2):
            x, y = column * 16, row * 16
            shapes.append(box(x, y, x + 16, y + 16, (24, 150, 150), False))
    return shapes


def _rays() -> list[Shape]:
    shapes = [box(0, 0, SIZE, SIZE, (255, 206, 226), False)]
    x, y, count = 64.0, 76.0, 9
    for i in range(count):
        start = 2 * math.pi * (i + 0.3) / count
        end = start + math.pi / count
        points = [(x, y), (x + 140 * math.cos(start), y + 140 * math.sin(start))]
        points.append((x + 140 * math.cos(end), y + 140 * math.sin(end)))
        shapes.append(polygon(points, (214, 44, 132)))
    return shapes


def thing(kind: str, x: float, y: float, scale: float, colour: Colour) -> list[Shape]:
    """An object standing at (x, y)."""
    pen = Pen(x, y, scale)
    if kind == "ball":
        return [pen.oval(0, 13, 13, 13, colour)]
    if kind == "box":
        return [pen.rect(-12, 0, 12, 24, colour)]
    if kind == "mushroom":
        return _mushroom(pen)
    return _cactus(pen)


def _mushroom(pen: Pen) -> list[Shape]:
    cap = [(18 * math.cos(a), 21 + 23 * math.sin(a)) for a in (math.pi * i / 20 for i in range(21))]
    spots = [
        pen.oval(dx, up, r, r, WHITE, False)
        for dx, up, r in ((-8.5, 28.0, 5.0), (8.5, 28.0, 5.0), (0.0, 38.0, 4.5))
    ]
    return [pen.rect(-7, 0, 7, 23, (248, 232, 204)), pen.poly(cap, RED), *spots]


def _cactus(pen: Pen) -> list[Shape]:
    green: Colour = (20, 130, 60)
    body = [pen.rect(-6, 14, 6, 46, green, False), pen.oval(0, 46, 6, 6, green, False)]
    arms = [pen.rect(-16, 27, -4, 33, green, False), pen.rect(-16, 27, -10, 41, green, False)]
    arms += [pen.rect(4, 22, 16, 28, green, False), pen.rect(10, 22, 16, 37, green, False)]
    pot = pen.poly([(-9, 0), (9, 0), (13, 17), (-13, 17)], (156, 84, 42))
    return [*arms, *body, pot]


def figure(kind: str, clothing: str, x: float, y: float, scale: float, colour: Colour) -> list[Shape]:
    """A character in its clothing: body, what it wears on it, head."""
    pen = Pen(x, y, scale)
    body, head = _PARTS[kind](pen, colour)
    if clothing == "stripes":
        body += _stripes(pen, kind)
    return body + head


def _outline(kind: str) -> list[Point]:
    """Left half-widths of a body from its feet up, as (half-width, height)."""
    if kind == "robot":
        return [(20, 0), (20, 44)]
    return [(25, 0), (23, 16), (17, 34), (11, 46)]


def _body(pen: Pen, kind: str, fill: Colour) -> Shape:
    side = _outline(kind)
    return pen.poly([(-w, up) for w, up in side] + [(w, up) for w, up in reversed(side)], fill)


def _width(kind: str, up: float) -> float:
    side = _outline(kind)
    for (w0, u0), (w1, u1) in itertools.pairwise(side):
        if u0 <= up <= u1:
            return w0 + (w1 - w0) * (up - u0) / (u1 - u0)
    return side[-1][0]


def _stripes(pen: Pen, kind: str) -> list[Shape]:
    shapes = [_body(pen, kind, WHITE)]
    for low in (0.0, 22.0):
        high = low + 11
        a, b = _width(kind, low), _width(kind, high)
        shapes.append(pen.poly([(-a, low), (a, low), (b, high), (-b, high)], RED, False))
    return shapes


def _eyes(pen: Pen, up: float = 62) -> list[Shape]:
    return [pen.oval(dx, up, 4, 5, DARK, False) for dx in (-8.0, 8.0)]


Parts = tuple[list[Shape], list[Shape]]


def _doll(pen: Pen, colour: Colour) -> Parts:
    return [_body(pen, "doll", colour)], [pen.oval(0, 61, 19, 19, SKIN), *_eyes(pen)]


def _robot(pen: Pen, colour: Colour) -> Parts:
    cyan: Colour = (70, 240, 250)
    body = [
        _body(pen, "robot", STEEL),
        pen.rect(-11, 14, 11, 32, (60, 70, 90)),
        pen.oval(0, 23, 5, 5, cyan, False),
    ]
    head = [pen.rect(-2, 76, 2, 92, STEEL), pen.oval(0, 92, 6, 6, RED)]
    head += [pen.rect(-27, 55, 27, 67, (76, 88, 108)), pen.rect(-21, 44, 21, 79, STEEL)]
    head += [pen.rect(-16, 57, 16, 70, DARK, False)]
    head += [pen.rect(dx - 4, 60, dx + 4, 67, cyan, False) for dx in (-8.0, 8.0)]
    return body, head


def _cat(pen: Pen, colour: Colour) -> Parts:
    tail = [(20, 4), (34, 6), (40, 18), (38, 30), (32, 30), (33, 19), (29, 13), (18, 12)]
    body = [pen.poly(tail, ORANGE), _body(pen, "cat", ORANGE), pen.oval(0, 19, 11, 15, WHITE, False)]
    head = [pen.poly([(s * 23, 95), (s * 21, 64), (s * 3, 76)], ORANGE) for s in (-1, 1)]
    head += [pen.oval(0, 61, 22, 19, ORANGE), *_eyes(pen, 64), pen.oval(0, 52, 11, 7.5, WHITE, False)]
    head += [pen.poly([(-4.5, 57), (4.5, 57), (0, 51)], (226, 70, 110), False)]
    return body, head


def _alien(pen: Pen, colour: Colour) -> Parts:
    egg = []
    for i in range(40):
        a = 2 * math.pi * i / 40
        wide = 26 if math.sin(a) > -0.2 else 26 + 9 * (math.sin(a) + 0.2)
        egg.append((wide * math.cos(a), 64 + 24 * math.sin(a)))
    head = [pen.poly(egg, LIME)]
    for side in (-1, 1):
        slant = [
            (side * 21, 75),
            (side * 22, 66),
            (side * 14, 56),
            (side * 5, 54),
            (side * 4, 62),
            (side * 11, 72),
        ]
        head.append(pen.poly(slant, DARK, False))
    body = [_body(pen, "alien", LIME), pen.oval(0, 17, 10, 9, (200, 240, 120), False)]
    return body, head


_PARTS = {"doll": _doll, "robot": _robot, "cat": _cat, "alien": _alien}
