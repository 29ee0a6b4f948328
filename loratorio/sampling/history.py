"""Ω over a sampling: for the weight maps, and for each LoRA's share of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class WeightHistory:
    """Ω of the recorded steps, and each LoRA's share of the picture.

    Attributes:
        steps: indices of the recorded steps.
        weights: per recorded step, (N, Bc, H, W) float16; on the model's device until `settle`.
        styles: which of the N are LoRAs that act in the others' rows, with a weight of 1 in all of their place.
    """

    steps: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    styles: frozenset[int] = frozenset()
    _sums: dict[tuple[int, ...], tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    def count(self, numbers: Sequence[int], weights: Tensor) -> None:
        """Add Ω (N, Bc, H, W) of an evaluation to what the LoRAs with these numbers have had of the picture."""
        key = tuple(numbers)
        evaluations, total = self._sums.get(key, (0, None))
        mean = weights.mean(dim=(1, 2, 3))
        self._sums[key] = (evaluations + 1, mean if total is None else total + mean)

    @property
    def shares(self) -> dict[int, float]:
        """By LoRA number, how much of the picture it had, from 0 to 1, as a mean over all evaluations; only when sampling is over."""
        every = sum(evaluations for evaluations, _ in self._sums.values())
        shares: dict[int, float] = {}
        for numbers, (_, total) in self._sums.items():
            for number, part in zip(numbers, total.tolist(), strict=True):
                shares[number] = shares.get(number, 0.0) + part / every
        return shares

    def record(self, index: int, weights: Tensor) -> None:
        """Keep Ω of step `index`. If the sampler evaluates a step twice, the last evaluation counts."""
        if self.steps and self.steps[-1] == index:
            self.steps.pop()
            self.weights.pop()
        self.steps.append(index)
        # Left on the device: to copy it would make the sampling wait for the device at every step.
        self.weights.append(weights.to(torch.float16))

    def settle(self) -> None:
        """Bring all weights to the CPU, when the sampling is over."""
        self.weights = [each.cpu() for each in self.weights]
