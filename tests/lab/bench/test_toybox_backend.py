"""One cell of the real thing: the toybox on the standalone host, judged by its classifier."""

from __future__ import annotations

import pytest

from loratorio import toybox
from loratorio_lab.bench.backend import ToyboxBackend, do_cell
from loratorio_lab.bench.plan import METHOD_ROWS, ROLE_ROWS, TRUTH, cells
from loratorio_lab.chosen_toybox import chosen_toybox
from loratorio_lab.toybox import classifier

whole = all(file.exists() for file in (toybox.CHECKPOINT, toybox.LORA_DIR, classifier.FILE))
pytestmark = pytest.mark.skipif(not whole, reason="the toybox's model, LoRAs or classifier are not there")


@pytest.fixture(scope="module")
def backend() -> ToyboxBackend:
    return ToyboxBackend(chosen_toybox())


def test_cells_of_the_toybox(backend: ToyboxBackend) -> None:
    sampling = {"steps": 2, "cfg": 3.0, "sampler": "euler"}
    chosen = [TRUTH, METHOD_ROWS[0], METHOD_ROWS[-1]]
    grid = cells(chosen[1:], [("robot", "night")], 2, sampling, truth_per_combination=6)
    results = [do_cell(backend, cell) for cell in grid]
    assert [len(result.images) for result in results] == [6, 2, 2]
    truth = results[0]
    found = sum(len(set(image.found) & {"robot", "night"}) for image in truth.images)
    assert found >= 10  # of 12, on pictures that were drawn
    assert [result.model_rows for result in results] == [0, 2 * 2 * 2, 2 * 2 * 6]
    assert all(len(image.features) == classifier.WIDTH for result in results for image in result.images)


def test_prompts_name_the_elements(backend: ToyboxBackend) -> None:
    grid = cells(METHOD_ROWS[:1], [("robot", "ink")], 1, {})
    prompt = backend.prompt(grid[1])
    assert "zorbo" in prompt
    assert "inkash" in prompt
    assert "<lora:robot> <lora:ink>" in prompt


def test_styles_have_the_role_that_the_row_is_about(backend: ToyboxBackend) -> None:
    always = next(row for row in ROLE_ROWS if row.role == "always")
    prompt = backend.prompt(cells([always], [("robot", "ink")], 1, {})[1])
    assert "<lora:robot> <lora:ink:role=always>" in prompt
