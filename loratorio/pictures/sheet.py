"""Grids of labelled pictures. Pillow alone, of any version that a WebUI has."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (32, 33, 36)
FAINT = (110, 114, 120)
_GAP = 10


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """A font of about `size` pixels: matplotlib's DejaVu Sans if it is there (it has most alphabets), else Pillow's own."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one small bitmap font
        return ImageFont.load_default()


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of a line, in pixels."""
    left, _, right, _ = font(size).getbbox(_drawable(text, size))
    return int(right - left), int(size * 1.35)


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: tuple[int, ...] = INK
) -> None:
    """One line with its upper left corner at `at`."""
    draw.text(at, _drawable(text, size), font=font(size), fill=ink)


def _drawable(text: str, size: int) -> str:
    """The text without letters that Pillow's old bitmap font would stumble over."""
    is_truetype = isinstance(font(size), ImageFont.FreeTypeFont)
    return text if is_truetype else text.encode("latin-1", "replace").decode("latin-1")


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, cut between words, and within a word only where it is too long itself."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and text_size(longer, size)[0] > width:
                lines.append(line)
                line = word
            else:
                line = longer
            while text_size(line, size)[0] > width and len(line) > 1:
                cut = next(
                    n for n in range(len(line) - 1, 0, -1) if n == 1 or text_size(line[:n], size)[0] <= width
                )
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def enlarged(picture: Image.Image, least: int) -> Image.Image:
    """The picture a whole number of times as large, so that its shorter side has at least about `least` pixels."""
    factor = max(1, round(least / min(picture.size)))
    filter = Image.Resampling.NEAREST if factor > 4 else Image.Resampling.BICUBIC
    return picture.resize((picture.width * factor, picture.height * factor), filter)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str],
    row_labels: Sequence[str] = (),
    title: str = "",
    cell: int = 256,
    per_line: int = 0,
) -> Image.Image:
    """A grid of pictures with a title, column labels and row labels.

    Args:
        rows: pictures of one size; None leaves a cell empty.
        cell: how wide a picture is at least, in pixels.
        per_line: break after so many columns, each block with its own labels; 0 never breaks.
    """
    rows = [[None if each is None else enlarged(each, cell) for each in row] for row in rows]
    first = next(each for row in rows for each in row if each is not None)
    size = max(14, first.width // 16)
    per_line = per_line or len(columns)
    blocks = [slice(start, start + per_line) for start in range(0, len(columns), per_line)]
    margin = max((text_size(label, size)[0] for label in row_labels), default=-_GAP) + 2 * _GAP
    width = margin + min(per_line, len(columns)) * (first.width + _GAP)
    title_lines = wrapped(title, size, width - 2 * _GAP) if title else []
    label_lines = [wrapped(label, size, first.width) for label in columns]
    line_height = text_size("Ag", size)[1]
    heights = [
        max(len(lines) for lines in label_lines[block]) * line_height
        + len(rows) * (first.height + _GAP)
        + _GAP
        for block in blocks
    ]
    sheet = Image.new("RGB", (width, _GAP * 2 + len(title_lines) * line_height + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for line in title_lines:
        draw_text(draw, (_GAP, y), line, size, INK)
        y += line_height
    for block, height in zip(blocks, heights, strict=True):
        _draw_block(sheet, [row[block] for row in rows], label_lines[block], row_labels, (margin, y), size)
        y += height
    return sheet


def _draw_block(
    sheet: Image.Image,
    rows: Sequence[Sequence[Image.Image | None]],
    labels: Sequence[Sequence[str]],
    row_labels: Sequence[str],
    corner: tuple[int, int],
    size: int,
) -> None:
    draw = ImageDraw.Draw(sheet)
    first = next(each for row in rows for each in row if each is not None)
    line_height = text_size("Ag", size)[1]
    x0, y0 = corner
    depth = max(len(lines) for lines in labels)
    for column, lines in enumerate(labels):
        for i, line in enumerate(lines):
            draw_text(
                draw,
                (x0 + column * (first.width + _GAP), y0 + (depth - len(lines) + i) * line_height),
                line,
                size,
            )
    y0 += depth * line_height + _GAP // 2
    for number, row in enumerate(rows):
        y = y0 + number * (first.height + _GAP)
        if number < len(row_labels):
            draw_text(draw, (_GAP, y + (first.height - size) // 2), row_labels[number], size, FAINT)
        for column, picture in enumerate(row):
            if picture is not None:
                sheet.paste(picture, (x0 + column * (first.width + _GAP), y))
