"""Where in the picture a LoRA may act, from its tag: ``<lora:alice:at=left:0.8>``.

This module reads places; `loratorio.compose.regions` applies them to the weights.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence

from ..compose.regions import WHOLE, Box, Place, outside
from ..errors import LoratorioError
from .trigger_words import called

OPTION = "at"
"""The named argument of a LoRA tag."""

NAMED: dict[str, Box] = {
    "left": Box(0, 0, 0.5, 1),
    "right": Box(0.5, 0, 1, 1),
    "top": Box(0, 0, 1, 0.5),
    "bottom": Box(0, 0.5, 1, 1),
    "centre": Box(0.25, 0.25, 0.75, 0.75),
    "top-left": Box(0, 0, 0.5, 0.5),
    "top-right": Box(0.5, 0, 1, 0.5),
    "bottom-left": Box(0, 0.5, 0.5, 1),
    "bottom-right": Box(0.5, 0.5, 1, 1),
}
ALIASES = {"center": "centre", **{name.replace("-", ""): name for name in NAMED if "-" in name}}

AUTO = "auto"
"""The place that is found while sampling (`loratorio.compose.search`)."""

EDGE = 0.1
"""The default width of a place's border, as a fraction of the picture's shorter side."""

MOST_EDGE = 0.5


def read_place(value: str, lora: str) -> Place | None:
    """The place that a tag's argument names; None where it is the whole picture.

    Args:
        value: a name of `NAMED` or ``x0,y0,x1,y1`` as fractions of the picture; several joined by ``+``; then ``~`` and the
            width of the soft edge. Examples: ``left``, ``left+bottom-right``, ``0,0,0.3,1~0.05``. Or `AUTO`, with an edge or without.

    Raises:
        LoratorioError: anything else; the sentence shows correct ones.
    """
    text, tilde, width = value.strip().lower().partition("~")
    edge = _number(width) if tilde else EDGE
    if not 0 <= edge <= MOST_EDGE:
        raise _wrong(value, lora, f"the edge after ~ must be a number from 0 to {MOST_EDGE:g}")
    if text.strip() == AUTO:
        return Place((WHOLE,), edge, sought=True)
    boxes = tuple(_box(part.strip(), value, lora) for part in text.split("+"))
    return Place(boxes, edge) if outside(boxes) else None


def written(place: Place) -> str:
    """The place as a tag has it: `read_place` reads it back."""
    boxes = "+".join(",".join(f"{side:g}" for side in box) for box in place.boxes)
    return boxes if place.edge == EDGE else f"{boxes}~{place.edge:g}"


_SIDES = {
    "left": (0.0, None), "right": (1.0, None), "top": (None, 0.0), "upper": (None, 0.0), "bottom": (None, 1.0), "lower": (None, 1.0),
    "middle": (0.5, 0.5), "centre": (0.5, 0.5), "center": (0.5, 0.5), "far left": (-0.5, None), "far right": (1.5, None),
}  # fmt: skip
"""Points that words name, in parts of the picture. *Far left* is outside of it: what is on the left stands between."""
_SIDE = re.compile(rf"(?<!\w)({'|'.join(_SIDES)})(?!\w)", re.IGNORECASE)
_CLAUSE = re.compile(r"[,.;\n|]|(?<!\w)(?:and|BREAK)(?!\w)", re.IGNORECASE)


def wishes(
    prompt: str, words: Sequence[Sequence[str]], own: Sequence[str]
) -> list[tuple[float, float] | None]:
    """For each LoRA where the prompt wants it, (x, y) in parts of the picture and perhaps outside of it; None if it does not say.

    A word such as *left* counts for the trigger word before it in the same part of a sentence, or else for the one after it.

    Args:
        words: each LoRA's trigger words. own: each LoRA's own words, in which all is said of it.
    """
    asked: list[list[str]] = [_SIDE.findall(each) for each in own]
    for clause in _CLAUSE.split(prompt):
        spots = sorted(
            (match.start(), number)
            for number, each in enumerate(words)
            for word in called(each, clause)
            for match in re.finditer(re.escape(word), clause, re.IGNORECASE)
        )
        for side in _SIDE.finditer(clause) if spots else ():
            before = [number for start, number in spots if start < side.start()]
            asked[before[-1] if before else spots[0][1]].append(side[0])
    return [_towards(sides) for sides in asked]


def _towards(sides: Sequence[str]) -> tuple[float, float] | None:
    """The point that words such as *top* and *left* name together."""
    known = [_SIDES[side.lower()] for side in sides]
    across = [x for x, _ in known if x is not None]
    down = [y for _, y in known if y is not None]
    return (across[-1] if across else 0.5, down[-1] if down else 0.5) if known else None


def _box(part: str, value: str, lora: str) -> Box:
    name = ALIASES.get(part, part)
    if name in NAMED:
        return NAMED[name]
    numbers = [_number(each) for each in part.split(",")]
    if len(numbers) != 4:
        near = difflib.get_close_matches(part, [*NAMED, AUTO], n=1)
        hint = f"{part!r} is not one of {', '.join(NAMED)}"
        raise _wrong(value, lora, hint + (f" (did you mean {near[0]}?)" if near else ""))
    box = Box(*numbers)
    if not all(0 <= each <= 1 for each in box):
        raise _wrong(value, lora, "x0,y0,x1,y1 must be fractions of the picture, from 0 to 1")
    if box.x0 >= box.x1 or box.y0 >= box.y1:
        raise _wrong(
            value, lora, f"the box {part} is empty: x1 must be greater than x0, and y1 greater than y0"
        )
    return box


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _wrong(value: str, lora: str, why: str) -> LoratorioError:
    return LoratorioError(
        f"The place at={value} of LoRA {lora} cannot be read: {why}. "
        "Examples: at=left, at=top+centre, at=0,0,0.5,1~0.1, at=auto."
    )
