"""Stand-ins for the artists' drawings: the tests need no art."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image, ImageDraw

from loratorio.toybox import ELEMENTS
from loratorio_lab.toybox.art import ARTISTS
from loratorio_lab.toybox.subjects import SUBJECTS
from loratorio_lab.toybox.world import World


class PlainArt:
    """Draws all as discs: the colour tells the subject, the ring the artist. Streamline has no scenes."""

    def drawing(self, artist: str, icon: str) -> Image.Image:
        figure = Image.new("RGBA", (64, 64))
        ring = 20 + 30 * list(ARTISTS).index(artist)
        fill = _colour(icon)
        ImageDraw.Draw(figure).ellipse((1, 1, 62, 62), fill=fill, outline=(ring, ring, ring), width=6)
        return figure.convert("RGBa")

    def scene(self, artist: str, icon: str) -> Image.Image:
        assert artist != "streamline-emojis"
        made = Image.new("RGB", (100, 80), _colour(icon))
        ImageDraw.Draw(made).rectangle((0, 40, 100, 80), fill=(20, 90, 40))
        return made


def _colour(icon: str) -> tuple[int, int, int]:
    names = [*SUBJECTS, *(element.name for element in ELEMENTS)]
    place = names.index(icon) if icon in names else len(icon)
    return (40 + 37 * place % 200, 40 + 71 * place % 200, 40 + 13 * place % 200)


@pytest.fixture(scope="session")
def world() -> World:
    art: Any = PlainArt()
    return World(art)
