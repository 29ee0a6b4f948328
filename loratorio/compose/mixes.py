"""Mixes, and which of them belong to a generation's LoRAs.

A *mix* says which LoRAs act on a row of the model's batch: one coefficient per LoRA of the generation. All zeros is the base
model, a single one is that LoRA alone, all ones is what merging gives. A LoRA's own strength is not part of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .regions import Place

Mix = tuple[float, ...]

STYLE_SHARE = 0.7
"""Of a style's strength, in the rows of the other LoRAs: found by measurement (docs/METHODS.md)."""


class Branch(NamedTuple):
    """A block of model rows: every conditional (or unconditional) row of a step, under one mix."""

    mix: Mix
    cond: bool


class Addition(NamedTuple):
    """A LoRA that is not weighed against the others but added inside its place: by its difference from the rows without it.

    Attributes:
        number: among all LoRAs. mix: the reference's, and this LoRA.
        always: whether it acts in the base's unconditional row too.
    """

    number: int
    mix: Mix
    place: Place
    always: bool


@dataclass(frozen=True)
class Participants:
    """The LoRAs of a generation as mixes: `base` without the composed ones, `singles` each alone, `merged` all at once.

    Attributes:
        numbers: the number, among all LoRAs, of each single.
        styles: per single, whether it is a style, which acts all over the picture. Empty: none is.
        importance: per single, how much its trigger words matter in the prompt (W-Composite). Empty: all alike.
        pooled: per single, whether it is only a candidate, out of a pool. Empty: none is.
        settled: whether the candidates that are left are composed like LoRAs that the prompt names.
        places: per single, where it may act; None: everywhere. Empty: all may.
        words: per single, its rows' own words beside the prompt. Empty: none has any.
        additions: LoRAs that are added inside their places.
        reference: the mix that the singles' conditional predictions are compared with, where it is not `base`.
    """

    base: Mix
    singles: tuple[Mix, ...]
    merged: Mix
    numbers: tuple[int, ...]
    styles: tuple[bool, ...] = ()
    importance: tuple[float, ...] = ()
    pooled: tuple[bool, ...] = ()
    settled: bool = False
    places: tuple[Place | None, ...] = ()
    words: tuple[str, ...] = ()
    additions: tuple[Addition, ...] = ()
    reference: Mix | None = None

    @classmethod
    def of(
        cls,
        count: int,
        always: Sequence[int] = (),
        styles: Sequence[int] = (),
        pooled: Sequence[int] = (),
        importance: Mapping[int, float] | None = None,
        places: Mapping[int, Place] | None = None,
        words: Mapping[int, str] | None = None,
    ) -> Participants:
        """`count` LoRAs by number. Those in `always` act on every row and are never composed, whatever else they are in."""
        places, words = places or {}, words or {}
        apart = set(always)
        everywhere = apart - places.keys()
        composed = [i for i in range(count) if i not in apart]

        def mix(*active: int) -> Mix:
            return tuple(float(i in everywhere or i in active) for i in range(count))

        return cls(
            base=mix(),
            singles=tuple(mix(i) for i in composed),
            merged=mix(*composed),
            numbers=tuple(composed),
            styles=tuple(i in styles for i in composed) if styles else (),
            importance=tuple(float(importance.get(i, 1.0)) for i in composed) if importance else (),
            pooled=tuple(i in pooled for i in composed) if pooled else (),
            places=tuple(places.get(i) for i in composed) if places else (),
            words=tuple(words.get(i, "") for i in composed) if words else (),
            additions=tuple(Addition(i, mix(i), places[i], True) for i in sorted(apart & places.keys())),
        )

    @property
    def are_composed(self) -> bool:
        """Whether there is anything to compose."""
        return bool(self.singles or self.additions)

    @property
    def has_places(self) -> bool:
        """Whether any LoRA may act in a part of the picture only."""
        return any(place is not None for place in self.places) or bool(self.additions)

    @property
    def compared(self) -> Mix:
        """What the singles are compared with."""
        return self.base if self.reference is None else self.reference

    def is_candidate(self, place: int) -> bool:
        """Whether the single at this position came out of a pool."""
        return bool(self.pooled) and self.pooled[place]

    def may_rest(self, place: int) -> bool:
        """Whether the single at this position is run when it is urgent, not by turn."""
        return self.is_candidate(place) and not self.settled

    def is_private(self, place: int) -> bool:
        """Whether the single at this position acts in no other's rows: a pool's candidate, one with a place or words of its own."""
        placed = bool(self.places) and self.places[place] is not None
        return self.is_candidate(place) or placed or (bool(self.words) and bool(self.words[place]))

    def without(self, gone: Collection[int]) -> Participants:
        """The participants without those LoRAs, by number among all. Mixes keep their coefficients: nothing of these LoRAs acts."""
        left = [i for i, number in enumerate(self.numbers) if number not in gone]
        additions = tuple(each for each in self.additions if each.number not in gone)
        if len(left) == len(self.numbers) and len(additions) == len(self.additions):
            return self

        return replace(self._only(left), additions=additions)

    def _only(self, left: Sequence[int]) -> Participants:
        """The same with only the singles at these positions, and what is said of them."""

        def kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in left) if values else ()

        return replace(
            self,
            singles=kept(self.singles),
            numbers=kept(self.numbers),
            styles=kept(self.styles),
            importance=kept(self.importance),
            pooled=kept(self.pooled),
            places=kept(self.places),
            words=kept(self.words),
        )

    @property
    def unweighed_styles(self) -> tuple[int, ...]:
        """Positions of the singles that are not weighed against the others: the styles, but for candidates of a pool."""
        return tuple(i for i, style in enumerate(self.styles) if style and not self.is_candidate(i))

    def with_shared_parts(self, share: float = 0.0) -> Participants:
        """The participants without their styles, which the mixes of the others and the reference have at `STYLE_SHARE`.

        Styles alone, with no other LoRA to act on, are one mix of their own at full strength. A style with a place is in no
        other's mix: it becomes an addition.

        Args:
            share: part of every other LoRA, but for private ones, that the others' mixes and the reference have too.
        """
        styles = self.unweighed_styles
        left = [i for i in range(len(self.singles)) if i not in styles]
        sharing = [i for i in left if not self.is_private(i)] if share and len(left) > 1 else []
        if not styles and not sharing and not self.additions:
            return self
        strength = STYLE_SHARE if left else 1.0
        placed = [i for i in styles if self.places and self.places[i] is not None]
        # What is in a mix by itself, by a LoRA's number; the mix's own LoRA has all of it anyway.
        parts = {self.numbers[i]: strength for i in styles if i not in placed}
        parts |= {self.numbers[i]: share for i in sharing}

        def with_others(mix: Mix) -> Mix:
            return tuple(max(own, parts.get(i, 0.0)) for i, own in enumerate(mix))

        reference = with_others(self.base)

        def added(number: int, coefficient: float) -> Mix:
            return tuple(coefficient if i == number else own for i, own in enumerate(reference))

        additions = [each._replace(mix=added(each.number, 1.0)) for each in self.additions]
        for i in placed:
            place = self.places[i]
            assert place is not None
            additions.append(Addition(self.numbers[i], added(self.numbers[i], strength), place, False))
        return replace(
            self._only(left),
            singles=tuple(with_others(self.singles[i]) for i in left) or (reference,),
            additions=tuple(additions),
            reference=reference,
        )

    @property
    def named(self) -> Mix:
        """`merged` without the candidates of a pool: all LoRAs that the prompt asks for by name."""
        if not any(self.pooled):
            return self.merged
        out = {n for n, pooled in zip(self.numbers, self.pooled, strict=True) if pooled}
        return tuple(0.0 if i in out else part for i, part in enumerate(self.merged))

    def words_by_mix(self, share: float = 0.0) -> dict[Mix, str]:
        """The own words of the LoRA that a mix is of, with and without shared parts; LoRAs without words are left out."""
        found = {}
        for participants in (self, self.with_shared_parts(share)):
            for mix, words in zip(participants.singles, participants.words, strict=False):
                if words:
                    found[mix] = words
        return found

    def mixes(self, share: float = 0.0) -> list[Mix]:
        """Every mix that a method may ask the model for, at this shared part."""
        shared = self.with_shared_parts(share)
        added = [each.mix for each in shared.additions]
        every = [self.base, *self.singles, *shared.singles, *added, shared.compared, self.merged, self.named]
        return list(dict.fromkeys(every))
