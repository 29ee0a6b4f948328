"""LoRAtorio itself (arXiv 2508.11624), and its choice from a pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..guidance import compose
from ..weights import spatial_weights, spread_styles
from .base import Branch, Cast, Changes, Composition, Method, Predictions, Situation
from .weighted import Weighted, stacked_noise


class Loratorio(Weighted):
    """LoRAtorio: patch by patch, the LoRAs that diverge from the base; the unconditional score re-centred on the base.

    Taken from the paper: patches, cosine similarity, SoftMin, re-centring with λ = 0.5, top-k for pools. Left open there and
    measured here: patch size and temperature. Not in it: styles, softer patches, a temperature that follows the spread.

    A style is not weighed: the rows of all the others have it too, and are compared with those of the base under the style.
    """

    name = "loratorio"

    def branches(self, now: Situation) -> list[Branch]:
        return super().branches(now.carrying())

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        played = super().compose(now.carrying(), predictions)
        return replace(played, weights=with_carried(played.weights, now.cast))

    def begin(self, cast: Cast, changes: Changes) -> Method:
        return FromPool() if any(cast.pooled) else self

    def weights(self, now: Situation, predictions: Predictions) -> Tensor:
        """Ω↑ of the conditional rows, (N, Bc, H, W) float32."""
        cast, tuning = now.cast, now.tuning
        noise = stacked_noise(now, predictions)
        if len(cast.solos) == 1:
            return noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
        weights = spatial_weights(
            predictions.noise_by_mix[cast.compared],
            noise,
            tuning.patch_size,
            tuning.temperature,
            tuning.top_k,
            blend=tuning.blend,
            adaptive=tuning.adaptive,
        )
        return spread_styles(weights, cast.styles) if any(cast.styles) else weights

    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        return compose(predictions, weights)

    def shown(self, weights: Tensor) -> Tensor | None:
        return weights


def with_carried(weights: Tensor | None, cast: Cast) -> Tensor | None:
    """Ω↑ of all solos out of that of the carrying cast's: a carried style acts everywhere, by 1."""
    carried = cast.carried
    if weights is None or not carried:
        return weights
    shown = weights.new_ones((len(cast.solos), *weights.shape[1:]))
    left = [i for i in range(len(cast.solos)) if i not in carried]
    for place, own in zip(left, weights, strict=False):  # styles alone have one weight and no place
        shown[place] = own
    return shown


@dataclass(frozen=True)
class _Word:
    """What a candidate said at a step: how far it was from the base, by the size of the base's noise there.

    Attributes:
        index: the step.
        prediction, noise: distances of the conditional prediction and noise, (Bc, C, H, W); of an unconditional word
            (Bu, C, H, W) and None.
    """

    index: int
    prediction: Tensor
    noise: Tensor | None = None


class FromPool(Loratorio):
    """LoRAtorio over a pool: a step runs those candidates whose word matters most, and of the others the last word counts.

    The paper's dynamic selection scores every candidate at every step. Here the conditional rows of all candidates are run on
    the first step and then every `pool_interval` steps. In between the `pool_size` most urgent ones are run: those with the
    largest share of the picture times the steps since they last were. What a candidate said stands until it is run again, as
    its distance from the base's prediction: the base is run at every step, and the distance, in proportion to the size of
    the base's noise, is added to it. So every candidate is weighed at every step.
    Unconditional rows matter less: the `pool_size` largest have theirs run at a scoring, one candidate at any other step, and the
    base's stands for those that never were.
    LoRAs that the prompt names are always run.
    """

    least_share = 0.02
    """Of the picture, times steps; a candidate with less is not run."""

    def __init__(self) -> None:
        self._cond: dict[int, _Word] = {}  # by place
        self._uncond: dict[int, _Word] = {}
        self._shares: list[float] = []

    def scores_at(self, now: Situation) -> bool:
        """Whether all candidates are scored at this step."""
        return not self._cond or now.index % max(1, now.tuning.pool_interval) == 0

    def branches(self, now: Situation) -> list[Branch]:
        now = now.carrying()
        branches = [Branch(now.cast.compared, True)]
        branches += [Branch(now.cast.solos[place], True) for place in self._heard_at(now)]
        if now.has_uncond:
            branches.append(Branch(now.cast.base, False))
            branches += [Branch(now.cast.solos[place], False) for place in self._unconds_at(now)]
        return branches

    def further(self, now: Situation, predictions: Predictions) -> list[Branch]:
        """After a scoring: the unconditional rows of those with the largest shares."""
        if not self.scores_at(now) or not now.has_uncond or now.tuning.recentre == 1:
            return []
        now = now.carrying()
        # Nothing is remembered yet: a sampler may evaluate the step again.
        said = {place: self._word(now, predictions, place) for place in range(len(now.cast.solos))}
        weights = self.weights(now, self._of_all(now, predictions, said))
        shares = weights.mean(dim=(1, 2, 3)).tolist()
        pooled = [place for place in said if now.cast.pooled[place]]
        ranked = sorted(pooled, key=lambda place: -shares[place])[: now.tuning.pool_size]
        chosen = [*_named(now.cast), *(place for place in ranked if shares[place] >= self.least_share)]
        return [Branch(now.cast.solos[place], False) for place in sorted(chosen)]

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        cast, now = now.cast, now.carrying()
        for place in self._heard_at(now):
            self._cond[place] = self._word(now, predictions, place)
        whole = self._of_all(now, predictions, self._cond)
        weights = self.weights(now, whole)
        self._shares = weights.mean(dim=(1, 2, 3)).tolist()
        cond = compose(torch.stack([whole.cond(mix) for mix in now.cast.solos]), weights)
        shown = with_carried(weights, cast)
        if not now.has_uncond:
            return Composition(cond, None, shown)
        base = predictions.uncond(now.cast.base).to(torch.float32)
        if now.tuning.recentre == 1:
            return Composition(cond, base, shown)
        size = _size(now, predictions)
        for place, mix in enumerate(now.cast.solos):
            if Branch(mix, False) in predictions.by_branch:
                distance = predictions.uncond(mix).to(torch.float32) - base
                self._uncond[place] = _Word(now.index, distance / size)
        places = sorted(self._uncond)
        if not places:
            return Composition(cond, base, shown)
        drift = torch.stack([self._uncond[place].prediction * size for place in places])
        own = torch.stack([weights[place] for place in places])
        # λ·e₀ + (1−λ)·Σ Ω·eᵢ = e₀ + (1−λ)·Σ Ω·(eᵢ − e₀), as Ω sums to 1.
        drawn = compose(drift, predictions.per_image(own, len(base)))
        return Composition(cond, base + (1 - now.tuning.recentre) * drawn, shown)

    def _heard_at(self, now: Situation) -> list[int]:
        """Places of the LoRAs whose conditional rows are run at this step."""
        if self.scores_at(now):
            return list(range(len(now.cast.solos)))
        urgency = {
            place: self._shares[place] * (now.index - word.index)
            for place, word in self._cond.items()
            if now.cast.pooled[place]
        }
        ranked = sorted(urgency, key=lambda place: -urgency[place])[: now.tuning.pool_size]
        return sorted([*_named(now.cast), *(p for p in ranked if urgency[p] >= self.least_share)])

    def _unconds_at(self, now: Situation) -> list[int]:
        """Places of the LoRAs whose unconditional rows are run at this step."""
        if self.scores_at(now) or now.tuning.recentre == 1:
            return []
        urgency = {
            place: self._shares[place]
            * (now.index - (self._uncond[place].index if place in self._uncond else -1))
            for place in self._cond
            if now.cast.pooled[place]
        }
        first = max(urgency, key=lambda place: urgency[place], default=None)
        due = [] if first is None or urgency[first] < self.least_share else [first]
        return sorted([*_named(now.cast), *due])

    def _word(self, now: Situation, predictions: Predictions, place: int) -> _Word:
        mix, base, size = now.cast.solos[place], now.cast.compared, _size(now, predictions)

        def distance(own: Tensor, other: Tensor) -> Tensor:
            return (own.to(torch.float32) - other.to(torch.float32)) / size

        return _Word(
            now.index,
            distance(predictions.cond(mix), predictions.cond(base)),
            distance(predictions.noise_by_mix[mix], predictions.noise_by_mix[base]),
        )

    def _of_all(self, now: Situation, predictions: Predictions, said: Mapping[int, _Word]) -> Predictions:
        """The step's conditional predictions with those of every LoRA, by what it said last."""
        base, size = now.cast.compared, _size(now, predictions)
        own = predictions.cond(base).to(torch.float32)
        noise = predictions.noise_by_mix[base].to(torch.float32)
        by_branch, noise_by_mix = {Branch(base, True): own}, {base: noise}
        for place, mix in enumerate(now.cast.solos):
            word = said[place]
            assert word.noise is not None
            by_branch[Branch(mix, True)] = own + word.prediction * size
            noise_by_mix[mix] = noise + word.noise * size
        return Predictions(by_branch, noise_by_mix, predictions.owners)


def _size(now: Situation, predictions: Predictions) -> Tensor:
    """Root mean square of the base's noise: σ where predictions are denoised latents, hardly changing where they are e."""
    noise = predictions.noise_by_mix[now.cast.compared].to(torch.float32)
    return noise.square().mean().sqrt().clamp_min(1e-20)


def _named(cast: Cast) -> list[int]:
    """Places of the LoRAs that are no candidates."""
    return [place for place in range(len(cast.solos)) if not cast.pooled[place]]
