"""What part a LoRA plays in a composition, said in its tag (``role=style``) or recognised by its file.

*content* (the default) gets weights patch by patch. *style* acts everywhere: every content LoRA's rows have it too.
*always* acts on every row, the base's included, and is never composed: speed LoRAs (LCM, Lightning, Hyper, Turbo, DMD), which change
the sampler's steps and not what is in the picture.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from .errors import LoratorioError

if TYPE_CHECKING:
    from .compose.methods import Cast

Role = Literal["content", "style", "always"]

ROLES: dict[str, str] = {"content": "Content", "style": "Style", "always": "Always"}
"""Names and labels, in the order in which they are shown."""

OPTION = "role"
"""The named argument of a LoRA tag."""

POOL_OPTION = "pool"
"""The named argument of a LoRA that is a candidate out of a pool, where a host knows LoRA tags only."""

# These words name nothing else.
_CERTAIN = re.compile(r"(?<![a-z])(lcm|dmd2|tcd|hyper[-_ ]?(sd(xl)?|flux))(?![a-z])", re.IGNORECASE)
# These are words of the language too, and count only beside a model's name or a number of steps.
_LIKELY = re.compile(r"(?<![a-z])(lightning|hyper|turbo|dmd|distill(ed)?)(?![a-z])", re.IGNORECASE)
_BESIDE = re.compile(
    r"(?<![a-z])(sd|sdxl|xl|sd[-_ ]?\d|flux|qwen|wan|lora|alpha)(?![a-z])|\d+[-_ ]?steps?(?![a-z])",
    re.IGNORECASE,
)
_METADATA_KEYS = (
    "modelspec.title",
    "modelspec.description",
    "modelspec.tags",
    "ss_output_name",
    "ss_training_comment",
)


@dataclass(frozen=True)
class Player:
    """A LoRA as the roles see it.

    Attributes:
        name: as in the prompt.
        options: the named arguments of its tag.
        metadata: of its file, as safetensors stores it.
        pooled: it came out of a pool and is only a candidate.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    pooled: bool = False

    @property
    def is_candidate(self) -> bool:
        """Whether it is only a candidate: said by the host, or by its tag."""
        return self.pooled or self.options.get(POOL_OPTION, "0") not in ("", "0")


@dataclass(frozen=True)
class Part:
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
    return any(
        _CERTAIN.search(text) or (_LIKELY.search(text) and _BESIDE.search(text)) for text in texts if text
    )


def parts_of(players: Sequence[Player]) -> list[Part]:
    """The role of every LoRA: what its tag says, else *always* for a speed LoRA that the prompt names, else *content*.

    Raises:
        LoratorioError: a tag names a role that does not exist.
    """
    parts = []
    for player in players:
        if OPTION in player.options:
            parts.append(Part(player.name, read_role(player.options[OPTION], player.name)))
        elif not player.is_candidate and looks_like_speed_lora(player.name, player.metadata):
            parts.append(Part(player.name, "always", recognised=True))
        else:
            parts.append(Part(player.name, "content"))
    return parts


def trigger_words(metadata: Mapping[str, str], prompt: str) -> list[str]:
    """The words of `prompt` that call a LoRA, as its file's metadata tells: the trigger phrase, else the tags it was trained on.

    Of the training tags only those count that were on at least half of its pictures.
    """
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    words = [each.strip() for each in phrase.split(",")] if phrase else _common_tags(metadata)
    return [word for word in words if word and word.lower() in prompt.lower()]


def _common_tags(metadata: Mapping[str, str]) -> list[str]:
    try:
        by_folder = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in by_folder.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError):
        return []
    most = max(counts.values(), default=0)
    return [tag for tag, count in counts.items() if 2 * count >= most]


def cast_of(players: Sequence[Player], importance: Mapping[int, float] | None = None) -> Cast:
    """The generation's cast: which LoRAs are composed, and how..

    Args:
        importance: by LoRA number, how much its trigger words matter in the prompt (W-Composite).

    Raises:
        LoratorioError: a tag names a role that does not exist.
    """
    from .compose.methods import Cast

    parts = parts_of(players)
    return Cast.of(
        len(parts),
        always=[i for i, part in enumerate(parts) if part.role == "always"],
        styles=[i for i, part in enumerate(parts) if part.role == "style"],
        pooled=[i for i, player in enumerate(players) if player.is_candidate],
        importance=importance,
    )


def recognised_note(parts: Sequence[Part]) -> str:
    """A sentence on the speed LoRAs that nobody gave a role, or nothing."""
    names = [part.name for part in parts if part.recognised]
    if not names:
        return ""
    several = len(names) > 1
    return (
        f"{', '.join(names)} look{'' if several else 's'} like {'' if several else 'a '}speed LoRA{'s' if several else ''} "
        f"and act{'' if several else 's'} on every row (role=always). Write role=content into the tag to compose "
        f"{'them' if several else 'it'} instead."
    )
