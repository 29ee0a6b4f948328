"""The artists' drawings, from their npm packages. The art itself is not part of this repository."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from loratorio.errors import LoratorioError

Colour = tuple[int, int, int]
Floats = NDArray[np.float32]

DETAIL = 192
"""Height and width at which a drawing is kept, pixels. It is scaled down from there."""

EMBER: tuple[tuple[float, ...], tuple[Colour, ...]] = (
    (0.0, 90.0, 150.0, 205.0, 255.0),
    ((44, 8, 76), (150, 26, 96), (236, 84, 44), (255, 172, 56), (255, 244, 206)),
)
"""Luminances and the colours that they become."""

PAPER = (250, 248, 240)
HALO = 7
"""Width of the paper around an inked figure at `DETAIL`, pixels, so that it shows on a dark scene."""


@dataclass(frozen=True)
class Artist:
    """A set of drawings: npm's package `@iconify-json/NAME`, its artist and its licence."""

    name: str
    by: str
    licence: str


ARTISTS = {
    artist.name: artist
    for artist in (
        Artist("noto", "Google (Noto Emoji)", "Apache 2.0"),
        Artist("twemoji", "Twitter and jdecked (Twemoji)", "CC BY 4.0"),
        Artist("emojione", "EmojiOne 2 and EmojiTwo", "CC BY 4.0"),
        Artist("fluent-emoji", "Microsoft (Fluent Emoji)", "MIT"),
        Artist("fluent-emoji-flat", "Microsoft (Fluent Emoji)", "MIT"),
        Artist("fluent-emoji-high-contrast", "Microsoft (Fluent Emoji)", "MIT"),
        Artist("streamline-emojis", "Streamline (Streamline Emojis)", "CC BY 4.0"),
    )
}
INK, OUTLINED = "fluent-emoji-high-contrast", "streamline-emojis"
"""Artists who draw in black and white, and in outlines."""


class Art:
    """The packages in a folder, one folder each under its name: `npm pack @iconify-json/NAME`, unpacked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sets: dict[str, dict[str, Any]] = {}
        for name in ARTISTS:
            file = folder / name / "icons.json"
            if not file.exists():
                raise LoratorioError(
                    f"{file} is missing. Unpack npm's @iconify-json/{name} there; docs/lab/TOYBOX.md says how."
                )
            self._sets[name] = json.loads(file.read_text())
        self.drawing = lru_cache(maxsize=None)(
            lambda artist, icon: self._once(self._drawing, artist, icon).convert("RGBa")
        )
        """The figure of an artist and an icon, cut out, in the middle of a square of its longer side; premultiplied."""
        self.scene = lru_cache(maxsize=None)(lambda artist, icon: self._once(self._scene, artist, icon))
        """A whole-frame scene of an artist and an icon without its rounded corners and frame, RGB."""

    def _svg(self, artist: str, icon: str) -> str:
        made = self._sets[artist]
        while icon in made.get("aliases", {}):
            icon = made["aliases"][icon]["parent"]
        found = made["icons"][icon]
        width, height = (found.get(side, made.get(side, 16)) for side in ("width", "height"))
        box = f"{found.get('left', 0)} {found.get('top', 0)} {width} {height}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}" color="black">{found["body"]}</svg>'
        )

    def _whole(self, artist: str, icon: str) -> Image.Image:
        import resvg_py

        png = resvg_py.svg_to_bytes(
            svg_string=self._svg(artist, icon), width=DETAIL, height=DETAIL, skip_system_fonts=True
        )
        whole = Image.open(io.BytesIO(png)).convert("RGBA")
        return whole.crop(whole.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())

    def _once(self, draw: Callable[[str, str], Image.Image], artist: str, icon: str) -> Image.Image:
        """What `draw` draws. It takes tens of milliseconds, so the package's folder keeps it."""
        file = self._folder / artist / f"drawn{DETAIL}{draw.__name__}" / f"{icon}.png"
        if file.exists():
            with Image.open(file) as kept:
                return kept.copy()
        made = draw(artist, icon)
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.png")
        made.save(part)
        part.replace(file)
        return made

    def _drawing(self, artist: str, icon: str) -> Image.Image:
        cut = self._whole(artist, icon)
        side = max(cut.size)
        square = Image.new("RGBA", (side, side))
        square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        return on_paper(square) if artist == INK else square

    def _scene(self, artist: str, icon: str) -> Image.Image:
        cut = self._whole(artist, icon)
        inset = 0.12 if artist == INK else 0.085
        across, down = round(cut.width * inset), round(cut.height * inset)
        inner = cut.crop((across, down, cut.width - across, cut.height - down))
        paper = Image.new("RGBA", inner.size, PAPER)
        return Image.alpha_composite(paper, inner).convert("RGB")


def on_paper(figure: Image.Image) -> Image.Image:
    """The figure with paper behind its holes and a little around it, RGBA; larger by the halo."""
    side = figure.width + 2 * HALO + 2
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(figure, (HALO + 1, HALO + 1))
    # The outside is found at a third of the size: filling is slow.
    outside = canvas.getchannel("A").point(lambda a: 255 * (a > 100)).filter(ImageFilter.MaxFilter(3))
    outside = outside.resize((side // 3, side // 3), Image.Resampling.BOX).point(lambda a: 255 * (a > 40))
    ImageDraw.floodfill(outside, (0, 0), 128)
    inside = outside.point(lambda a: 255 * (a != 128)).resize(canvas.size, Image.Resampling.BICUBIC)
    inside = inside.filter(ImageFilter.MaxFilter(2 * HALO - 3))
    paper = Image.new("RGBA", canvas.size)
    paper.paste((*PAPER, 255), mask=inside)
    return Image.alpha_composite(paper, canvas)


def paste(picture: np.ndarray, figure: Image.Image, x: float, y: float, side: float, mirrored: bool) -> None:
    """Draw a premultiplied square figure onto `picture` (H, W, 3) float32, around (x, y), `side` pixels wide; what lies outside is cut."""
    size = max(1, round(side))
    shown = figure.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3)
    if mirrored:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = round(x - size / 2), round(y - size / 2)
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, width), min(top + size, height)
    if x0 < x1 and y0 < y1:
        part = np.asarray(shown, np.float32)[y0 - top : y1 - top, x0 - left : x1 - left]
        seen = picture[y0:y1, x0:x1]
        seen *= 1 - part[..., 3:] / 255
        seen += part[..., :3]


def cover(scene: Image.Image, width: int, height: int, phase: float, mirrored: bool) -> np.ndarray:
    """The scene over a whole frame, (height, width, 3) float32. `phase` in [0, 1] moves the window."""
    ratio = max(width / scene.width, height / scene.height)
    seen = (width / ratio, height / ratio)
    left, top = ((scene.width - seen[0]) * phase, (scene.height - seen[1]) * phase)
    shown = scene.resize(
        (width, height), Image.Resampling.BICUBIC, box=(left, top, left + seen[0], top + seen[1])
    )
    if mirrored:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(shown, np.float32)


def duotone(picture: Floats) -> Floats:
    """Luminance on a ramp of colours, from deep purple over glowing orange to pale yellow."""
    stops, ramp = EMBER
    colours = np.array(ramp, np.float32)
    return np.stack([np.interp(_luminance(picture), stops, colours[:, c]) for c in range(3)], axis=-1)


def inked(picture: Floats) -> Floats:
    """Edges and what is dark as black ink on paper."""
    dark = ((70 - _luminance(picture)) / 25).clip(0, 1)
    return _mixed(PAPER, (20, 18, 22), np.maximum(dark, edges(picture, 1.0, 9, 14)))


def outlined(picture: Floats) -> Floats:
    """Pale colours in fine outlines."""
    return _mixed(255 - (255 - picture) * 0.38, (86, 64, 84), 0.85 * edges(picture, 0.8, 8, 16))


def neon(picture: Floats) -> Floats:
    """Edges as glowing lines of their own colour in the dark."""
    line = edges(picture, 0.9, 8, 18)
    glow = np.maximum(line, 0.88 * blurred(255 * line, 2.5) / 255)
    bright = picture / np.maximum(picture.max(axis=-1, keepdims=True), 1) * 255
    colour = np.stack(
        [blurred((255 - (255 - bright[..., c]) * 1.5).clip(0, 255), 1.5) for c in range(3)], axis=-1
    )
    return _mixed(np.array((22, 10, 44), np.float32) + picture * 0.06, colour, glow)


STYLES: dict[str, Callable[[Floats], Floats]] = {
    "neon": neon,
    "ink": inked,
    "outline": outlined,
    "ember": duotone,
}
"""The styles: each redraws a whole picture, (H, W, 3) float32 from 0 to 255."""


def edges(picture: Floats, radius: float, least: float, soft: float) -> Floats:
    """How much of an edge each pixel is, from 0 to 1: the steepest channel of the blurred picture, from `least` values per pixel on."""
    slopes = [np.hypot(*np.gradient(blurred(picture[..., c], radius))) for c in range(3)]
    steepest: Floats = np.max(slopes, axis=0)
    return ((steepest - least) / soft).clip(0, 1)


def blurred(channel: Floats, radius: float) -> Floats:
    """(H, W) from 0 to 255, rounded to whole values, blurred."""
    image = Image.fromarray(channel.clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def _mixed(below: Floats | Colour, above: Floats | Colour, part: Floats) -> Floats:
    """Pictures, or colours, of which the one above covers `part`, (H, W), of the other."""
    colours = np.asarray(below, np.float32), np.asarray(above, np.float32)
    made: Floats = colours[0] + (colours[1] - colours[0]) * part[..., None]
    return made


def _luminance(picture: Floats) -> Floats:
    made: Floats = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    return made
