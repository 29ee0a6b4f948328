"""Weight maps as images: where in the picture, and when in the sampling, each LoRA was used.

Pillow and numpy alone, so that a WebUI can draw them too. Letters in shapes: N LoRAs, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .colours import COLOURS
from .sheet import FAINT, INK, PAPER, draw_text, enlarged, text_size, wrapped

_SIDE = 384  # pixels that a map's shorter side has at least
_MOMENTS = 6  # pictures over time
_GAP = 10


def render(
    weights: Sequence[Any],
    names: Sequence[str],
    picture: Image.Image,
    steps: Sequence[int] = (),
    single: bool = True,
    styles: Collection[int] = (),
) -> list[Image.Image]:
    """Maps of one picture: first all LoRAs in one, each in its colour, then, if asked for, one map per LoRA.

    Every map shows the mean over the sampling large, and below it some moments from the first recorded step to the last.

    Args:
        weights: per recorded step Ω of this picture, (N, h, w): tensors or arrays, of any device and floating dtype.
        names: the LoRAs', N of them.
        picture: the finished picture, under the maps.
        steps: number of each recorded step, from 0; by default they are counted.
        single: whether each of several LoRAs has a map of its own, too.
        styles: which of the names are LoRAs that act in the others' passes, with a weight of 1 everywhere. They have no colour in
            the map of all.

    Raises:
        ValueError: no weights, or not as many names as LoRAs.
    """
    recorded = np.stack([_array(step) for step in weights]) if len(weights) else np.zeros((0, 0, 0, 0))
    if recorded.ndim != 4 or recorded.shape[1] != len(names) or not len(recorded):
        raise ValueError(
            f"weights must be steps of (N, h, w) for the {len(names)} names, not {tuple(recorded.shape)}"
        )
    steps = list(steps) or list(range(len(recorded)))
    base = enlarged(picture.convert("RGB"), _SIDE)
    # Where a style acts in the others' passes, it would hide whose each place is.
    beside: np.ndarray = (recorded > 0.999).all(axis=(2, 3)) & np.isin(range(len(names)), list(styles))
    legend = [
        f"{name}: a style, everywhere" if style else f"{name}: {part * 100:.0f} % of the picture"
        for name, style, part in zip(names, beside.max(axis=0), recorded.mean(axis=(0, 2, 3)), strict=True)
    ]
    others = recorded * ~beside[:, :, None, None]
    maps = [_map(base, others, steps, legend, range(len(names)))]
    if single and len(names) > 1:
        maps += [_map(base, recorded, steps, legend, [number]) for number in range(len(names))]
    return maps


def overlay(picture: Image.Image, weights: Any, numbers: Sequence[int]) -> Image.Image:
    """The picture in grey, tinted where the LoRAs `numbers` of Ω (N, h, w) have weight.

    Of several the one with the most weight gives the colour, the more of it the more decided that is; mixed colours could be mistaken for
    those of other LoRAs. Of a single one there is as much as it has weight.
    """
    array = _array(weights)[list(numbers)]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * 0.75 + 40
    colours = np.array([COLOURS[number % len(COLOURS)] for number in numbers], np.float32)
    colour = _spread(colours[array.argmax(axis=0)], picture.size)
    # A little of the picture shows through even where a LoRA is all there is.
    amount = _spread(_decided(array)[..., None].repeat(3, axis=2), picture.size) * 0.72
    mixed = grey * (1 - amount) + (colour * 0.75 + grey * 0.25) * amount
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8), "RGB")


_LEAST = 0.25
"""The share of its colour that the LoRA with the most weight has where others have as much."""


def _decided(array: np.ndarray) -> np.ndarray:
    """(h, w) from 0 to 1: 1 where one LoRA has all the weight, `_LEAST` where all have the same, 0 where none has any."""
    total = array.sum(axis=0)
    # Styles act everywhere in addition to the others, so the weights may add up to more than 1.
    most = array.max(axis=0)
    if len(array) == 1:
        return np.minimum(most, 1)  # type: ignore[no-any-return]
    share = most / np.maximum(total, 1e-6)
    decided = (share * len(array) - 1) / (len(array) - 1)
    return np.minimum(total, 1) * (_LEAST + (1 - _LEAST) * np.clip(decided, 0, 1))  # type: ignore[no-any-return]


def _map(
    base: Image.Image, recorded: np.ndarray, steps: Sequence[int], legend: Sequence[str], shown: Sequence[int]
) -> Image.Image:
    """One map: legend, large mean, moments over time."""
    size = max(14, base.width // 24)
    line = text_size("Ag", size)[1]
    moments = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(_MOMENTS, len(steps)))})
    columns = min(len(moments), 3)
    small = (base.width - _GAP * (columns - 1)) // columns
    small_height = round(small * base.height / base.width)
    lines = [
        (text, number if i == 0 else None)
        for number in shown
        for i, text in enumerate(wrapped(legend[number], size, base.width - size - _GAP))
    ]
    rows = -(-len(moments) // columns)
    height = 3 * _GAP + len(lines) * line + base.height + rows * (small_height + line + _GAP)
    sheet = Image.new("RGB", (base.width + 2 * _GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _GAP
    for text, number in lines:
        if number is not None:
            box = (_GAP, y + 2, _GAP + size, y + 2 + size)
            draw.rectangle(box, fill=COLOURS[number % len(COLOURS)])
        draw_text(draw, (_GAP + size + _GAP // 2, y), text, size, INK)
        y += line
    y += _GAP // 2
    sheet.paste(overlay(base, recorded.mean(axis=0), shown), (_GAP, y))
    y += base.height + _GAP
    thumbnail = base.resize((small, small_height), Image.Resampling.BICUBIC)
    for i, moment in enumerate(moments):
        corner = (_GAP + i % columns * (small + _GAP), y + i // columns * (small_height + line + _GAP))
        sheet.paste(overlay(thumbnail, recorded[moment], shown), corner)
        draw_text(
            draw,
            (corner[0], corner[1] + small_height),
            f"step {steps[moment] + 1}",
            round(size * 0.85),
            FAINT,
        )
    return sheet


def _spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) over a picture of `size`, each latent pixel a sharp square."""
    width, height = size
    rows = np.minimum(np.arange(height) * values.shape[0] // height, values.shape[0] - 1)
    columns = np.minimum(np.arange(width) * values.shape[1] // width, values.shape[1] - 1)
    return values[rows][:, columns]  # type: ignore[no-any-return]


def _array(weights: Any) -> np.ndarray:
    """A tensor or array as float32."""
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().float().numpy()
    return np.asarray(weights, dtype=np.float32)
