"""Which of a pool's candidates the prompt calls, found at the first step that has the necessary rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..compose.candidates import called
from ..compose.methods import StepContext


class PoolCalls:
    """The state of a pool in one sampling.

    Attributes:
        reactions: by number of a candidate, how much the prompt moves it (`compose.candidates.reactions`); None before that was looked
            at.
        is_settled: whether the prompt calls any. left_out: the candidates that it does not call, where it calls others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.reactions: dict[int, float] | None = None
        self.left_out: frozenset[int] = frozenset()
        self.is_settled = False

    def settles_at(self, now: StepContext) -> bool:
        """Whether the pool is settled at this step."""
        able = "pool_size" in now.knobs and now.has_uncond and now.participants.has_pool
        return able and self.reactions is None

    def settle(self, measured: Mapping[int, Tensor]) -> bool:
        """Choose by the candidates' reactions. Returns whether the prompt calls any."""
        # Besides what a pool's plan reads off the device, the only number that a step waits for.
        scores = torch.stack([*measured.values()]).tolist()
        self.reactions = dict(zip(measured, scores, strict=True))
        chosen = {list(measured)[position] for position in called(scores, self._most)}
        self.is_settled = bool(chosen)
        self.left_out = frozenset(measured.keys() - chosen) if chosen else frozenset()
        return self.is_settled
