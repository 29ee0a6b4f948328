"""LoRA-Composite (arXiv 2402.16843)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..guidance import compose
from ..lazy_torch import torch
from ..mixes import Branch
from ..weights import placed_weights
from .base import Composition, Entry, Method, Predictions, StepContext, both, weighted_sum
from .weighted import addition_rows, where_none_acts, with_additions

if TYPE_CHECKING:
    from torch import Tensor


class Composite(Method):
    """LoRA-Composite: the mean of every LoRA's guided prediction."""

    entry = Entry(
        "composite", "Composite", "arXiv 2402.16843", "The plain mean of what the LoRAs predict one by one."
    )

    takes_places = True
    knobs = ("yielding",)

    def branches(self, now: StepContext) -> list[Branch]:
        compared = both([now.participants.compared], now) if now.has_gap else []
        return list(
            dict.fromkeys([*both(now.participants.singles, now), *compared, *addition_rows(now, recentre=0)])
        )

    def shares(self, now: StepContext) -> list[float]:
        """The weight of each single; they sum to 1."""
        return [1 / len(now.participants.singles)] * len(now.participants.singles)

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        # Guidance is linear, so the weighted mean of the guided scores is the guided weighted mean.
        kinds = (True, False) if now.has_uncond else (True,)
        cond, *uncond = (self._mean(now, predictions, kind) for kind in kinds)
        return Composition(cond, uncond[0] if uncond else None)

    def _mean(self, now: StepContext, predictions: Predictions, cond: bool) -> Tensor:
        singles, compared = now.participants.singles, now.participants.compared
        each = [predictions.by_branch[Branch(mix, cond)] for mix in singles]
        masks = now.masks(each[0].device)
        if masks is None:
            mean = weighted_sum(each, self.shares(now))
        else:
            size = (len(each[0]), *masks.coverage.shape)
            shares = torch.stack(
                [torch.full(size, share, device=each[0].device) for share in self.shares(now)]
            )
            weights = placed_weights(shares, masks)
            mean = compose(torch.stack(each), weights)
        if now.has_gap:
            mean = mean + where_none_acts(now, predictions.by_branch[Branch(compared, cond)])
        return with_additions(mean, now, predictions, cond, recentre=0)


METHOD = Composite()
