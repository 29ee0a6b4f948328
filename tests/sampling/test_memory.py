"""Rows by measured memory, on a simulated device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
import torch
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.memory import MARGIN, MeasuredRows, measured_rows
from loratorio.sampling.step import Step
from tests.published import paper

LATENTS = torch.zeros(1, 4, 4, 4)


class Device:
    """So many bytes, of which a row of the model needs `cost` for as long as a call lasts."""

    def __init__(self, total: int, cost: int, held: int = 100) -> None:
        self.total, self.cost, self.held = total, cost, held
        self.highest = 10**9  # of something that ran before us
        self.calls: list[int] = []

    def allocated(self) -> int:
        return self.held

    def peak(self) -> int:
        return self.highest

    def reset_peak(self) -> None:
        self.highest = self.held

    def free(self) -> int:
        return self.total - self.held

    def predict(self, rows: Sequence[Row]) -> Tensor:
        self.calls.append(len(rows))
        self.highest = max(self.highest, self.held + self.cost * len(rows))
        return torch.stack([torch.full(LATENTS.shape[1:], float(1 + sum(row.mix))) for row in rows])


def run(device: Device, costs: dict[Hashable, float], steps: int = 2, size: Hashable = "512") -> Tensor:
    bank = Bank([Adapter(name, {}) for name in "abc"])
    engine = Engine(paper(recentre=0.5, reuse=1), bank)
    engine.calls.memory = MeasuredRows(device, size, 2, costs)
    for index in range(steps):
        result = engine.step(Step(index, 20, LATENTS, 1), device.predict)
    return result.cond


def test_the_first_call_is_a_plain_steps_and_the_next_take_what_fits() -> None:
    device = Device(total=100 + 560, cost=100)
    costs: dict[Hashable, float] = {}
    picture = run(device, costs)
    assert costs == {"512": 100}
    # 560 bytes, of which a tenth is left alone, hold 5 rows of 100.
    assert device.calls == [2, 5, 1, 5, 3]
    assert torch.equal(picture, run(Device(10**9, 1), {}))


def test_what_was_learnt_holds_for_the_next_picture_of_the_size_alone() -> None:
    device = Device(total=10**6, cost=100)
    costs: dict[Hashable, float] = {}
    run(device, costs, steps=1)
    run(device, costs, steps=1)
    run(device, costs, steps=1, size="1024")
    assert device.calls == [2, 6, 8, 2, 6]


@pytest.mark.parametrize("free", [0, 50, 100])
def test_a_single_row_is_always_tried(free: int) -> None:
    device = Device(total=100 + free, cost=100)
    run(device, {"512": 100.0}, steps=1)
    assert device.calls == [1] * 8


def test_a_call_that_fails_teaches_nothing() -> None:
    costs: dict[Hashable, float] = {}
    rows = MeasuredRows(Device(1000, 1), "512", 2, costs)
    with pytest.raises(RuntimeError), rows.observed(2):
        raise RuntimeError("out of memory")
    assert not costs
    assert 0 < MARGIN < 1


def test_devices_without_such_counts_are_not_measured() -> None:
    assert measured_rows(torch.device("cpu"), "512", 2) is None
