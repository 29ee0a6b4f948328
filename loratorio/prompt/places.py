"""Where in the picture a LoRA may act, from its tag: ``<lora:alice:at=left:0.8>``.

This module reads places; `loratorio.compose.regions` applies them to the weights.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from itertools import pairwise

from ..compose.regions import Box, Place
from ..errors import LoratorioError

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

EDGE = 0.1
"""The default width of a place's border, as a fraction of the picture's shorter side."""

MOST_EDGE = 0.5


def read_place(value: str, lora: str) -> Place | None:
    """The place that a tag's argument names; None where it is the whole picture.

    Args:
        value: a name of `NAMED` or ``x0,y0,x1,y1`` as fractions of the picture; several joined by ``+``; then ``~`` and the
            width of the soft edge. Examples: ``left``, ``left+bottom-right``, ``0,0,0.3,1~0.05``.

    Raises:
        LoratorioError: anything else; the sentence shows correct ones.
    """
    text, tilde, width = value.strip().lower().partition("~")
    boxes = tuple(_box(part.strip(), value, lora) for part in text.split("+"))
    edge = _number(width) if tilde else EDGE
    if not 0 <= edge <= MOST_EDGE:
        raise _wrong(value, lora, f"the edge after ~ must be a number from 0 to {MOST_EDGE:g}")
    return None if _cover_all(boxes) else Place(boxes, edge)


def _cover_all(boxes: Sequence[Box]) -> bool:
    """Whether the boxes cover the whole picture: every field of the grid that their edges make."""
    across = sorted({0.0, 1.0, *(edge for box in boxes for edge in (box.x0, box.x1))})
    down = sorted({0.0, 1.0, *(edge for box in boxes for edge in (box.y0, box.y1))})
    return all(
        any(box.x0 <= left and right <= box.x1 and box.y0 <= top and bottom <= box.y1 for box in boxes)
        for left, right in pairwise(across)
        for top, bottom in pairwise(down)
    )


def _box(part: str, value: str, lora: str) -> Box:
    name = ALIASES.get(part, part)
    if name in NAMED:
        return NAMED[name]
    numbers = [_number(each) for each in part.split(",")]
    if len(numbers) != 4:
        near = difflib.get_close_matches(part, NAMED, n=1)
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
        "Examples: at=left, at=top+centre, at=0,0,0.5,1~0.1."
    )
