"""What composing costs."""

from __future__ import annotations

import pytest

from loratorio.compose.methods import METHODS
from loratorio.sampling.cost import plain_steps
from loratorio.settings import PRESETS, Settings


def test_rows_that_can_be_counted_by_hand() -> None:
    def of(count: int, **values: object) -> float:
        return plain_steps(Settings.from_mapping({"enabled": True, "reuse": 1, "share": 0, **values}), count)

    # The base's two rows, and two of each LoRA; without the base's unconditional row; without the LoRAs'.
    assert of(3, recentre=0.5) == (2 + 2 * 3) / 2
    assert of(3, recentre=0.0) == (1 + 2 * 3) / 2
    assert of(3, recentre=1.0) == (2 + 3) / 2
    # One LoRA alone needs no comparison.
    assert of(1, recentre=0.0) == 1
    assert of(3, method="merge") == of(5, method="switch") == 1
    assert of(4, method="composite") == 4
    # Half of the steps merged.
    assert of(3, recentre=0.5, end=0.5) == (4 + 1) / 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_counted(method: str) -> None:
    costs = [plain_steps(Settings(enabled=True, method=method), count) for count in range(1, 9)]
    assert costs == sorted(costs)
    # One LoRA alone: the rows for the negative prompt are reused.
    assert costs[0] >= 0.9
    assert costs[-1] <= 9


def test_presets_in_the_order_of_their_speed() -> None:
    paper, balanced, fast = (
        plain_steps(Settings.from_mapping({"enabled": True, "preset": name}), 3) for name in PRESETS
    )
    assert paper > balanced > fast > 1
