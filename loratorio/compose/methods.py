"""Ways to compose LoRAs. A method says which model rows a step needs and makes one prediction of them.

A *mix* says which LoRAs act on a row: one coefficient per LoRA of the generation. All zeros is the base model,
a single one is that LoRA alone, all ones is what merging gives. The LoRA's own strength is not part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .catalogue import CATALOGUE, Entry
from .guidance import compose, recentre
from .weights import spatial_weights

Mix = tuple[float, ...]


class Branch(NamedTuple):
    """A block of model rows: every conditional (or unconditional) row of a step, under one mix."""

    mix: Mix
    cond: bool


@dataclass(frozen=True)
class Cast:
    """The LoRAs of a generation: `base` without the composed ones, `solos` each alone, `merged` all at once."""

    base: Mix
    solos: tuple[Mix, ...]
    merged: Mix

    @classmethod
    def of(cls, count: int, always: Sequence[int] = ()) -> Cast:
        """`count` LoRAs, of which those whose numbers are in `always` act on every row and are never composed."""
        everywhere = set(always)
        composed = [i for i in range(count) if i not in everywhere]

        def mix(*active: int) -> Mix:
            return tuple(float(i in everywhere or i in active) for i in range(count))

        return cls(base=mix(), solos=tuple(mix(i) for i in composed), merged=mix(*composed))


class Tuning(Protocol):
    """The knobs a method may read (`loratorio.settings.Settings` has them)."""

    @property
    def patch_size(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def recentre(self) -> float: ...


@dataclass(frozen=True)
class Situation:
    """Where sampling stands: step `index` of `total`, and whether the step has unconditional rows."""

    cast: Cast
    tuning: Tuning
    index: int
    total: int
    has_uncond: bool


@dataclass(frozen=True)
class Predictions:
    """What the model said at one step.

    Attributes:
        by_branch: prediction of every branch asked for: (Bc, C, H, W) for conditional branches, (Bu, C, H, W) for
            unconditional ones.
        noise_by_mix: the conditional predictions as noise e, which is what similarity is measured on.
        owners: image of each conditional row, (Bc,) int64: with prompt AND an image has several.
    """

    by_branch: Mapping[Branch, Tensor]
    noise_by_mix: Mapping[Mix, Tensor]
    owners: Tensor

    def cond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, True)]

    def uncond(self, mix: Mix) -> Tensor:
        return self.by_branch[Branch(mix, False)]

    def per_image(self, weights: Tensor, images: int) -> Tensor:
        """Weights of conditional rows (N, Bc, H, W) as weights of images (N, images, H, W): the mean of its rows."""
        if weights.shape[1] == images:
            return weights
        owners = self.owners.to(weights.device)
        summed = weights.new_zeros((weights.shape[0], images, *weights.shape[2:])).index_add_(
            1, owners, weights
        )
        counts = torch.bincount(owners, minlength=images).to(weights.dtype)
        return summed / counts.view(1, -1, 1, 1)


@dataclass(frozen=True)
class Composition:
    """The composed predictions, float32: cond (Bc, C, H, W), uncond (Bu, C, H, W) or None, Ω↑ (N, Bc, H, W) or None."""

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


class Method(ABC):
    """One way to compose. Stateless: what it needs to know stands in the `Situation`. Its label and source: `catalogue.py`."""

    name: ClassVar[str]

    @property
    def entry(self) -> Entry:
        """How the method is shown, and where it comes from."""
        return CATALOGUE[self.name]

    @abstractmethod
    def branches(self, now: Situation) -> list[Branch]:
        """The model rows this step needs, each branch once."""

    @abstractmethod
    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        """One conditional and one unconditional prediction out of those rows."""


def both(mixes: Sequence[Mix], now: Situation) -> list[Branch]:
    """The conditional and, where there is one, the unconditional branch of each mix."""
    return [Branch(mix, cond) for mix in mixes for cond in ((True, False) if now.has_uncond else (True,))]


class _OneMix(Method):
    """A method that asks the model under a single mix and takes its word."""

    @abstractmethod
    def mix(self, now: Situation) -> Mix:
        """The mix of this step."""

    def branches(self, now: Situation) -> list[Branch]:
        return both([self.mix(now)], now)

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        mix = self.mix(now)
        uncond = predictions.uncond(mix).to(torch.float32) if now.has_uncond else None
        return Composition(predictions.cond(mix).to(torch.float32), uncond)


class Merge(_OneMix):
    """W + Σᵢ sᵢ·ΔWᵢ: what the WebUIs do without this extension."""

    name = "merge"

    def mix(self, now: Situation) -> Mix:
        return now.cast.merged


class Switch(_OneMix):
    """LoRA-Switch: one LoRA at a time, the next one every five steps."""

    name = "switch"
    steps_per_lora = 5

    def mix(self, now: Situation) -> Mix:
        return now.cast.solos[now.index // self.steps_per_lora % len(now.cast.solos)]


class Composite(Method):
    """LoRA-Composite: the mean of every LoRA's guided prediction."""

    name = "composite"

    def branches(self, now: Situation) -> list[Branch]:
        return both(now.cast.solos, now)

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        def mean(rows: list[Tensor]) -> Tensor:
            return torch.stack([row.to(torch.float32) for row in rows]).mean(dim=0)

        solos = now.cast.solos
        uncond = mean([predictions.uncond(mix) for mix in solos]) if now.has_uncond else None
        return Composition(mean([predictions.cond(mix) for mix in solos]), uncond)


class Loratorio(Method):
    """LoRAtorio: patch by patch, the LoRAs that diverge from the base; the unconditional score re-centred on the base."""

    name = "loratorio"

    def branches(self, now: Situation) -> list[Branch]:
        solos, base = now.cast.solos, now.cast.base
        # With one LoRA its weight is 1 whatever the base says, so the base's conditional rows are not run.
        rows = [Branch(base, True)] if len(solos) > 1 else []
        rows += [Branch(mix, True) for mix in solos]
        if now.has_uncond:
            rows += [Branch(base, False)] if now.tuning.recentre > 0 else []
            rows += [Branch(mix, False) for mix in solos] if now.tuning.recentre < 1 else []
        return rows

    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        solos, tuning = now.cast.solos, now.tuning
        weights = self.weights(now, predictions)
        cond = compose(torch.stack([predictions.cond(mix) for mix in solos]), weights)
        if not now.has_uncond:
            return Composition(cond, None, weights)
        if tuning.recentre == 1:
            return Composition(cond, predictions.uncond(now.cast.base).to(torch.float32), weights)
        unconds = torch.stack([predictions.uncond(mix) for mix in solos])
        # At λ = 0 the base was not asked; its term is multiplied by 0, so any prediction may stand in for it.
        base = predictions.uncond(now.cast.base) if tuning.recentre > 0 else unconds[0]
        image_weights = predictions.per_image(weights, unconds.shape[1])
        return Composition(cond, recentre(base, unconds, image_weights, tuning.recentre), weights)

    def weights(self, now: Situation, predictions: Predictions) -> Tensor:
        """Ω↑ of the conditional rows, (N, Bc, H, W) float32."""
        solos, tuning = now.cast.solos, now.tuning
        noise = torch.stack([predictions.noise_by_mix[mix] for mix in solos])
        if len(solos) == 1:
            return noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
        base = predictions.noise_by_mix[now.cast.base]
        return spatial_weights(base, noise, tuning.patch_size, tuning.temperature, tuning.top_k)


METHODS: dict[str, Method] = {method.name: method for method in (Loratorio(), Merge(), Composite(), Switch())}
"""Every way to compose, by name, in the catalogue's order."""
