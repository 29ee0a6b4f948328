"""One cell of the real thing: the toybox on the standalone host, judged by its classifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.bench.backend import ToyboxBackend, do_cell
from loratorio_lab.bench.plan import METHOD_ROWS, ROLE_ROWS, Cell, cells
from loratorio_lab.chosen_toybox import chosen_toybox
from loratorio_lab.toybox import classifier
from loratorio_lab.toybox.world import World

whole = all(file.exists() for file in (toybox.CHECKPOINT, toybox.LORA_DIR, classifier.FILE))
pytestmark = pytest.mark.skipif(not whole, reason="the toybox's model, LoRAs or classifier are not there")


@pytest.fixture(scope="module")
def backend() -> ToyboxBackend:
    return ToyboxBackend(chosen_toybox())


def test_cells_of_the_toybox(backend: ToyboxBackend) -> None:
    sampling = {"steps": 2, "cfg": 3.0, "sampler": "euler"}
    grid = cells([METHOD_ROWS[0], METHOD_ROWS[-1]], [("ghost", "night")], 2, sampling, truths=0)
    results = [do_cell(backend, cell) for cell in grid]
    assert [len(result.images) for result in results] == [2, 2]
    assert [result.model_rows for result in results] == [2 * 2 * 2, 2 * 2 * 6]
    assert all(len(image.features) == classifier.WIDTH for result in results for image in result.images)


def test_rendered_truth_is_what_the_art_shows(backend: ToyboxBackend, world: World) -> None:
    drawn = ToyboxBackend(replace(chosen_toybox(), world=world))
    (cell,) = cells([], [("ghost", "night")], 2, {}, truths=3)
    pictures, rows = drawn.generate(cell)
    assert rows == 0
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 3
    with pytest.raises(LoratorioError, match="--art"):
        backend.generate(cell)


def test_prompts_name_the_elements(backend: ToyboxBackend) -> None:
    grid = cells(METHOD_ROWS[:1], [("ghost", "ink")], 1, {})
    prompt = backend.prompt(grid[1])
    assert "boolio" in prompt
    assert "inkash" in prompt
    assert "<lora:ghost> <lora:ink>" in prompt


def test_styles_have_the_role_that_the_row_is_about(backend: ToyboxBackend) -> None:
    always = next(row for row in ROLE_ROWS if row.role == "always")
    prompt = backend.prompt(cells([always], [("ghost", "ink")], 1, {})[1])
    assert "<lora:ghost> <lora:ink:role=always>" in prompt


def test_wide_pictures_have_a_part_for_each_character_and_are_judged_by_parts(
    backend: ToyboxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"steps": 1, "cfg": 3.0, "sampler": "euler"}
    for names, width in (
        (("ghost", "turtle", "night"), 192),
        (("ghost", "turtle", "tiger"), 192),
        (("ghost", "turtle", "tiger", "octopus"), 256),
    ):
        pictures, _ = backend.generate(Cell("", names, 0, 1, sampling, beside="placed common"))
        assert [picture.shape for picture in pictures] == [(128, width, 3)]

    def by_brightness(pictures: np.ndarray, _: object) -> list[dict[str, bool]]:
        return [{"ghost": each.mean() > 100, "tiger": each.mean() < 100, "owl": True} for each in pictures]

    monkeypatch.setattr(classifier, "classify", by_brightness)
    shades = np.repeat([[200, 0, 200, 0], [0, 200, 0, 200]], 64, axis=1)
    four = np.broadcast_to(shades[:, None, :, None], (2, 128, 256, 3)).astype(np.uint8)
    names = ("ghost", "turtle", "tiger", "octopus")
    judged = backend.classify(list(four), Cell("", names, 0, 2, sampling, beside="placed common"))
    assert [found for found, _ in judged] == [
        ("1:ghost", "2:tiger", "3:ghost", "4:tiger"),
        ("1:tiger", "2:ghost", "3:tiger", "4:ghost"),
    ]
    assert all(features.shape == (classifier.WIDTH,) for _, features in judged)
