"""What part a LoRA plays in a composition, said in its tag (``role=style``) or recognised by its file.

*content* (the default) gets weights patch by patch. *style* acts everywhere: every content LoRA's rows have it too.
*always* acts on every row, the base's included, and is never composed: speed LoRAs (LCM, Lightning, Hyper, Turbo, DMD), which change
the sampler's steps and not what is in the picture.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ..compose.candidates import CALLED
from ..compose.importance import importance, without_words
from ..compose.mixes import Participants
from ..compose.regions import WHOLE, Box, Place
from ..errors import LoratorioError
from .places import OPTION as PLACE_OPTION
from .places import read_place
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
# These are words of the language too, and count only right beside a model's name, "LoRA" or a number of steps.
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
    """A LoRA as the roles see it.

    Attributes:
        name: as in the prompt.
        options: the named arguments of its tag.
        metadata: of its file, as safetensors stores it.
        pooled: it came out of a pool and is only a candidate.
        file: where it was read from, where that is known.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    pooled: bool = False
    file: Path | None = None

    @property
    def is_candidate(self) -> bool:
        """Whether it is only a candidate: said by the host, or by its tag."""
        return self.pooled or self.options.get(POOL_OPTION, "0") not in ("", "0")

    def as_named(self) -> TaggedLora:
        """The same as if the prompt named it."""
        options = {name: value for name, value in self.options.items() if name != POOL_OPTION}
        return replace(self, options=options, pooled=False)

    @property
    def place(self) -> Place | None:
        """Where it may act; None: everywhere. Raises LoratorioError where its tag's place cannot be read."""
        value = self.options.get(PLACE_OPTION)
        return None if value is None else read_place(value, self.name)

    @property
    def words(self) -> str:
        """What the prompt of its own rows has beside everybody's."""
        return shown(self.options.get(WORDS_OPTION, "")).strip()


def repeats(loras: Sequence[TaggedLora]) -> list[list[int]]:
    """The numbers of the LoRAs, those together that are one LoRA: of one file, in one place, with the same words of its own.

    Raises LoratorioError where a place cannot be read.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, lora in enumerate(loras):
        key = (lora.file or lora.name, lora.place, lora.words, lora.is_candidate)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def united(loras: Sequence[TaggedLora]) -> TaggedLora:
    """Several tags of one LoRA as one: where they have the same argument, the first one's counts."""
    options = {name: value for lora in reversed(loras) for name, value in lora.options.items()}
    return replace(loras[0], options=options)


@dataclass(frozen=True)
class AssignedRole:
    """The role of one LoRA. `recognised`: nobody asked for it, the file looks like it."""

    name: str
    role: Role
    recognised: bool = False


def read_role(value: str, lora: str) -> Role:
    """The role that a tag's argument names. Raises LoratorioError with the nearest."""
    text = value.strip().lower()
    if text in ROLES:
        return cast(Role, text)
    near = difflib.get_close_matches(text, ROLES, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise LoratorioError(f"The role of LoRA {lora} must be one of {', '.join(ROLES)}, not {value!r}{hint}")


def looks_like_speed_lora(name: str, metadata: Mapping[str, str] | None = None) -> bool:
    """Whether a LoRA's name, or what its file says of itself, is that of an LCM, Lightning, Hyper, Turbo or DMD LoRA."""
    texts = [name.replace("\\", "/").rsplit("/", 1)[-1]]
    texts += [str((metadata or {}).get(key, ""))[:400] for key in _METADATA_KEYS]
    return any(_CERTAIN.search(text) or _names_speed(text) for text in texts if text)


def _names_speed(text: str) -> bool:
    """Whether two words that stand side by side are that of a way to need fewer steps, and what it was made for."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(\d)[-_ ]+(steps?)", r"\1\2", text.lower()))
    return any(
        _LIKELY.fullmatch(one) and _BESIDE.fullmatch(other)
        for pair in pairwise(words)
        for one, other in (pair, pair[::-1])
    )


def assigned_roles(loras: Sequence[TaggedLora]) -> list[AssignedRole]:
    """The role of every LoRA: what its tag says, else *always* for a speed LoRA that the prompt names, else *content*.

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
    """What is taken of a prompt's LoRAs, by number, and a sentence on the pool among them, or nothing.

    Candidates whose trigger words stand in the prompt count as named. Of the others only those are left whose words nobody knows:
    divergence decides on them. Where the prompt calls no candidate, divergence decides on all.
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
        f"; {len(silent)} with other trigger words {'were' if len(silent) > 1 else 'was'} left out"
        if silent
        else ""
    )
    return taken, f"From the pool by their trigger words: {names}{others}."


def reactions_note(names: Sequence[str], reactions: Mapping[int, float], left_out: Collection[int]) -> str:
    """A sentence on the candidates of a pool that were looked at while sampling.

    Args:
        names: of all LoRAs.
        reactions: by number of a candidate, how much the prompt moves it (`compose.candidates.reactions`).
        left_out: those that were left out.
    """
    taken = [number for number in reactions if number not in left_out]
    if len(taken) == len(reactions) and min(reactions.values()) < CALLED:
        return (
            "The prompt calls no LoRA of the pool: none does clearly more under it than under the negative prompt. All were weighed at "
            "every step, which may draw what nobody asked for; name the LoRAs that you want."
        )
    told = ", ".join(f"{names[number]} ({reactions[number]:.1f})" for number in taken)
    count = len(left_out)
    others = f"; {count} other{'s were' if count > 1 else ' was'} left out" if count else ""
    return (
        f"From the pool, by how much more they do under the prompt than under the negative prompt (what the prompt does is 1): "
        f"{told}{others}."
    )


def participants_of(
    loras: Sequence[TaggedLora],
    importance: Mapping[int, float] | None = None,
) -> Participants:
    """The generation's participants: which LoRAs are composed, and how.

    Args:
        importance: by LoRA number, how much its trigger words matter in the prompt (W-Composite).

    Raises:
        LoratorioError: a tag names a role that does not exist, or a place that cannot be read.
    """
    roles = assigned_roles(loras)
    places = {i: place for i, lora in enumerate(loras) if (place := lora.place) is not None}
    return Participants.of(
        len(roles),
        always=[i for i, each in enumerate(roles) if each.role == "always"],
        styles=[i for i, each in enumerate(roles) if each.role == "style"],
        pooled=[i for i, lora in enumerate(loras) if lora.is_candidate],
        importance=importance,
        places=places,
        words={i: lora.words for i, lora in enumerate(loras) if lora.words},
    )


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
    """A sentence on the named arguments of tags that nobody reads, or nothing.

    Args:
        others: arguments that the host, or another extension, reads.
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
    return f"Unknown in a LoRA tag, and without effect: {', '.join(strange)}."


def no_room_note(loras: Sequence[TaggedLora], height: int, width: int, region: Box = WHOLE) -> str:
    """A sentence on LoRAs whose places are too small to show in height×width latent pixels of this part of the picture, or nothing."""
    small = [
        f"{lora.name} (at={lora.options[PLACE_OPTION]})"
        for lora in loras
        if lora.place is not None and float(lora.place.mask(height, width, region).sum()) < 1
    ]
    if not small:
        return ""
    several = len(small) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(small)} {'have' if several else 'has'} next to no effect: the place covers less than one "
        "latent pixel, which is 8×8 picture pixels, of what is sampled. Make it larger."
    )


def unread_note(names: Sequence[str]) -> str:
    """A sentence on LoRAs of which the WebUI found no file that it can read."""
    several = len(names) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(names)} {'are' if several else 'is'} not in the picture: there is no such file, or it "
        "is damaged."
    )


def partly_used_note(name: str, used: int, total: int) -> str:
    """A sentence on a LoRA of which a model has not all layers, or nothing."""
    if used >= total:
        return ""
    return (
        f"Of LoRA {name} {used} of {total} layers were used: the others are not in this model, which may be of another kind than the "
        "one that it was made for, or have names that this WebUI does not read."
    )


def without_effect_note(names: Sequence[str]) -> str:
    """A sentence on the LoRAs that were left out because the picture is the same with them, or nothing."""
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"LoRA{'s' if several else ''} {', '.join(names)} change{'' if several else 's'} nothing here (strength 0, or nothing in "
        f"{'them' if several else 'it'} is for this model), and {'were' if several else 'was'} left out."
    )


def recognised_note(roles: Sequence[AssignedRole]) -> str:
    """A sentence on the speed LoRAs that nobody gave a role, or nothing."""
    names = [role.name for role in roles if role.recognised]
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"{', '.join(names)} look{'' if several else 's'} like {'' if several else 'a '}speed LoRA{'s' if several else ''} "
        f"and act{'' if several else 's'} on every row (role=always). Write role=content into the tag to compose "
        f"{'them' if several else 'it'} instead."
    )
