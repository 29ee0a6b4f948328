"""Weight maps, labelled grids and the infotext's form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loratorio.pictures import sheet
from loratorio.pictures.infotext import infotext
from loratorio.pictures.maps import COLOURS, overlay, render
from loratorio.pictures.sheet import contact_sheet, text_size, wrapped

GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def halves() -> torch.Tensor:
    """Ω of two LoRAs, (2, 8, 8): the first has the left half, the second the right."""
    weights = torch.zeros(2, 8, 8)
    weights[0, :, :4] = 1
    weights[1, :, 4:] = 1
    return weights


def test_each_half_has_its_loras_colour() -> None:
    tinted = np.asarray(overlay(GREY, halves(), range(2))).astype(float)
    for side, colour in ((tinted[:, :32], COLOURS[0]), (tinted[:, 32:], COLOURS[1])):
        assert (side.std(axis=(0, 1)) == 0).all()
        assert np.argsort(side[0, 0]).tolist() == np.argsort(colour).tolist()


def test_the_dominant_lora_gives_the_colour_and_how_decided_it_is_the_strength() -> None:
    weights = np.zeros((3, 1, 4), np.float32)
    weights[:, 0, 0] = 1, 0, 0  # alone
    weights[:, 0, 1] = 0.6, 0.3, 0.1
    weights[:, 0, 2] = 0.34, 0.33, 0.33  # nearly level
    weights[:, 0, 3] = 0, 0, 0  # none may act here
    tinted = np.asarray(overlay(GREY, weights, range(3))).astype(float)
    pixels = [tinted[32, 8 + 16 * i] for i in range(4)]
    grey = pixels[3]
    assert grey.std() == 0
    ways = [pixel - grey for pixel in pixels[:3]]
    strengths = [float(np.linalg.norm(way)) for way in ways]
    assert strengths == sorted(strengths, reverse=True)
    assert strengths[2] > 0.2 * strengths[0]
    # Always towards the first one's colour: nothing is mixed.
    for way in ways:
        assert np.dot(way, ways[0]) > 0.97 * np.linalg.norm(way) * strengths[0]


def test_colours_can_be_told_apart() -> None:
    """Distances in Oklab, as Ottosson defines it: of the twenty about as far as Okabe and Ito's seven are from each other."""
    linear = np.array([[_linear(value / 255) for value in colour] for colour in COLOURS])
    cones = np.cbrt(
        linear
        @ np.array(
            [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
             [0.0514459929, 0.1073969566, 0.6299787005]]
        )
    )  # fmt: skip
    lab = cones @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
    assert len(COLOURS) == 20
    assert apart.min() > 0.15


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def test_one_lora_leaves_the_rest_grey() -> None:
    tinted = np.asarray(overlay(GREY, halves().half(), [0]))
    assert (tinted[:, 32:] == tinted[0, 40, 0]).all()
    assert not (tinted[:, :32] == tinted[0, 0, 0]).all()


@pytest.mark.parametrize("size", [(64, 64), (72, 104), (512, 300)])
def test_a_map_for_all_and_one_for_each(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    maps = render([halves()] * 20, ["rose", "a name that is far too long for one line " * 3], picture)
    assert len(maps) == 3
    (alone,) = render(
        [halves()] * 20, ["rose", "a name that is far too long for one line " * 3], picture, single=False
    )
    assert (np.asarray(alone) == np.asarray(maps[0])).all()
    assert len({each.width for each in maps}) == 1
    assert all(each.mode == "RGB" and each.height > each.width * size[1] / size[0] for each in maps)


def test_one_lora_has_one_map() -> None:
    assert len(render([np.ones((1, 4, 4), np.float16)], ["rose"], GREY, [3])) == 1


def test_a_style_hides_nothing_in_the_map_of_all() -> None:
    """It acts in the others' passes: its weight of 1 everywhere comes on top of theirs."""
    without = torch.cat([halves(), torch.zeros(1, 8, 8)])
    beside = torch.cat([halves(), torch.ones(1, 8, 8)])
    names = ["rose", "cat", "ink"]
    first = torch.cat([halves() * 0.5, torch.full((1, 8, 8), 0.5)])  # a step in which it is not found yet
    plain, *singles = render([first, without], names, GREY)
    styled, *styled_singles = render([first, beside], names, GREY, styles={2})
    legend = 4 * 20  # where the names stand
    assert (np.asarray(plain)[legend:] == np.asarray(styled)[legend:]).all()
    assert (np.asarray(plain)[:legend] != np.asarray(styled)[:legend]).any()
    hidden = render([first, beside], names, GREY)[0]
    assert (np.asarray(hidden)[legend:] != np.asarray(styled)[legend:]).any()
    # Its own map shows that it is everywhere; the others' are as before.
    assert all((np.asarray(singles[i]) == np.asarray(styled_singles[i])).all() for i in range(2))
    assert (np.asarray(singles[2]) != np.asarray(styled_singles[2])).any()


@pytest.mark.parametrize(
    ("weights", "names"), [([], ["a"]), ([halves()], ["a"]), ([halves()[0]], ["a", "b"])]
)
def test_what_does_not_fit(weights: list[torch.Tensor], names: list[str]) -> None:
    with pytest.raises(ValueError, match="names"):
        render(weights, names, GREY)


def test_with_the_one_small_font_of_an_old_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFont

    sheet.font.cache_clear()
    monkeypatch.setattr(sheet.importlib.util, "find_spec", lambda name: None)
    old = ImageFont.load_default_imagefont()

    def load_default(*size: int) -> ImageFont.ImageFont:
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return old

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    try:
        assert len(render([halves()], ["猫 rose", "дом"], GREY)) == 3
    finally:
        sheet.font.cache_clear()


@given(st.text(max_size=60), st.integers(30, 200))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    lines = wrapped(text, 14, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(text_size(line, 14)[0] <= width or len(line) == 1 for line in lines)


def test_a_sheet_holds_every_picture() -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    made = contact_sheet(
        [[red, blue, None], [blue, red, red]], ["a", "b", "c"], ["seed 1", "seed 2"], "title", cell=64
    )
    pixels = np.asarray(made)
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() == 3 * 64 * 64
    assert (pixels == (0, 0, 255)).all(axis=-1).sum() == 2 * 64 * 64
    broken = contact_sheet([[red, blue, red]], ["a", "b", "c"], per_line=2, cell=64)
    assert broken.width < made.width
    assert (np.asarray(broken) == (255, 0, 0)).all(axis=-1).sum() == 2 * 64 * 64


def test_infotext_is_the_webuis() -> None:
    fields = {"Steps": 20, "Model": None, "LoRAs": "a:1, b:0.5", "Size": "64x64"}
    assert (
        infotext("a cat", "dogs", fields)
        == 'a cat\nNegative prompt: dogs\nSteps: 20, LoRAs: "a:1, b:0.5", Size: 64x64'
    )
    assert infotext("a cat", "", {"Steps": 1}) == "a cat\nSteps: 1"
