"""The cost of composing in model rows, counted by running the engine without a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters.bank import Bank
from ..adapters.delta import Adapter
from ..settings import Settings
from .calls import Row
from .engine import Engine
from .step import Step


@lru_cache(maxsize=512)
def plain_steps(settings: Settings, count: int, steps: int = 20, guided: bool = True) -> float:
    """The work of a mean step of such a schedule with `count` LoRAs, in plain steps: a conditional and, if guided, an unconditional row."""
    settings = settings.with_values({"find_styles": False})  # in noise there is none; with one it costs less
    engine = Engine(settings, Bank([Adapter(str(number), {}) for number in range(count)]))
    side = 2 * settings.patch_size
    latents = torch.zeros(1, 1, side, side)
    generator = torch.Generator().manual_seed(0)
    rows_run = 0

    def predict(rows: Sequence[Row]) -> Tensor:
        nonlocal rows_run
        rows_run += len(rows)
        return torch.randn(len(rows), *latents.shape[1:], generator=generator)

    for index in range(steps):
        engine.step(Step(index, steps, latents, int(guided), denoised=False, guidance=7.0), predict)
    return rows_run / steps / (1 + guided)
