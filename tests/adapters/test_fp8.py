"""LoRAs in 8-bit floating point, as a WebUI hands them over: the same as their values in float32, also beside others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, Delta, Dense, LowRank
from loratorio.errors import LoratorioError

from .layers import relative_error

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def deltas(kind: str, seed: int, dtype: torch.dtype) -> list[Delta]:
    random = torch.Generator().manual_seed(seed)

    def normal(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=random).to(dtype)

    if kind == "dense":
        return [Dense(normal(6, 5), normal(6))]
    if kind == "two":
        return [
            LowRank(normal(2, 5), normal(6, 2), 0.5),
            LowRank(normal(3, 5), normal(6, 3)),
            Dense(normal(6, 5)),
        ]
    return [LowRank(normal(2, 5), normal(6, 2), 0.5)]


def in_float32(delta: Delta) -> Delta:
    if isinstance(delta, LowRank):
        return LowRank(delta.down.float(), delta.up.float(), delta.scale)
    return Dense(
        None if delta.weight is None else delta.weight.float(),
        None if delta.bias is None else delta.bias.float(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["low-rank", "dense", "two"])
def test_the_same_as_in_float32(dtype: torch.dtype, kind: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    own = [deltas(kind, seed, dtype) for seed in (0, 1)]
    eight = [Adapter("x", {"0": own[0]}), Adapter("y", {"0": [in_float32(each) for each in own[1]]})]
    full = [Adapter("x", {"0": [in_float32(each) for each in own[0]]}), eight[1]]
    rows, outputs = torch.randn(3, 5), []
    for adapters in (eight, full):
        bank = Bank(adapters)
        with bank.attached(dict(model.named_modules())), bank.routed([(1.0, 0.0), (0.5, 0.5), (0.0, 0.0)]):
            outputs.append(model(rows))
    assert relative_error(outputs[0], outputs[1]) < 1e-6
    assert not eight[0].changes_nothing
    assert eight[0].size == full[0].size


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_and_nan_are_told_apart(dtype: torch.dtype) -> None:
    nothing = Adapter("x", {"0": [LowRank(torch.ones(2, 5).to(dtype), torch.zeros(6, 2).to(dtype))]})
    assert nothing.changes_nothing
    nothing.check_numbers()
    broken = Adapter(
        "x", {"0": [LowRank(torch.full((2, 5), float("nan")).to(dtype), torch.ones(6, 2).to(dtype))]}
    )
    with pytest.raises(LoratorioError, match="LoRA x contains NaN"):
        broken.check_numbers()


@pytest.mark.parametrize(
    "delta",
    [
        LowRank(torch.full((2, 5), 1e30), torch.ones(6, 2)),
        LowRank(torch.full((2, 5), 1e20), torch.full((6, 2), 1e20)),
        LowRank(torch.full((2, 5), 6e4), torch.full((6, 2), 6e4)),
        LowRank(torch.ones(2, 5), torch.ones(6, 2), scale=1e12),
        Dense(weight=torch.full((6, 5), -1e6)),
        Dense(bias=torch.full((6,), 1e38)),
    ],
)
def test_numbers_that_no_picture_can_be_made_of_are_said_by_name(delta: LowRank | Dense) -> None:
    with pytest.raises(LoratorioError, match=r"LoRA huge changes the layer 0 by values up to"):
        Adapter("huge", {"0": [delta]}).check_numbers()


def test_large_numbers_of_real_loras_are_no_matter() -> None:
    Adapter("x", {"0": [LowRank(torch.full((128, 5), 50.0), torch.full((6, 128), 50.0))]}).check_numbers()
    Adapter("x", {"0": [Dense(weight=torch.full((6, 5), 500.0))]}).check_numbers()
