"""Mixes, and which of them belong to a generation's LoRAs.

A *mix* says which LoRAs act on a row of the model's batch: one coefficient per LoRA of the generation. All zeros is the base
model, a single one is that LoRA alone, all ones is what merging gives. A LoRA's own strength is not part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Mix = tuple[float, ...]

STYLE_SHARE = 0.7
"""Of a style's strength, in the rows of the other LoRAs: found by measurement (docs/METHODS.md)."""


class Branch(NamedTuple):
    """A block of model rows: every conditional (or unconditional) row of a step, under one mix."""

    mix: Mix
    cond: bool


@dataclass(frozen=True)
class Participants:
    """The LoRAs of a generation as mixes: `base` without the composed ones, `singles` each alone, `merged` all at once.

    Attributes:
        styles: per single, whether it is a style, which acts all over the picture. Empty: none is.
        importance: per single, how much its trigger words matter in the prompt (W-Composite). Empty: all alike.
        pooled: per single, whether it is only a candidate, out of a pool. Empty: none is.
        reference: the mix that the singles' conditional predictions are compared with, where it is not `base`.
    """

    base: Mix
    singles: tuple[Mix, ...]
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
    ) -> Participants:
        """`count` LoRAs by number. Those in `always` act on every row and are never composed, whatever else they are in."""
        everywhere = set(always)
        composed = [i for i in range(count) if i not in everywhere]

        def mix(*active: int) -> Mix:
            return tuple(float(i in everywhere or i in active) for i in range(count))

        return cls(
            base=mix(),
            singles=tuple(mix(i) for i in composed),
            merged=mix(*composed),
            styles=tuple(i in styles for i in composed) if styles else (),
            importance=tuple(float(importance.get(i, 1.0)) for i in composed) if importance else (),
            pooled=tuple(i in pooled for i in composed) if pooled else (),
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number, among all LoRAs, of each single."""
        return tuple(
            next(i for i, (own, base) in enumerate(zip(single, self.base, strict=True)) if own != base)
            for single in self.singles
        )

    @property
    def compared(self) -> Mix:
        """What the singles are compared with."""
        return self.base if self.reference is None else self.reference

    def is_candidate(self, place: int) -> bool:
        """Whether the single at this place came out of a pool."""
        return bool(self.pooled) and self.pooled[place]

    @property
    def shared_styles(self) -> tuple[int, ...]:
        """Places of the singles that act in the others' rows: the styles, but for candidates of a pool."""
        return tuple(i for i, style in enumerate(self.styles) if style and not self.is_candidate(i))

    def with_shared_parts(self, share: float = 0.0) -> Participants:
        """The participants without their styles, which the mixes of the others and the reference have at `STYLE_SHARE`.

        Styles alone, with no other LoRA to act on, are one mix of their own at full strength.

        Args:
            share: part of every other LoRA, but for candidates of a pool, that the others' mixes and the reference have too.
        """
        styles = self.shared_styles
        left = [i for i in range(len(self.singles)) if i not in styles]
        sharing = [i for i in left if not self.is_candidate(i)] if share and len(left) > 1 else []
        if not styles and not sharing:
            return self
        numbers = self.numbers
        # What is in a mix by itself, by a LoRA's number; the mix's own LoRA has all of it anyway.
        parts = {numbers[i]: STYLE_SHARE if left else 1.0 for i in styles}
        parts |= {numbers[i]: share for i in sharing}

        def with_others(mix: Mix) -> Mix:
            return tuple(max(own, parts.get(i, 0.0)) for i, own in enumerate(mix))

        return Participants(
            self.base,
            tuple(with_others(self.singles[i]) for i in left) or (with_others(self.base),),
            self.merged,
            importance=tuple(self.importance[i] for i in left) if self.importance else (),
            pooled=tuple(self.pooled[i] for i in left) if self.pooled else (),
            styles=tuple(self.styles[i] for i in left) if self.styles else (),
            reference=with_others(self.base),
        )

    @property
    def named(self) -> Mix:
        """`merged` without the candidates of a pool: all LoRAs that the prompt asks for by name."""
        if not any(self.pooled):
            return self.merged
        out = {n for n, pooled in zip(self.numbers, self.pooled, strict=True) if pooled}
        return tuple(0.0 if i in out else part for i, part in enumerate(self.merged))

    def mixes(self, share: float = 0.0) -> list[Mix]:
        """Every mix that a method may ask the model for, at this shared part."""
        shared = self.with_shared_parts(share)
        every = [self.base, *self.singles, *shared.singles, shared.compared, self.merged, self.named]
        return list(dict.fromkeys(every))
