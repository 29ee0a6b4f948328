"""K-LoRA: in every layer one LoRA, chosen by its largest weights; content early, style late (arXiv 2502.18461)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..lazy_torch import torch
from ..mixes import Mix, Participants
from .base import Entry, Method, StepContext, Weights
from .merge import OneMix

if TYPE_CHECKING:
    from torch import Tensor

ALPHA, BETA = 1.5, 0.5
_LARGEST = (
    2**20
)  # of a bigger layer's elements an even sample is taken, which is all that the sum of its largest needs


class KLoRA(OneMix):
    """K-LoRA, for two LoRAs or more.

    Taken from the paper and its code (HVision-NKU/K-LoRA): in each layer the LoRA whose K largest |ΔW| sum higher, with K = r₁·r₂; the
    style's sum grows with time by α·t/T + β (α = 1.5, β = 0.5); γ evens out the two LoRAs' total sums.
    Left open there: more than two LoRAs (here K = (∏r)^(2/N), every sum divided by its LoRA's own total, and the largest wins), which
    one is the style (here those with that role, else the last in the prompt), and layers other than attention (here the same rule).
    The text encoder's part of the LoRAs is merged.
    """

    def begin(self, participants: Participants, weights: Weights) -> Method:
        return _Chosen(self.entry, weights)


class _Chosen(KLoRA):
    """One generation's scores: they depend on the weights alone, and are made once."""

    def __init__(self, entry: Entry, weights: Weights) -> None:
        super().__init__(entry)
        self._weights = weights
        self._scores: dict[str, dict[int, float]] = {}

    def layer_mixes(self, now: StepContext) -> Mapping[str, Mix]:
        participants = now.participants
        if not self._scores:
            self._scores = scores(self._weights, participants.numbers)
        growth = ALPHA * now.index / max(1, now.total) + BETA
        styles = [lora.style for lora in participants.loras]
        if not any(styles):
            styles[-1] = True
        factor = {
            lora.number: growth if style else 1.0
            for lora, style in zip(participants.loras, styles, strict=True)
        }
        single = {lora.number: lora.mix for lora in participants.loras}
        return {
            layer: single[max(sums, key=lambda number: sums[number] * factor[number])]
            for layer, sums in self._scores.items()
        }


def scores(weights: Weights, numbers: Sequence[int]) -> dict[str, dict[int, float]]:
    """Per layer and LoRA: the sum of its K largest |ΔW|, divided by the sum of all its |ΔW| over all layers."""
    sums: dict[str, dict[int, float]] = {}
    totals = dict.fromkeys(numbers, 0.0)
    for layer, by_number in weights.changes():
        present = {number: change for number, change in by_number.items() if number in totals}
        if not present:
            continue
        count = _count(list(present.values()))
        sums[layer] = {}
        for number, change in present.items():
            top, total = top_and_total(change[0], count)
            sums[layer][number] = top
            totals[number] += total
    return {
        layer: {number: top / totals[number] if totals[number] else 0.0 for number, top in by_number.items()}
        for layer, by_number in sums.items()
    }


def _count(changes: Sequence[tuple[Tensor, int]]) -> int:
    """K = (∏r)^(2/N): r₁·r₂ for two."""
    logarithm = sum(math.log(max(1, rank)) for _, rank in changes)
    return max(1, round(math.exp(2 * logarithm / len(changes))))


def top_and_total(weight: Tensor, count: int) -> tuple[float, float]:
    """The sum of the `count` largest magnitudes of a tensor, and of all of them."""
    magnitudes = weight.flatten().abs().to(torch.float32)
    stride = -(-len(magnitudes) // _LARGEST)
    sample = magnitudes[::stride]
    kept = min(len(sample), max(1, round(count / stride)))
    top = float(sample.topk(kept).values.sum()) * (len(magnitudes) / len(sample) if stride > 1 else 1)
    return top, float(magnitudes.sum())


KLORA = KLoRA(
    Entry(
        "klora",
        "K-LoRA",
        "arXiv 2502.18461",
        "Uses one LoRA per layer: the one whose largest weights are larger.",
    )
)
