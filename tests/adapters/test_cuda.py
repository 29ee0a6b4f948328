"""The bank and the engine on a GPU: half precision, and memory that really runs out. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper

from .layers import KINDS, LAYERS, deltas_for, merged, relative_error, rows_for
from .test_kinds import matrices_and_norms, small_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without TF32, whose ten bits would hide what is measured here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_equal_merged_weights(layer_name: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    layer = LAYERS[layer_name]().to(dtype)
    # The LoRAs wait in main memory, as the hosts keep them.
    adapters = [Adapter(str(i), {"layer": deltas_for(layer, kind, random)}) for i, kind in enumerate(KINDS)]
    mixes = [tuple(float(i == j) for j in range(len(KINDS))) for i in range(len(KINDS))]
    rows = rows_for(layer, len(mixes), random).to(dtype)
    with torch.no_grad():
        expected = torch.cat(
            [merged(layer, adapters, mix)(row[None].double()) for mix, row in zip(mixes, rows, strict=True)]
        )
        layer.cuda()
        bank = Bank(adapters)
        with bank.attached({"layer": layer}), bank.routed(mixes):
            found = layer(rows.cuda())
    assert found.dtype == dtype
    assert relative_error(found.cpu(), expected) < LIMITS[dtype]


def unet_and_bank(dtype: torch.dtype, count: int = 3) -> tuple[nn.Module, Bank]:
    unet = small_unet().to("cuda", dtype)
    random = torch.Generator().manual_seed(0)
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(("to_q", "to_v", "conv1"))}
    adapters = [
        Adapter(str(i), {name: deltas_for(layer, "rank 3", random) for name, layer in layers.items()}, 0.05)
        for i in range(count)
    ]
    return unet, Bank(adapters)


def composed(dtype: torch.dtype, row_limit: int = 0, side: int = 16) -> tuple[Tensor, Tensor, Engine]:
    """A composed step's guided prediction and weights in this dtype."""
    unet, bank = unet_and_bank(dtype)
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, side, side, generator=random).to("cuda", dtype)
    texts = torch.randn(2, 7, 24, generator=random).to("cuda", dtype)

    def predict(rows: Sequence[Row]) -> Tensor:
        x = torch.stack([latents[row.slot] for row in rows])
        text = torch.stack([texts[int(row.cond)] for row in rows])
        prediction: Tensor = unet(x, 500, text, return_dict=False)[0]
        return prediction

    engine = Engine(paper(temperature=0.05), bank, row_limit=row_limit)
    with torch.inference_mode(), bank.attached(matrices_and_norms(unet)):
        result = engine.step(Step(0, 20, latents, 2, denoised=False), predict)
    assert result.uncond is not None
    assert result.weights is not None
    assert result.cond.dtype == torch.float32
    return result.uncond + 7 * (result.cond - result.uncond), result.weights, engine


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-2), (torch.bfloat16, 1.5e-1)])
def test_a_composed_step_in_half_precision_is_near_float32(dtype: torch.dtype, limit: float) -> None:
    exact, _, _ = composed(torch.float32)
    found, weights, _ = composed(dtype)
    assert bool(found.isfinite().all())
    assert relative_error(found, exact) < limit
    torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(weights[0]))


def test_memory_that_runs_out_halves_the_rows() -> None:
    expected, _, _ = composed(torch.float32, row_limit=2, side=64)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    composed(torch.float32, side=64)
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        found, _, engine = composed(torch.float32, side=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < engine.calls.limit < 16
    assert relative_error(found, expected) < 1e-4
