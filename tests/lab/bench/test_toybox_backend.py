"""One cell of the real thing: the toybox on the standalone host, judged by its classifier."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.bench.backend import ToyboxBackend, do_cell
from loratorio_lab.bench.plan import METHOD_ROWS, ROLE_ROWS, cells
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
