"""What every way to compose is made of: mixes, branches, the step it stands at, and what the model said.

A *mix* says which LoRAs act on a row: one coefficient per LoRA of the generation. All zeros is the base model,
a single one is that LoRA alone, all ones is what merging gives. The LoRA's own strength is not part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..catalogue import CATALOGUE, Entry

Mix = tuple[float, ...]

STYLE_SHARE = 0.7
"""Of a style's strength, in the rows of the LoRAs that carry it: found by measurement (docs/METHODS.md)."""


class LayeredMix(tuple[float, ...]):
    """A mix that differs between the model's layers.

    Everything but the bank takes it for the plain mix that it equals (a host finds its text conditioning by that); the bank
    asks `at` for the mix of each layer. Two of them with the same plain mix count as equal, so a step must not use both.
    """

    by_layer: Mapping[str, Mix]

    @classmethod
    def of(cls, plain: Mix, by_layer: Mapping[str, Mix]) -> LayeredMix:
        mix = cls(plain)
        mix.by_layer = by_layer
        return mix

    def at(self, layer: str) -> Mix:
        """The mix of one layer; the plain one where nothing was chosen."""
        return self.by_layer.get(layer, tuple(self))


class Branch(NamedTuple):
    """A block of model rows: every conditional (or unconditional) row of a step, under one mix."""

    mix: Mix
    cond: bool


@dataclass(frozen=True)
class Cast:
    """The LoRAs of a generation: `base` without the composed ones, `solos` each alone, `merged` all at once.

    Attributes:
        styles: per solo, whether it is a style, which acts all over the picture. Empty: none is.
        importance: per solo, how much its trigger words matter in the prompt (W-Composite). Empty: all alike.
        pooled: per solo, whether it is only a candidate, out of a pool. Empty: none is.
        reference: the mix that the solos' conditional predictions are compared with, where it is not `base`.
    """

    base: Mix
    solos: tuple[Mix, ...]
    merged: Mix
    styles: tuple[bool, ...] = ()
    importance: tuple[float, ...] = ()
    pooled: tuple[bool, ...] = ()
    reference: Mix | None = None

    @classmethod
    def of(
        cls,
        count: int,
        always: Sequence[int] = (),
        styles: Sequence[int] = (),
        pooled: Sequence[int] = (),
        importance: Mapping[int, float] | None = None,
    ) -> Cast:
        """`count` LoRAs by number. Those in `always` act on every row and are never composed, whatever else they are in."""
        everywhere = set(always)
        composed = [i for i in range(count) if i not in everywhere]

        def mix(*active: int) -> Mix:
            return tuple(float(i in everywhere or i in active) for i in range(count))

        return cls(
            base=mix(),
            solos=tuple(mix(i) for i in composed),
            merged=mix(*composed),
            styles=tuple(i in styles for i in composed) if styles else (),
            importance=tuple(float(importance.get(i, 1.0)) for i in composed) if importance else (),
            pooled=tuple(i in pooled for i in composed) if pooled else (),
        )

    @property
    def number_of_solo(self) -> tuple[int, ...]:
        """The number, among all LoRAs, of each solo."""
        return tuple(
            next(i for i, (own, base) in enumerate(zip(solo, self.base, strict=True)) if own != base)
            for solo in self.solos
        )

    @property
    def compared(self) -> Mix:
        """What the solos are compared with."""
        return self.base if self.reference is None else self.reference

    @property
    def carried(self) -> tuple[int, ...]:
        """Places of the solos that are carried by the others: the styles, but for candidates of a pool."""
        pooled = self.pooled or (False,) * len(self.solos)
        return tuple(i for i, style in enumerate(self.styles) if style and not pooled[i])

    def carrying(self, share: float = 0.0) -> Cast:
        """The cast without its styles, which the mixes of the others and the reference have at `STYLE_SHARE`.

        Styles alone, with nothing to carry them, are one mix of their own at full strength.

        Args:
            share: part of every other LoRA, but for candidates of a pool, that the others' mixes and the reference have too.
        """
        carried = self.carried
        left = [i for i in range(len(self.solos)) if i not in carried]
        sharing = [i for i in left if not (self.pooled and self.pooled[i])] if share and len(left) > 1 else []
        if not carried and not sharing:
            return self
        numbers = self.number_of_solo
        # What is in a mix by itself, by a LoRA's number; the mix's own LoRA has all of it anyway.
        parts = {numbers[i]: STYLE_SHARE if left else 1.0 for i in carried}
        parts |= {numbers[i]: share for i in sharing}

        def with_others(mix: Mix) -> Mix:
            return tuple(max(own, parts.get(i, 0.0)) for i, own in enumerate(mix))

        return Cast(
            self.base,
            tuple(with_others(self.solos[i]) for i in left) or (with_others(self.base),),
            self.merged,
            importance=tuple(self.importance[i] for i in left) if self.importance else (),
            pooled=tuple(self.pooled[i] for i in left) if self.pooled else (),
            styles=tuple(self.styles[i] for i in left) if self.styles else (),
            reference=with_others(self.base),
        )

    @property
    def chosen(self) -> Mix:
        """`merged` without the candidates of a pool: all LoRAs that the prompt asks for by name."""
        if not any(self.pooled):
            return self.merged
        out = {n for n, pooled in zip(self.number_of_solo, self.pooled, strict=True) if pooled}
        return tuple(0.0 if i in out else part for i, part in enumerate(self.merged))


class Tuning(Protocol):
    """The knobs a method may read (`loratorio.settings.Settings` has them)."""

    @property
    def patch_size(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def adaptive(self) -> bool: ...
    @property
    def top_k(self) -> int: ...
    @property
    def blend(self) -> str: ...
    @property
    def recentre(self) -> float: ...
    @property
    def share(self) -> float: ...
    @property
    def pool_size(self) -> int: ...
    @property
    def pool_interval(self) -> int: ...


@dataclass(frozen=True)
class Situation:
    """Where sampling stands: step `index` of `total`, and whether the step has unconditional rows."""

    cast: Cast
    tuning: Tuning
    index: int
    total: int
    has_uncond: bool

    def carrying(self) -> Situation:
        """The same of `Cast.carrying`, at the part that the knob says."""
        return replace(self, cast=self.cast.carrying(self.tuning.share))


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
        """Weights of conditional rows (N, Bc, …) as weights of images (N, images, …): the mean of its rows."""
        if self.owners.tolist() == list(range(images)):
            return weights
        owners = self.owners.to(weights.device)
        summed = weights.new_zeros((weights.shape[0], images, *weights.shape[2:])).index_add_(
            1, owners, weights
        )
        counts = torch.bincount(owners, minlength=images).to(weights.dtype)
        return summed / counts.view(1, -1, *[1] * (weights.ndim - 2))


@dataclass(frozen=True)
class Composition:
    """The composed predictions, float32: cond (Bc, C, H, W), uncond (Bu, C, H, W) or None, Ω↑ (N, Bc, H, W) or None."""

    cond: Tensor
    uncond: Tensor | None
    weights: Tensor | None = None


Change = tuple[Tensor, int]
"""What one LoRA adds to one layer's weight: ΔW at its strength, float32, and the rank that it is stored with."""


class Changes(Protocol):
    """Where a method finds what the LoRAs do to the weights (`loratorio.adapters.bank.Bank` has it)."""

    def changes(self) -> Iterator[tuple[str, Mapping[int, Change]]]:
        """Layer by layer, the change by each LoRA (by number) that touches its weight. Nothing before the bank is attached."""
        ...


class Method(ABC):
    """One way to compose. Its label and source stand in `catalogue.py`.

    Those in the registry are stateless. One that must remember something between steps hands out, from `begin`, an object
    of its own for each generation.
    """

    name: ClassVar[str]

    @property
    def entry(self) -> Entry:
        """How the method is shown, and where it comes from."""
        return CATALOGUE[self.name]

    def begin(self, cast: Cast, changes: Changes) -> Method:
        """The object that composes one generation; this one where nothing is remembered between steps."""
        return self

    @abstractmethod
    def branches(self, now: Situation) -> list[Branch]:
        """The model rows this step needs, each branch once. Asking changes nothing: a host asks in order to plan."""

    def further(self, now: Situation, predictions: Predictions) -> list[Branch]:
        """Rows that are only known to be needed once `branches` are predicted; most methods have none."""
        return []

    @abstractmethod
    def compose(self, now: Situation, predictions: Predictions) -> Composition:
        """One conditional and one unconditional prediction out of those rows."""


def both(mixes: Sequence[Mix], now: Situation) -> list[Branch]:
    """The conditional and, where there is one, the unconditional branch of each mix."""
    return [Branch(mix, cond) for mix in mixes for cond in ((True, False) if now.has_uncond else (True,))]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σᵢ wᵢ·tensorᵢ in float32."""
    total = tensors[0].to(torch.float32) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(torch.float32), alpha=weight)
    return total
