"""The WebUIs' LoRA tags, ``<lora:name:0.8:option=value>``: their parts, and their errors.

A WebUI splits a tag at every colon. If it cannot read a part, it drops all LoRAs of the prompt. So tags are checked first, and parts that
a WebUI cannot read are rewritten for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import LoratorioError

KINDS = ("lora", "lyco")

WORDS_OPTION = "words"
"""The named argument of the words that are added to the prompt for the LoRA's rows only. Colons are allowed inside brackets."""

BLOCK_WEIGHT, LORACTL = "lora_block_weight", "loractl"
"""Words in the paths of extensions that read LoRA tags."""

IN_NEGATIVE = "The LoRA tag in the negative prompt has no effect: LoRAs are read from the prompt only."

_ANY = re.compile(r"<(\w+):([^>]+)>")
_WORDS = f"{WORDS_OPTION}="

# Stand-ins for separators inside own words: characters of a private area, which prompts do not contain.
_HIDDEN = {ord(sign): chr(0xE000 + ord(sign)) for sign in ":="}
_SHOWN = {ord(hidden): chr(sign) for sign, hidden in _HIDDEN.items()}


class Tag(NamedTuple):
    """What stands in a LoRA's tag.

    Attributes:
        name: of the LoRA; of a pool's tag, the pool's pattern.
        numbers: the parts without a name, which are strengths, as they are written.
        options: the parts with a name.
    """

    name: str
    numbers: tuple[str, ...]
    options: Mapping[str, str]


def read_tag(content: str) -> Tag:
    """What stands between ``<lora:`` and ``>``."""
    name, *parts = parts_of(content)
    numbers: list[str] = []
    options: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        # The WebUIs' own rule: exactly one = makes an argument with a name.
        if sign and (key == WORDS_OPTION or "=" not in value):
            options[key] = value
        else:
            numbers.append(part)
    return Tag(name.strip(), tuple(numbers), options)


def parts_of(content: str) -> list[str]:
    """A tag's content, split at its colons, except those inside brackets of own words: ``words=(mimsy:1.2)``."""
    parts: list[str] = []
    for part in content.split(":"):
        if parts and _has_open_bracket(parts[-1]):
            parts[-1] += ":" + part
        else:
            parts.append(part)
    return parts


def _has_open_bracket(part: str) -> bool:
    text = re.sub(r"\\.", "", part)
    return part.startswith(_WORDS) and sum(map(text.count, "([")) > sum(map(text.count, ")]"))


def number(text: str) -> float | None:
    """A strength as a number; None if it is not a finite number, or only by Python's own rules, such as 1_0."""
    try:
        value = float("nan" if "_" in text else text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def split_tags(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and those of LoRAs."""
    loras = [read_tag(content) for kind, content in _ANY.findall(prompt) if kind in KINDS]
    return _ANY.sub("", prompt), loras


def trouble(kind: str, content: str, has_loractl: bool = False) -> str:
    """A sentence on why the tag ``<kind:content>`` cannot be read, or nothing.

    has_loractl: that extension reads strengths that change from step to step, ``1@0,0@1``.
    """
    why = "" if has_loractl and "@" in content else _why(kind, content)
    return f"The tag <{kind}:{content}> cannot be read: {why}." if why else ""


def _why(kind: str, content: str) -> str:
    tag = read_tag(content)
    parts = parts_of(content)
    if not tag.name:
        return "it names no LoRA"
    if "<" in content:
        return "it has no > at its end"
    if kind.lower() in KINDS and tag.name.count("=") == 1:  # to a WebUI an argument with a name
        return f"{tag.name} stands where the name of a LoRA should"
    if ":" in parts[-1] and _has_open_bracket(parts[-1]):
        return f"a bracket of {WORDS_OPTION}= is not closed"
    for place, text in enumerate(parts[1:], 1):
        if text not in tag.numbers[:3]:
            continue
        if "=" in text:
            return f"{text} contains more than one ="
        if text in tag.numbers[:2] and number(text) is None:
            if parts[place - 1].startswith(_WORDS):
                return f"a colon in {WORDS_OPTION}= must be inside brackets, as in {WORDS_OPTION}=(red:1.2)"
            mended = _mended(text, is_first=text == tag.numbers[0])
            right = ":".join([*parts[:place], *mended, *parts[place + 1 :]])
            return f"{text.strip() or 'nothing'} is not a number: write <{kind}:{right}>"
    for key in ("te", "unet"):
        if key in tag.options and number(tag.options[key]) is None:
            return f"{key}={tag.options[key]} is not a number"
    rank = tag.options.get("dyn", tag.numbers[2] if len(tag.numbers) > 2 else "0")
    return "" if rank.strip().isdecimal() else f"the rank to use must be a whole number, not {rank}"


def _mended(text: str, is_first: bool) -> list[str]:
    """A strength with a comma, rewritten with a point; for other text 1, or nothing if it is not the first strength."""
    with_point = text.replace(",", ".").strip()
    if number(with_point) is not None:
        return [with_point]
    return ["1"] if is_first else []


def for_webui(prompt: str, has_loractl: bool = False) -> str:
    """`prompt` with LoRA tags that a WebUI can read. `shown` restores own words.

    Args:
        has_loractl: as for `trouble`.

    Raises:
        LoratorioError: a tag cannot be read, so the WebUI would drop every LoRA of the prompt.
    """

    def written(match: re.Match[str]) -> str:
        kind, content = match.groups()
        if kind.lower() not in (*KINDS, "pool"):
            return match.group()
        why = trouble(kind, content, has_loractl)
        if not why and kind not in KINDS and kind.lower() in KINDS:
            why = f"The WebUI does not read the tag <{kind}:{content}>: write {kind.lower()} in lower case."
        if why:
            raise LoratorioError(why)
        return f"<{kind}:{':'.join(map(_hidden, parts_of(content)))}>"

    return _ANY.sub(written, prompt)


def _hidden(part: str) -> str:
    return _WORDS + part[len(_WORDS) :].translate(_HIDDEN) if part.startswith(_WORDS) else part


def shown(words: str) -> str:
    """Own words as they were before `for_webui`."""
    return words.translate(_SHOWN)


def has_tag(text: str) -> bool:
    """Whether a text has a LoRA's, or a pool's, tag."""
    return any(kind.lower() in (*KINDS, "pool") for kind, _ in _ANY.findall(text))
