"""LoRAtorio itself (arXiv 2508.11624), and its choice from a pool."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..guidance import compose
from ..weights import spatial_weights, spread_styles
from .base import Branch, Cast, Changes, Composition, Method, Predictions, Situation
from .weighted import Weighted, rows, stacked_noise


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
    on the first two steps and then every `pool_interval` steps; the `pool_size` candidates with the largest share of the
    picture stay, the LoRAs that the prompt names always do, and the weights are made of those alone until the next scoring.
    """

    scored_first = 2

    def __init__(self) -> None:
        self._playing: tuple[int, ...] | None = None

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
        if not self.scores_at(now):
            return rows(self._part(now.cast).solos, now.cast.base, now)
        scored = [Branch(now.cast.base, True)] + [Branch(mix, True) for mix in now.cast.solos]
        return scored + ([Branch(now.cast.base, False)] if now.has_uncond and now.tuning.recentre > 0 else [])

    def further(self, now: Situation, predictions: Predictions) -> list[Branch]:
        """After a scoring: the unconditional rows of those that won."""
        if not self.scores_at(now):
            return []
        self._playing = self._winners(now, predictions)
        if not now.has_uncond or now.tuning.recentre == 1:
            return []
        return [Branch(mix, False) for mix in self._part(now.cast).solos]

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        part = replace(now, cast=self._part(now.cast))
        composed = super().compose(part, predictions)
        if composed.weights is None or self._playing is None:
            return composed
        # Weight maps speak of all LoRAs of the generation; those that are not run have none of the picture.
        shown = composed.weights.new_zeros((len(now.cast.solos), *composed.weights.shape[1:]))
        shown[list(self._playing)] = composed.weights
        return Composition(composed.cond, composed.uncond, shown)

    def _winners(self, now: Situation, predictions: Predictions) -> tuple[int, ...]:
        count = len(now.cast.solos)
        if count == 1:
            return (0,)
        shares = self.weights(now, predictions).mean(dim=(1, 2, 3)).tolist()
        named = [i for i in range(count) if not now.cast.pooled[i]]
        candidates = sorted((i for i in range(count) if now.cast.pooled[i]), key=lambda i: -shares[i])
        return tuple(sorted(named + candidates[: now.tuning.pool_size]))

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
