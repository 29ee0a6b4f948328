"""A LoRA's role in a composition, from its tag (``role=style``) or recognised from its file.

*content* (the default) gets weights patch by patch. *style* acts everywhere: the rows of every content LoRA have it too.
*always* acts on every row, the base's included, and is never composed. It is for speed LoRAs (LCM, Lightning, Hyper, Turbo, DMD), which
change the sampler's steps and not the content of the picture.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..compose.candidates import CALLED
from ..compose.importance import importance, without_words
from ..compose.mixes import NO_WORDS, Participants, Words
from ..compose.regions import WHOLE, Box, Place, outside
from ..compose.search import MOST
from ..errors import LoratorioError
from .places import OPTION as PLACE_OPTION
from .places import read_place, wishes
from .tags import WORDS_OPTION, shown
from .trigger_words import called, callers, words_of

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["content", "style", "always"]

ROLES: dict[str, str] = {"content": "Content", "style": "Style", "always": "Always"}
"""Names and labels, in the order in which they are shown."""

OPTION = "role"
"""The named argument of a LoRA tag."""

POOL_OPTION = "pool"
"""The named argument of a LoRA that is a candidate out of a pool, where a host knows LoRA tags only."""

# These words name nothing else.
_CERTAIN = re.compile(r"(?<![a-z])(lcm|dmd2|tcd|hyper[-_ ]?(sd(xl)?|flux))(?![a-z])", re.IGNORECASE)
# These are also ordinary words: they count only next to a model's name, "LoRA" or a number of steps.
_LIKELY = re.compile(r"lightning|hyper|turbo|dmd|distill(ed)?")
_BESIDE = re.compile(r"(sd|sdxl|xl|flux|qwen|wan|image|lora|alpha)\d*|\d+steps?")
_METADATA_KEYS = (
    "modelspec.title",
    "modelspec.description",
    "modelspec.tags",
    "ss_output_name",
    "ss_training_comment",
)


@dataclass(frozen=True)
class TaggedLora:
    """A LoRA with its tag.

    Attributes:
        name: as in the prompt.
        options: the named arguments of its tag.
        metadata: of its file, as safetensors stores it.
        pooled: whether it comes from a pool and is only a candidate.
        file: its file, if known.
        read: what its passes read other than the prompt, where its tag does not say (`own_words.reading`).
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    pooled: bool = False
    file: Path | None = None
    read: Words = NO_WORDS

    @property
    def is_candidate(self) -> bool:
        """Whether it is only a candidate, by the host or by its tag."""
        return self.pooled or self.options.get(POOL_OPTION, "0") not in ("", "0")

    def as_named(self) -> TaggedLora:
        """The same LoRA, as if the prompt named it."""
        options = {name: value for name, value in self.options.items() if name != POOL_OPTION}
        return replace(self, options=options, pooled=False)

    @property
    def place(self) -> Place | None:
        """Where it may act; None: everywhere. Raises LoratorioError if the tag's place cannot be read."""
        value = self.options.get(PLACE_OPTION)
        return None if value is None else read_place(value, self.name)

    @property
    def words(self) -> Words:
        """What this LoRA's rows read other than the prompt."""
        own = shown(self.options.get(WORDS_OPTION, "")).strip()
        return Words(own) if own else self.read


def repeats(loras: Sequence[TaggedLora]) -> list[list[int]]:
    """The numbers of the LoRAs, grouped: tags of one file with the same place and the same own words are one LoRA.

    Raises LoratorioError if a place cannot be read.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, lora in enumerate(loras):
        key = (lora.file or lora.name, lora.place, lora.words, lora.is_candidate)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def united(loras: Sequence[TaggedLora]) -> TaggedLora:
    """Several tags of one LoRA as one. If an argument repeats, the first one counts."""
    options = {name: value for lora in reversed(loras) for name, value in lora.options.items()}
    return replace(loras[0], options=options)


@dataclass(frozen=True)
class AssignedRole:
    """The role of one LoRA. `recognised`: not from its tag, but from its file."""

    name: str
    role: Role
    recognised: bool = False


def read_role(value: str, lora: str) -> Role:
    """The role that a tag's argument names. Raises LoratorioError with the closest name."""
    text = value.strip().lower()
    if text in ROLES:
        return cast(Role, text)
    near = difflib.get_close_matches(text, ROLES, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise LoratorioError(f"The role of LoRA {lora} must be one of {', '.join(ROLES)}, not {value!r}{hint}")


def looks_like_speed_lora(name: str, metadata: Mapping[str, str] | None = None) -> bool:
    """Whether a LoRA's name or metadata is that of an LCM, Lightning, Hyper, Turbo or DMD LoRA."""
    texts = [name.replace("\\", "/").rsplit("/", 1)[-1]]
    texts += [str((metadata or {}).get(key, ""))[:400] for key in _METADATA_KEYS]
    return any(_CERTAIN.search(text) or _names_speed(text) for text in texts if text)


def _names_speed(text: str) -> bool:
    """Whether two neighbouring words name a method for fewer steps and the model that it is for."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(\d)[-_ ]+(steps?)", r"\1\2", text.lower()))
    return any(
        _LIKELY.fullmatch(one) and _BESIDE.fullmatch(other)
        for pair in pairwise(words)
        for one, other in (pair, pair[::-1])
    )


def assigned_roles(loras: Sequence[TaggedLora]) -> list[AssignedRole]:
    """The role of every LoRA: that of its tag, else *always* for a speed LoRA that the prompt names, else *content*.

    Raises:
        LoratorioError: a tag names a role that does not exist, or a place that cannot be read.
    """
    roles = []
    for lora in loras:
        if OPTION in lora.options:
            roles.append(AssignedRole(lora.name, read_role(lora.options[OPTION], lora.name)))
        elif not lora.is_candidate and looks_like_speed_lora(lora.name, lora.metadata):
            roles.append(AssignedRole(lora.name, "always", recognised=True))
        else:
            roles.append(AssignedRole(lora.name, "content"))
    return roles


def chosen_from_pool(loras: Sequence[TaggedLora], prompt: str) -> tuple[dict[int, TaggedLora], str]:
    """The LoRAs of a prompt that take part, by number, and a sentence about the pool among them, or nothing.

    Candidates whose trigger words are in the prompt count as named. Of the others, only those without known trigger words stay, and
    divergence decides about them. If the prompt calls no candidate, divergence decides about all.
    """
    pool = [number for number, lora in enumerate(loras) if lora.is_candidate]
    words = [words_of(loras[number].metadata, loras[number].file) for number in pool]
    by_prompt = {number: own for number, own in zip(pool, callers(words, prompt), strict=True) if own}
    if not by_prompt:
        return dict(enumerate(loras)), ""
    silent = {number for number, own in zip(pool, words, strict=True) if own and number not in by_prompt}
    taken = {
        number: lora.as_named() if number in by_prompt else lora
        for number, lora in enumerate(loras)
        if number not in silent
    }
    names = ", ".join(f"{loras[number].name} ({', '.join(own)})" for number, own in by_prompt.items())
    others = (
        f" {len(silent)} with other trigger words {'were' if len(silent) > 1 else 'was'} not used."
        if silent
        else ""
    )
    return taken, f"Chosen from the pool by their trigger words: {names}.{others}"


def reactions_note(names: Sequence[str], reactions: Mapping[int, float], left_out: Collection[int]) -> str:
    """A sentence about the candidates of a pool that were scored while sampling.

    Args:
        names: of all LoRAs.
        reactions: by a candidate's number, how much the prompt moves it (`compose.candidates.reactions`).
        left_out: those that are not used.
    """
    taken = [number for number in reactions if number not in left_out]
    if len(taken) == len(reactions) and min(reactions.values()) < CALLED:
        return (
            "The prompt calls no LoRA of the pool: none changes clearly more under the prompt than under the negative prompt. So all of "
            "them take part, and the picture may show things that the prompt does not ask for. Name the LoRAs that you want."
        )
    told = ", ".join(f"{names[number]} ({reactions[number]:.1f})" for number in taken)
    count = len(left_out)
    others = f" {count} other{'s were' if count > 1 else ' was'} not used." if count else ""
    return (
        f"Chosen from the pool, by how much more they change under the prompt than under the negative prompt (the prompt itself is 1): "
        f"{told}.{others}"
    )


def participants_of(
    loras: Sequence[TaggedLora],
    importance: Mapping[int, float] | None = None,
    prompt: str = "",
) -> Participants:
    """Which LoRAs are composed, and how.

    Args:
        importance: by LoRA number, how much its trigger words matter in the prompt (W-Composite).
        prompt: without tags; its words may say where a LoRA's place is to be found.

    Raises:
        LoratorioError: a tag names a role that does not exist, or a place that cannot be read or found.
    """
    roles = assigned_roles(loras)
    places = {i: place for i, lora in enumerate(loras) if (place := lora.place) is not None}
    places |= _sought(loras, roles, places, prompt)
    alone = [i for i, place in places.items() if place.sought and place.boxes == (WHOLE,)]
    if len(alone) == 1:
        del places[alone[0]]
    return Participants.of(
        len(roles),
        always=[i for i, each in enumerate(roles) if each.role == "always"],
        styles=[i for i, each in enumerate(roles) if each.role == "style"],
        pooled=[i for i, lora in enumerate(loras) if lora.is_candidate],
        importance=importance,
        places=places,
        words={i: lora.words for i, lora in enumerate(loras) if lora.words},
        with_role=[i for i, lora in enumerate(loras) if OPTION in lora.options],
    )


def _sought(
    loras: Sequence[TaggedLora], roles: Sequence[AssignedRole], places: Mapping[int, Place], prompt: str
) -> dict[int, Place]:
    """By LoRA number the places that are to be found: all of them what the drawn places leave, which one alone has to itself."""
    sought = [i for i, place in places.items() if place.sought]
    names = ", ".join(loras[i].name for i in sought)
    for i in sought:
        if roles[i].role != "content" or loras[i].is_candidate:
            what = "of a pool" if loras[i].is_candidate else f"with role={roles[i].role}"
            raise LoratorioError(
                f"at=auto finds the place of a character, so it does not work for a LoRA {what}, as {loras[i].name} is. "
                "Remove at=auto from its tag, or draw its place."
            )
    if len(sought) > MOST:
        raise LoratorioError(
            f"at=auto finds the places of up to {MOST} LoRAs, not of {len(sought)}: {names}. Draw some of them."
        )
    drawn = [
        box
        for i, place in places.items()
        if i not in sought and roles[i].role == "content"
        for box in place.boxes
    ]
    free = outside(drawn)
    if sought and not free:
        raise LoratorioError(
            f"The drawn places leave nothing of the picture to {names} (at=auto). Make them smaller."
        )
    known = [words_of(loras[i].metadata, loras[i].file) or [loras[i].name] for i in sought]
    towards = wishes(prompt, known, [loras[i].words.own for i in sought])
    alone = len(sought) == 1 and bool(drawn)
    return {
        i: replace(places[i], boxes=free, sought=not alone, towards=wish)
        for i, wish in zip(sought, towards, strict=True)
    }


def prompt_importance(
    loras: Sequence[TaggedLora], prompt: str, encode: Callable[[list[str]], Sequence[Tensor]]
) -> dict[int, float] | None:
    """By LoRA number, how much its trigger words matter in the prompt (W-Composite); None where no trigger words are known.

    encode: the base model's conditioning of each text, (tokens, width).
    """
    words = {i: called(words_of(lora.metadata, lora.file), prompt) for i, lora in enumerate(loras)}
    known = [i for i, own in words.items() if own]
    if not known:
        return None
    tokens = encode([prompt, *(without_words(prompt, words[i]) for i in known)])
    return dict(zip(known, importance(tokens[0], tokens[1:]), strict=True))


def unknown_options_note(loras: Sequence[TaggedLora], others: Collection[str] = ()) -> str:
    """A sentence about unknown arguments in tags, or nothing.

    Args:
        others: arguments that the host or another extension reads.
    """
    own = (OPTION, PLACE_OPTION, WORDS_OPTION, POOL_OPTION)
    strange = []
    for lora in loras:
        for option in lora.options:
            if option not in own and option not in others:
                near = difflib.get_close_matches(option, own[:3], n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                strange.append(f"{option}= of LoRA {lora.name}{hint}")
    if not strange:
        return ""
    return f"Unknown options in LoRA tags, which have no effect: {', '.join(strange)}."


def lone_place_note(loras: Sequence[TaggedLora]) -> str:
    """A sentence about a LoRA whose place cannot be found because there is no other with a place, or nothing."""
    placed = [lora for lora in loras if lora.place is not None]
    if len(placed) != 1 or not (placed[0].place and placed[0].place.sought):
        return ""
    return (
        f"at=auto of LoRA {placed[0].name} has no effect: it divides the picture between LoRAs, and no other LoRA has a place. "
        "Write at=auto into another character's tag, or draw this one's place."
    )


def not_found_note(names: Sequence[str], found: Sequence[Sized], count: int) -> str:
    """A sentence about pictures in which the places of LoRAs were not found, or nothing.

    Args:
        names: of the LoRAs whose places were sought. found: by picture, their places. count: how many pictures there are.
    """
    if not names:
        return ""
    those = f"{', '.join(names[:-1])} and {names[-1]}"
    if not found:
        return f"The places of {those} were not found: the sampling has too few steps. Make more steps, or draw the places."
    pictures = [number for number, places in enumerate(found) if not len(places)]
    if not pictures:
        return ""
    where = (
        "" if len(pictures) == count else f" in picture {', '.join(str(number + 1) for number in pictures)}"
    )
    figures = "One figure was" if len(names) == 2 else f"Fewer than {len(names)} figures were"
    people = "two" if len(names) == 2 else str(len(names))
    return (
        f"{figures} found for {those}{where}, so none has a place there. "
        f"Write {people} people into the prompt, make the picture wider, or draw the places."
    )


def style_note(names: Sequence[str]) -> str:
    """A sentence about the LoRAs of these names, which were found to be styles, or nothing."""
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"{', '.join(names)} change{'' if several else 's'} the whole picture evenly, and act{'' if several else 's'} as "
        f"{'styles' if several else 'a style'}, in all passes. {_to_compose(several)}"
    )


def no_room_note(loras: Sequence[TaggedLora], height: int, width: int, region: Box = WHOLE) -> str:
    """A sentence about LoRAs whose places are too small for height×width latent pixels of this region, or nothing."""
    small = [
        f"{lora.name} (at={lora.options[PLACE_OPTION]})"
        for lora in loras
        if lora.place is not None and float(lora.place.mask(height, width, region).sum()) < 1
    ]
    if not small:
        return ""
    several = len(small) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(small)} {'have' if several else 'has'} almost no effect: the place covers less than one "
        "latent pixel (8×8 picture pixels). Make it larger."
    )


def skipped_note(names: Sequence[str]) -> str:
    """A sentence about LoRAs of a pool that are not used, or nothing."""
    if not names:
        return ""
    return f"Not used from the pool, because they cannot be read or do not fit: {', '.join(names)}."


def unread_note(names: Sequence[str]) -> str:
    """A sentence about LoRAs for which the WebUI found no readable file, or nothing."""
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(names)} {'were' if several else 'was'} not used: the WebUI found no such file, or could "
        "not read it. Check the name, or get the file again."
    )


def partly_used_note(name: str, used: int, total: int) -> str:
    """A sentence about a LoRA of which the model does not have all layers, or nothing."""
    if used >= total:
        return ""
    return (
        f"LoRA {name}: only {used} of {total} layers match this model. Either it was made for another kind of model, or this WebUI does "
        "not know the names of the other layers."
    )


def without_effect_note(names: Sequence[str]) -> str:
    """A sentence about the LoRAs that were not used because they change nothing, or nothing."""
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(names)} {'have' if several else 'has'} no effect (strength 0, or made for another "
        f"model) and {'were' if several else 'was'} not used."
    )


def recognised_note(roles: Sequence[AssignedRole]) -> str:
    """A sentence about the speed LoRAs whose tags give no role, or nothing."""
    names = [role.name for role in roles if role.recognised]
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"{', '.join(names)} look{'' if several else 's'} like {'' if several else 'a '}speed LoRA{'s' if several else ''} "
        f"and act{'' if several else 's'} on every row (role=always). {_to_compose(several)}"
    )


def _to_compose(several: bool) -> str:
    return f"To compose {'them' if several else 'it'} instead, write role=content into the tag."
