"""The loader reads the packages' layout, cuts figures out and lays paper under ink."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from loratorio.errors import LoratorioError
from loratorio_lab.toybox.art import ARTISTS, HALO, PAPER, Art, cover, on_paper, paste


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Packages with a red bar, 20 by 10 of 40, a name for it, and a scene."""
    bar = '<path fill="#f00" d="M10 15h20v10H10z"/>'
    scene = '<path fill="#00f" d="M0 0h40v40H0z"/>'
    icons = {"width": 40, "height": 40, "icons": {"bar": {"body": bar}, "sea": {"body": scene}}}
    for name in ARTISTS:
        (tmp_path / name).mkdir()
        text = json.dumps({**icons, "aliases": {"stick": {"parent": "bar"}}})
        (tmp_path / name / "icons.json").write_text(text)
    return tmp_path


def test_a_missing_package_is_named(folder) -> None:
    (folder / "twemoji" / "icons.json").unlink()
    with pytest.raises(LoratorioError, match="iconify-json/twemoji"):
        Art(folder)


def test_a_drawing_is_cut_out_and_square(folder) -> None:
    pytest.importorskip("resvg_py")
    art = Art(folder)
    assert art.has("noto", "stick")
    assert not art.has("noto", "ball")
    assert np.array_equal(art.drawing("noto", "stick"), Art(folder).drawing("noto", "stick"))  # drawn; kept
    drawing = art.drawing("noto", "stick")
    assert drawing.mode == "RGBa"
    assert drawing.width == drawing.height == pytest.approx(96, abs=2)
    pixels = np.asarray(drawing)
    assert tuple(pixels[48, 48]) == (255, 0, 0, 255)
    assert pixels[4, 48, 3] == 0
    assert np.asarray(art.scene("noto", "sea"))[50, 50].tolist() == [0, 0, 255]


def test_ink_has_paper_in_its_holes_and_around_it() -> None:
    ring = Image.new("RGBA", (120, 120))
    ImageDraw.Draw(ring).ellipse((10, 10, 110, 110), outline=(0, 0, 0, 255), width=8)
    made = np.asarray(on_paper(ring))
    middle = 60 + HALO + 1
    assert tuple(made[middle, middle]) == (*PAPER, 255)
    assert tuple(made[middle, HALO + 1 + 14]) == (0, 0, 0, 255)
    assert tuple(made[middle, HALO + 1 + 10 - 3]) == (*PAPER, 255)
    assert made[2, 2, 3] == 0


def test_a_figure_at_the_edge_is_cut() -> None:
    figure = Image.new("RGBa", (10, 10), (200, 0, 0, 255))
    picture = np.full((20, 30, 3), 100, np.float32)
    paste(picture, figure, 0, 10, 10, mirrored=False)
    assert picture[10, 2].tolist() == [200, 0, 0]
    assert picture[10, 6].tolist() == [100, 100, 100]
    assert picture[2, 2].tolist() == [100, 100, 100]
    paste(picture, figure, -50, 10, 10, mirrored=False)


def test_a_scene_covers_the_frame_and_moves() -> None:
    scene = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    left, right = (cover(scene, 40, 40, phase, False) for phase in (0.0, 1.0))
    assert left.shape == (40, 40, 3)
    assert left.mean() + 45 < right.mean()
    assert np.allclose(cover(scene, 40, 40, 0.0, True), left[:, ::-1])
