"""What a LoRA's passes read other than the common prompt: its own words before it, and other LoRAs' trigger words left out of it.

Most people write the words of all characters into one prompt. A LoRA that reads another's word draws the other character in its own place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..compose.mixes import Words
from .roles import TaggedLora
from .trigger_words import NEARLY_ALL, phrase_in, words_of

_MARKS = re.compile(
    r"(?P<escaped>\\.)|(?P<wall>\b(?:BREAK|AND)\b)"
    r"|[()\[\]]|:\s*[-+]?(?:\d+\.?\d*|\.\d+)(?=\s*(?:[)\]]|\bAND\b|$))",
    re.DOTALL,
)
"""What is not text: brackets, the weights of emphasis and of parts, the steps of scheduling, BREAK and AND."""

_MARK, _WALL = "\x1f", "\0"
"""What marks are replaced by to find phrases: a blank, which may be inside a phrase, and a character that may not."""

_PART = re.compile(r"^(\s*)(.*?)(\s*:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*|\s*)$", re.DOTALL)


def with_words(prompt: str, words: Words) -> str:
    """The prompt as it is read with these words: own words first, and without the phrases of others.

    With ``AND``, each part begins with them. A prompt that would have no word left stays whole.
    """
    prompt = _without(prompt, words)
    if not words.own:
        return prompt
    parts = re.split(r"(\bAND\b)", prompt)
    joined = [part if part == "AND" else _PART.sub(lambda m: _joined(m, words.own), part) for part in parts]
    # Next to an empty part there is no blank, and AND would become a part of the words.
    text = ""
    for part in joined:
        touches = re.fullmatch(r"\w\w", text[-1:] + part[:1]) is not None
        text += f" {part}" if touches else part
    return text


def _joined(part: re.Match[str], words: str) -> str:
    """Text and words, before the part's weight and with the blanks that were around it."""
    before, text, after = part.groups()
    return f"{before}{words}{', ' if text else ''}{text}{after}"


def reading(loras: Sequence[TaggedLora], prompts: Sequence[str]) -> list[TaggedLora]:
    """The LoRAs; those with a place and without `words=` also with the phrases of these prompts that their passes do not read.

    These are the trigger words of LoRAs in other places. Words stay that call LoRAs in several places, or one without a place. A place
    inside another belongs to it: a character's passes read the words of its hat.
    """
    if sum(lora.place is not None for lora in loras) < 2:
        return [*loras]
    texts = [*map(_text, prompts)]
    owners: dict[str, list[TaggedLora]] = {}
    for lora in loras:
        for phrase in words_of(lora.metadata, lora.file, NEARLY_ALL):
            if any(phrase_in(phrase).search(text) for text in texts):
                owners.setdefault(phrase.casefold(), []).append(lora)
    return [replace(lora, read=_read_by(lora, owners, prompts)) for lora in loras]


def _read_by(lora: TaggedLora, owners: Mapping[str, Sequence[TaggedLora]], prompts: Sequence[str]) -> Words:
    others = [
        phrase
        for phrase, own in owners.items()
        if all(_are_apart(each, lora) and not _are_apart(each, own[0]) for each in own)
    ]
    words = Words(without=(*others,), but=tuple(phrase for phrase in owners if phrase not in others))
    # Where nothing is left out, the LoRA shares the common text.
    return words if any(_without(prompt, words) != prompt for prompt in prompts) else Words()


def _are_apart(one: TaggedLora, other: TaggedLora) -> bool:
    """Whether two LoRAs have places, neither of them inside the other's."""
    if one is other or one.place is None or other.place is None:
        return False
    return not (one.place.is_within(other.place) or other.place.is_within(one.place))


def _without(prompt: str, words: Words) -> str:
    """The prompt without these phrases. Marks and commas stay."""
    text, left = _text(prompt), [*prompt]
    found = [
        (match.span(), phrase)
        for phrase in (*words.but, *words.without)
        for match in phrase_in(phrase).finditer(text)
    ]
    taken: set[int] = set()
    # The longest first: "dragon" of one LoRA is not cut out of "red dragon girl" of another.
    for (start, end), phrase in sorted(found, key=lambda each: each[0][0] - each[0][1]):
        if taken.isdisjoint(range(start, end)):
            taken.update(range(start, end))
            if phrase not in words.but:
                left[start:end] = [sign if sign == _MARK else "" for sign in text[start:end]]
    left = [prompt[i] if sign == _MARK else sign for i, sign in enumerate(left)]
    rest = "".join(left)
    return rest if re.search(r"[^\W\d_]", _text(rest)) else prompt


def _text(prompt: str) -> str:
    """The prompt with marks masked, at unchanged positions."""

    def masked(match: re.Match[str]) -> str:
        if match["escaped"]:
            return match.group()
        return (_WALL if match["wall"] else _MARK) * len(match.group())

    return _MARKS.sub(masked, prompt)
