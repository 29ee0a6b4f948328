"""LoRAtorio's choice from a pool: candidates that are not run at a step count by what they predicted last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..guidance import compose
from ..lazy_torch import torch
from ..mixes import Branch, Participants
from .base import Composition, Method, Predictions, StepContext
from .patches import patch_weights, with_styles
from .weighted import addition_rows, where_none_acts, with_additions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CachedResidual:
    """How far a candidate's prediction was from the base's at a step, by the size of the base's noise there.

    Attributes:
        index: the step.
        prediction, noise: distances of the conditional prediction and noise, (Bc, C, H, W); of an unconditional one
            (Bu, C, H, W) and None.
    """

    index: int
    prediction: Tensor
    noise: Tensor | None = None


class FromPool(Method):
    """LoRAtorio over a pool: a step runs those candidates that matter most, and of the others the last prediction counts.

    The paper's dynamic selection scores every candidate at every step. Here the conditional rows of all candidates are run on
    the first step and then every `pool_interval` steps. In between the `pool_size` most urgent ones are run: those with the
    largest share of the picture times the steps since they last were. What a candidate predicted stands until it is run again, as
    its distance from the base's prediction: the base is run at every step, and the distance, in proportion to the size of
    the base's noise, is added to it. So every candidate is weighed at every step.
    Unconditional rows matter less: the `pool_size` largest have theirs run at a scoring, one candidate at any other step, and the
    base's stands for those that never were.
    LoRAs that the prompt names are always run.
    """

    least_share = 0.02
    """Of the picture, times steps; a candidate with less is not run."""

    def __init__(self) -> None:
        self._cond: dict[int, CachedResidual] = {}  # by place
        self._uncond: dict[int, CachedResidual] = {}
        self._shares: list[float] = []

    def scores_at(self, now: StepContext) -> bool:
        """Whether all candidates are scored at this step."""
        return not self._cond or now.index % max(1, now.knobs["pool_interval"]) == 0

    def branches(self, now: StepContext) -> list[Branch]:
        now = now.with_shared_parts()
        branches = [Branch(now.participants.compared, True)]
        branches += [Branch(now.participants.singles[place], True) for place in self._run_at(now)]
        if now.has_uncond:
            branches.append(Branch(now.participants.base, False))
            branches += [Branch(now.participants.singles[place], False) for place in self._unconds_at(now)]
        branches += addition_rows(now, now.knobs["recentre"])
        return list(dict.fromkeys(branches))

    def further(self, now: StepContext, predictions: Predictions) -> list[Branch]:
        """After a scoring: the unconditional rows of those with the largest shares."""
        if not self.scores_at(now) or not now.has_uncond or now.knobs["recentre"] == 1:
            return []
        now = now.with_shared_parts()
        # Nothing is remembered yet: a sampler may evaluate the step again.
        last = {
            place: self._residual(now, predictions, place) for place in range(len(now.participants.singles))
        }
        weights = patch_weights(now, self._of_all(now, predictions, last))
        shares = weights.mean(dim=(1, 2, 3)).tolist()
        pooled = [place for place in last if now.participants.pooled[place]]
        ranked = sorted(pooled, key=lambda place: -shares[place])[: now.knobs["pool_size"]]
        chosen = [
            *_named(now.participants),
            *(place for place in ranked if shares[place] >= self.least_share),
        ]
        return [Branch(now.participants.singles[place], False) for place in sorted(chosen)]

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        whole_step, now = now, now.with_shared_parts()
        for place in self._run_at(now):
            self._cond[place] = self._residual(now, predictions, place)
        recentre = now.knobs["recentre"]
        whole = self._of_all(now, predictions, self._cond)
        weights = patch_weights(now, whole)
        self._shares = weights.mean(dim=(1, 2, 3)).tolist()
        cond = compose(torch.stack([whole.cond(mix) for mix in now.participants.singles]), weights)
        if now.has_gap:
            cond += where_none_acts(now, predictions.cond(now.participants.compared))
        cond = with_additions(cond, now, predictions, True, recentre)
        shown = with_styles(weights, whole_step)
        if not now.has_uncond:
            return Composition(cond, None, shown)
        base = predictions.uncond(now.participants.base).to(torch.float32)
        uncond = self._uncond_of_all(now, predictions, base, weights) if recentre < 1 else base
        return Composition(cond, with_additions(uncond, now, predictions, False, recentre), shown)

    def _uncond_of_all(
        self, now: StepContext, predictions: Predictions, base: Tensor, weights: Tensor
    ) -> Tensor:
        """ẽ(∅), (Bu, C, H, W) float32, with every LoRA's by what it predicted last; e₀ for those that never were run."""
        size = _size(now, predictions)
        for place, mix in enumerate(now.participants.singles):
            if Branch(mix, False) in predictions.by_branch:
                distance = predictions.uncond(mix).to(torch.float32) - base
                self._uncond[place] = CachedResidual(now.index, distance / size)
        places = sorted(self._uncond)
        if not places:
            return base
        drift = torch.stack([self._uncond[place].prediction * size for place in places])
        own = torch.stack([weights[place] for place in places])
        # λ·e₀ + (1−λ)·Σ Ω·eᵢ = e₀ + (1−λ)·Σ Ω·(eᵢ − e₀), as Ω sums to 1, with e₀'s own part where places leave one.
        drawn = compose(drift, predictions.per_image(own, len(base)))
        strength: float = now.knobs["recentre"]
        return base + (1 - strength) * drawn

    def _run_at(self, now: StepContext) -> list[int]:
        """Places of the LoRAs whose conditional rows are run at this step."""
        if self.scores_at(now):
            return list(range(len(now.participants.singles)))
        urgency = {
            place: self._shares[place] * (now.index - residual.index)
            for place, residual in self._cond.items()
            if now.participants.pooled[place]
        }
        ranked = sorted(urgency, key=lambda place: -urgency[place])[: now.knobs["pool_size"]]
        return sorted([*_named(now.participants), *(p for p in ranked if urgency[p] >= self.least_share)])

    def _unconds_at(self, now: StepContext) -> list[int]:
        """Places of the LoRAs whose unconditional rows are run at this step."""
        if self.scores_at(now) or now.knobs["recentre"] == 1:
            return []
        urgency = {
            place: self._shares[place]
            * (now.index - (self._uncond[place].index if place in self._uncond else -1))
            for place in self._cond
            if now.participants.pooled[place]
        }
        first = max(urgency, key=lambda place: urgency[place], default=None)
        due = [] if first is None or urgency[first] < self.least_share else [first]
        return sorted([*_named(now.participants), *due])

    def _residual(self, now: StepContext, predictions: Predictions, place: int) -> CachedResidual:
        mix, base, size = now.participants.singles[place], now.participants.compared, _size(now, predictions)

        def distance(own: Tensor, other: Tensor) -> Tensor:
            return (own.to(torch.float32) - other.to(torch.float32)) / size

        return CachedResidual(
            now.index,
            distance(predictions.cond(mix), predictions.cond(base)),
            distance(predictions.noise_by_mix[mix], predictions.noise_by_mix[base]),
        )

    def _of_all(
        self, now: StepContext, predictions: Predictions, last: Mapping[int, CachedResidual]
    ) -> Predictions:
        """The step's conditional predictions with those of every LoRA, by what it predicted last."""
        base, size = now.participants.compared, _size(now, predictions)
        own = predictions.cond(base).to(torch.float32)
        noise = predictions.noise_by_mix[base].to(torch.float32)
        by_branch, noise_by_mix = {Branch(base, True): own}, {base: noise}
        for place, mix in enumerate(now.participants.singles):
            residual = last[place]
            assert residual.noise is not None
            by_branch[Branch(mix, True)] = own + residual.prediction * size
            noise_by_mix[mix] = noise + residual.noise * size
        return Predictions(by_branch, noise_by_mix, predictions.owners)


def _size(now: StepContext, predictions: Predictions) -> Tensor:
    """Root mean square of the base's noise: σ where predictions are denoised latents, hardly changing where they are e."""
    noise = predictions.noise_by_mix[now.participants.compared].to(torch.float32)
    return noise.square().mean().sqrt().clamp_min(1e-20)


def _named(participants: Participants) -> list[int]:
    """Places of the LoRAs that are no candidates."""
    return [place for place in range(len(participants.singles)) if not participants.pooled[place]]
