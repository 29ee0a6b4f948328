"""LoRAtorio itself (arXiv 2508.11624), and its choice from a pool."""

from __future__ import annotations

from dataclasses import replace

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
    """

    name = "loratorio"

    def begin(self, cast: Cast, changes: Changes) -> Method:
        return FromPool() if any(cast.pooled) else self

    def weights(self, now: Situation, predictions: Predictions) -> Tensor:
        """Ω↑ of the conditional rows, (N, Bc, H, W) float32."""
        cast, tuning = now.cast, now.tuning
        noise = stacked_noise(now, predictions)
        if len(cast.solos) == 1:
            return noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
        weights = spatial_weights(
            predictions.noise_by_mix[cast.base],
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


class FromPool(Loratorio):
    """LoRAtorio over a pool: all candidates are scored now and then, and only those that win are run in between.

    The paper's dynamic selection scores every candidate at every step. Here the conditional rows of all candidates are run
    on the first two steps and then every `pool_interval` steps. Of them the `pool_size` with the largest share of the
    picture stay, those with hardly any left out, and the LoRAs that the prompt names always; until the next scoring the
    weights are made of these alone. How far their unconditional rows drift from the base's is measured at a scoring and
    holds until the next.
    """

    scored_first = 2
    least_share = 0.02
    """Of the picture; a candidate with less is not run until the next scoring."""

    def __init__(self) -> None:
        self._playing: tuple[int, ...] | None = None
        self._drift: dict[int, Tensor] = {}  # by place: eᵢ(∅) − e₀(∅), (Bu, C, H, W)

    @property
    def playing(self) -> tuple[int, ...] | None:
        """Which solos (by place) are run between scorings; None before the first."""
        return self._playing

    def scores_at(self, now: Situation) -> bool:
        """Whether all candidates are scored at this step."""
        if self._playing is None or now.index < self.scored_first or now.tuning.pool_interval <= 1:
            return True
        return now.index % now.tuning.pool_interval == 0

    def branches(self, now: Situation) -> list[Branch]:
        base = now.cast.base
        if self.scores_at(now):
            branches = [Branch(base, True)] + [Branch(mix, True) for mix in now.cast.solos]
        else:
            solos = self._part(now.cast).solos
            branches = ([Branch(base, True)] if len(solos) > 1 else []) + [Branch(mix, True) for mix in solos]
        if now.has_uncond:
            branches.append(Branch(base, False))
            branches += [] if self.scores_at(now) else self._drifting(now)
        return branches

    def further(self, now: Situation, predictions: Predictions) -> list[Branch]:
        """After a scoring: the unconditional rows of those that won."""
        if not self.scores_at(now):
            return []
        self._playing, self._drift = self._winners(now, predictions), {}
        return self._drifting(now) if now.has_uncond else []

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        playing = self._playing or tuple(range(len(now.cast.solos)))
        part = replace(now, cast=self._part(now.cast))
        weights = self.weights(part, predictions)
        cond = compose(torch.stack([predictions.cond(mix) for mix in part.cast.solos]), weights)
        # Weight maps speak of all LoRAs of the generation; those that are not run have none of the picture.
        shown = weights.new_zeros((len(now.cast.solos), *weights.shape[1:]))
        shown[list(playing)] = weights
        if not now.has_uncond:
            return Composition(cond, None, shown)
        base = predictions.uncond(now.cast.base).to(torch.float32)
        if now.tuning.recentre == 1:
            return Composition(cond, base, shown)
        for place, mix in zip(playing, part.cast.solos, strict=True):
            if Branch(mix, False) in predictions.by_branch:
                self._drift[place] = predictions.uncond(mix).to(torch.float32) - base
        drift = torch.stack([self._drift[place] for place in playing])
        # λ·e₀ + (1−λ)·Σ Ω·eᵢ = e₀ + (1−λ)·Σ Ω·(eᵢ − e₀), as Ω sums to 1.
        drawn = compose(drift, predictions.per_image(weights, len(base)))
        return Composition(cond, base + (1 - now.tuning.recentre) * drawn, shown)

    def _drifting(self, now: Situation) -> list[Branch]:
        """The unconditional rows of the LoRAs in use whose drift is not known."""
        if now.tuning.recentre == 1:
            return []
        playing = self._playing or ()
        return [Branch(now.cast.solos[place], False) for place in playing if place not in self._drift]

    def _winners(self, now: Situation, predictions: Predictions) -> tuple[int, ...]:
        count = len(now.cast.solos)
        if count == 1:
            return (0,)
        shares = self.weights(now, predictions).mean(dim=(1, 2, 3)).tolist()
        named = [i for i in range(count) if not now.cast.pooled[i]]
        ranked = sorted((i for i in range(count) if now.cast.pooled[i]), key=lambda i: -shares[i])
        chosen = [i for i in ranked[: now.tuning.pool_size] if shares[i] >= self.least_share]
        return tuple(sorted(named + (chosen or ranked[: 0 if named else 1])))

    def _part(self, cast: Cast) -> Cast:
        if self._playing is None:
            return cast
        return replace(
            cast,
            solos=tuple(cast.solos[i] for i in self._playing),
            styles=tuple(cast.styles[i] for i in self._playing) if cast.styles else (),
            importance=tuple(cast.importance[i] for i in self._playing) if cast.importance else (),
            pooled=tuple(cast.pooled[i] for i in self._playing) if cast.pooled else (),
        )
