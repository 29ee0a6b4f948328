"""Mixes, and the LoRAs of a generation as mixes.

A *mix* says which LoRAs act on a row of the model's batch: one coefficient per LoRA of the generation. All zeros is the base
model, a single one is that LoRA alone, all ones is what merging gives. A LoRA's own strength is not part of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .regions import Place, outside

Mix = tuple[float, ...]

STYLE_SHARE = 0.9
"""The part of a style's strength that acts in the other LoRAs' and the base's rows: found by measurement (docs/lab/METHODS.md)."""


ROOM = 0.25
"""Beside places that leave no more of the picture than this, there is no room for another figure."""


class Words(NamedTuple):
    """What a LoRA's rows read other than the common prompt (`prompt.own_words.with_words`).

    Attributes:
        own: words before the prompt.
        without: phrases that are left out of it. but: phrases that stay, though some of `without` may be parts of them.
    """

    own: str = ""
    without: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.own or self.without)


NO_WORDS = Words()


class Branch(NamedTuple):
    """A block of model rows: every conditional (or unconditional) row of a step, under one mix."""

    mix: Mix
    cond: bool


@dataclass(frozen=True)
class ComposedLora:
    """A LoRA that is composed.

    Attributes:
        number: its position among all LoRAs of the generation, and in a mix.
        mix: what acts on its rows.
        style: it acts all over the picture. has_role: its tag says whether it does.
        pooled: it came out of a pool. scored: its pool is not settled, so it runs only when it is urgent.
        importance: how much its trigger words matter in the prompt (W-Composite).
        place: where it may act; None: everywhere.
        words: what its rows read other than the common prompt.
    """

    number: int
    mix: Mix
    style: bool = False
    has_role: bool = False
    pooled: bool = False
    scored: bool = False
    importance: float = 1.0
    place: Place | None = None
    words: Words = NO_WORDS

    @property
    def may_be_style(self) -> bool:
        """Whether it may be found to be a style."""
        return not (self.has_role or self.style or self.is_private)

    @property
    def is_private(self) -> bool:
        """Whether it acts in no other LoRA's rows."""
        return self.pooled or self.place is not None or bool(self.words)

    @property
    def is_unweighed(self) -> bool:
        """Whether it is a style that acts in all other rows, so that it has no weight of its own."""
        return self.style and not self.pooled


class Addition(NamedTuple):
    """A LoRA whose difference from the reference is added inside its place, without a weight.

    Attributes:
        number: its position among all LoRAs of the generation. mix: the reference's, and this LoRA.
    """

    number: int
    mix: Mix
    place: Place


@dataclass(frozen=True)
class Participants:
    """The LoRAs of a generation as mixes.

    Attributes:
        base: the mix without any composed LoRA but styles. merged: the mix with all of them.
        loras: those that are composed.
        additions: those that are added inside their places.
        reference: the mix that conditional predictions are compared with: the base, and what all LoRAs' rows share.
    """

    base: Mix
    loras: tuple[ComposedLora, ...]
    merged: Mix
    reference: Mix
    additions: tuple[Addition, ...] = ()

    @classmethod
    def of(
        cls,
        count: int,
        always: Sequence[int] = (),
        styles: Sequence[int] = (),
        pooled: Sequence[int] = (),
        importance: Mapping[int, float] | None = None,
        places: Mapping[int, Place] | None = None,
        words: Mapping[int, Words] | None = None,
        with_role: Collection[int] = (),
    ) -> Participants:
        """`count` LoRAs by number. Those in `always` act on every row and are never composed, whatever else they are in."""
        places, words, importance = places or {}, words or {}, importance or {}
        apart = set(always)
        everywhere = apart - places.keys()
        composed = [i for i in range(count) if i not in apart]

        def mix(*active: int) -> Mix:
            return tuple(float(i in everywhere or i in active) for i in range(count))

        loras = tuple(
            ComposedLora(
                i,
                mix(i),
                i in styles,
                i in with_role,
                i in pooled,
                i in pooled,
                float(importance.get(i, 1.0)),
                places.get(i),
                words.get(i, NO_WORDS),
            )
            for i in composed
        )
        additions = tuple(Addition(i, mix(i), places[i]) for i in sorted(apart & places.keys()))
        return cls(mix(), loras, mix(*composed), mix(), additions)

    @property
    def mixes(self) -> list[Mix]:
        """Each composed LoRA's mix, in their order."""
        return [lora.mix for lora in self.loras]

    @property
    def numbers(self) -> list[int]:
        """Each composed LoRA's number, in their order."""
        return [lora.number for lora in self.loras]

    @property
    def words(self) -> dict[int, Words]:
        """By number, what each composed LoRA's rows read other than the common prompt."""
        return {lora.number: lora.words for lora in self.loras}

    @property
    def are_composed(self) -> bool:
        """Whether there is anything to compose."""
        return bool(self.loras or self.additions)

    @property
    def has_places(self) -> bool:
        """Whether any LoRA may act in a part of the picture only."""
        return any(lora.place is not None for lora in self.loras) or bool(self.additions)

    @property
    def seeks_places(self) -> bool:
        """Whether any LoRA's place is found while sampling."""
        return any(lora.place is not None and lora.place.sought for lora in self.loras)

    @property
    def has_pool(self) -> bool:
        """Whether any LoRA came out of a pool."""
        return any(lora.pooled for lora in self.loras)

    @property
    def named(self) -> Mix:
        """`merged` without the candidates of a pool: all LoRAs that the prompt names."""
        out = {lora.number for lora in self.loras if lora.pooled}
        return tuple(0.0 if i in out else part for i, part in enumerate(self.merged))

    def without(self, gone: Collection[int]) -> Participants:
        """The participants without the LoRAs of these numbers. Mixes keep their coefficients: nothing of these LoRAs acts."""
        loras = tuple(lora for lora in self.loras if lora.number not in gone)
        additions = tuple(each for each in self.additions if each.number not in gone)
        if len(loras) == len(self.loras) and len(additions) == len(self.additions):
            return self
        return replace(self, loras=loras, additions=additions)

    def settled(self) -> Participants:
        """The participants with the candidates that are left composed like LoRAs that the prompt names."""
        return replace(self, loras=tuple(replace(lora, scored=False) for lora in self.loras))

    def with_styles(self, numbers: Collection[int]) -> Participants:
        """The participants with the LoRAs of these numbers as styles."""
        if not numbers:
            return self
        loras = tuple(replace(lora, style=lora.style or lora.number in numbers) for lora in self.loras)
        return replace(self, loras=loras)

    def with_shared_parts(self, share: float = 0.0) -> Participants:
        """The participants without their styles, which base, reference and the other LoRAs' mixes have at `STYLE_SHARE`.

        Styles alone, with no other LoRA to act on, are one mix of their own at full strength. A style with a place is in no
        other mix: it becomes an addition.

        Args:
            share: the part of every other LoRA, except private ones, that the others' mixes and the reference have too.
        """
        styles = [lora for lora in self.loras if lora.is_unweighed]
        weighed = [lora for lora in self.loras if not lora.is_unweighed]
        sharing = [lora for lora in weighed if not lora.is_private] if share and len(weighed) > 1 else []
        if not styles and not sharing and not self.additions:
            return self
        strength = STYLE_SHARE if weighed else 1.0
        # By number, the part of a LoRA that every mix has. A LoRA's own mix has all of it anyway.
        styled = {lora.number: strength for lora in styles if lora.place is None}
        parts = styled | {lora.number: share for lora in sharing}
        base = _with_parts(self.base, styled) if weighed else self.base
        reference = _with_parts(self.base, parts)

        def added(number: int, part: float) -> Mix:
            return tuple(part if i == number else own for i, own in enumerate(reference))

        loras = [replace(lora, mix=_with_parts(lora.mix, parts)) for lora in weighed]
        if not loras:
            only = styles[0].number if styles else self.additions[0].number
            loras = [ComposedLora(only, reference)]
        additions = [each._replace(mix=added(each.number, 1.0)) for each in self.additions]
        additions += [
            Addition(lora.number, added(lora.number, strength), lora.place)
            for lora in styles
            if lora.place is not None
        ]
        return replace(self, base=base, loras=tuple(loras), reference=reference, additions=tuple(additions))

    def words_by_mix(self, share: float = 0.0) -> dict[Mix, Words]:
        """By mix, what its conditional rows read other than the common prompt, with and without shared parts.

        Where the places leave no room beside them, a LoRA without a place is a background to their figures. It reads their own words too,
        as does the reference: so its rows show those figures, as they do if the words are in the prompt (docs/lab/METHODS.md).
        """
        placed = [(lora.place, lora.words.own) for lora in self.loras if lora.place]
        free = outside([box for place, _ in placed for box in place.boxes])
        fill = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in free) <= ROOM
        # A pool's LoRAs have the same words.
        all_own = Words(", ".join(dict.fromkeys(own for _, own in placed if own and fill)))
        words: dict[Mix, Words] = {}
        for each in (self, self.with_shared_parts(share)):
            words |= {lora.mix: lora.words for lora in each.loras if lora.words}
            over_all = [lora.mix for lora in each.loras if not lora.place and not lora.words]
            if all_own and over_all:
                compared = [each.reference, *(added.mix for added in each.additions)]
                words |= dict.fromkeys([*compared, *over_all], all_own)
        return words


def _with_parts(mix: Mix, parts: Mapping[int, float]) -> Mix:
    """The mix with at least these parts of the LoRAs of these numbers."""
    return tuple(max(own, parts.get(i, 0.0)) for i, own in enumerate(mix))
