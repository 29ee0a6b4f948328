"""The WebUI's prompt language: LoRA tags, emphasis, BREAK."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import LoratorioError
from ..prompt.lora_folder import readable
from ..prompt.tags import IN_NEGATIVE, has_tag, parts_of, read_tag, trouble

_TAG = re.compile(r"<(\w+):([^<>]*)>")
_MARKS = re.compile(
    r"\\[\\()\[\]]|\(|\[|\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL
)
_EMPHASIS = 1.1

_LOOKS_LIKE_A_TAG = re.compile(
    r"<\s*(?:lora|lyco|pool)\b[^<>]*>?|\b(?:lora|lyco)[:\uff1a]\w[^<>\s]*>?", re.IGNORECASE
)
_EDITED = re.compile(r"\[[^\[\]]*(?::\s*[\d.]+\s*|\|[^\[\]]*)\]")
"""Prompt editing ``[a:b:0.5]`` and alternation ``[a|b]``."""


@dataclass(frozen=True)
class PromptLora:
    """A LoRA tag: ``<lora:name>``, ``<lora:name:0.8>``, ``<lora:name:te:unet>``, ``<lora:name:te=0.5:unet=1>``.

    Attributes:
        te, unet: strength in the text encoder and in the UNet.
        options: further ``word=value`` parts, such as ``role=style``; unread here.
        pool: it is a ``<pool:…>`` tag, whose name is a folder, a glob or a list.
    """

    name: str
    te: float = 1.0
    unet: float = 1.0
    options: Mapping[str, str] = field(default_factory=dict)
    pool: bool = False


@dataclass(frozen=True)
class Fragment:
    """A piece of prompt with one emphasis. `chunk_break`: the piece is the word BREAK, and a new chunk begins."""

    text: str
    weight: float = 1.0
    chunk_break: bool = False


def split_loras(prompt: str) -> tuple[str, list[PromptLora]]:
    """The prompt without its tags, and the LoRAs that they name, in order.

    Raises:
        LoratorioError: a tag that cannot be read, is mistyped or of another kind, or text that is not UTF-8.
    """
    check_text("prompt", prompt)
    loras: list[PromptLora] = []
    for kind, content in _TAG.findall(prompt):
        if kind.lower() not in ("lora", "lyco", "pool"):
            raise LoratorioError(
                f"<{kind}:{content}> is an unknown tag. Only <lora:name:strength> and <pool:folder> are supported."
            )
        loras.append(_read_tag(kind, content))
    text = re.sub(r"[ \t]{2,}", " ", _TAG.sub("", prompt)).strip()
    if mistyped := _LOOKS_LIKE_A_TAG.search(text):
        raise LoratorioError(
            f"{mistyped.group().strip()} is not a complete tag: write it like <lora:name:0.8>."
        )
    return text, loras


def plain_text_notes(prompt: str, negative: str) -> list[str]:
    """Sentences about the WebUIs' prompt syntax that is plain text here."""
    notes = []
    if re.search(r"\bAND\b", prompt):
        notes.append("AND is an ordinary word here: only the WebUIs combine several prompts in one picture.")
    edited = _EDITED.search(prompt) or _EDITED.search(negative)
    if edited:
        notes.append(f"{edited.group()} is plain text here: only the WebUIs change a prompt during sampling.")
    if has_tag(negative):
        notes.append(IN_NEGATIVE)
    return notes


def check_text(what: str, text: str) -> None:
    """Raise LoratorioError if `text` has bytes that are not UTF-8, as a command's arguments may."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        where = readable(text[max(0, problem.start - 20) : problem.start + 1])
        raise LoratorioError(
            f"The {what} is not UTF-8 text: the first error is at {where!r}. Type it again."
        ) from None


def _read_tag(kind: str, content: str) -> PromptLora:
    content = ":".join(part.strip() for part in parts_of(content))
    why = trouble(kind, content)
    if why:
        raise LoratorioError(why)
    name, numbers, named = read_tag(content)
    if len(numbers) > 2:
        raise LoratorioError(
            f"<{kind}:{content}> has more than two numbers. One is the strength; two are the strengths in the text encoder and the UNet."
        )
    options = dict(named)
    te = options.pop("te", numbers[0] if numbers else "1")
    unet = options.pop("unet", numbers[1] if len(numbers) > 1 else te)
    return PromptLora(name, float(te), float(unet), options, kind.lower() == "pool")


def emphasised(prompt: str) -> list[Fragment]:
    """Cut a prompt by emphasis: ``(word)`` × 1.1, ``((word))`` × 1.21, ``(word:1.3)`` × 1.3, ``[word]`` ÷ 1.1, ``\\(`` a bracket.

    Brackets that are not closed count to the end of the prompt.
    """
    pieces: list[Fragment] = []
    open_brackets: list[tuple[str, int]] = []  # the bracket, and the number of pieces before it

    def multiply(start: int, factor: float) -> None:
        for i in range(start, len(pieces)):
            pieces[i] = Fragment(pieces[i].text, pieces[i].weight * factor, pieces[i].chunk_break)

    for match in _MARKS.finditer(prompt):
        mark, weight = match.group(0), match.group(1)
        last_open = open_brackets[-1][0] if open_brackets else ""
        if mark in "([" and len(mark) == 1:
            open_brackets.append((mark, len(pieces)))
        elif weight is not None and last_open == "(":
            multiply(open_brackets.pop()[1], float(weight))
        elif mark == ")" and last_open == "(":
            multiply(open_brackets.pop()[1], _EMPHASIS)
        elif mark == "]" and last_open == "[":
            multiply(open_brackets.pop()[1], 1 / _EMPHASIS)
        elif mark == "BREAK":
            pieces.append(Fragment("", chunk_break=True))
        else:
            pieces.append(Fragment(mark[1:] if len(mark) == 2 and mark[0] == "\\" else mark))
    for bracket, start in reversed(open_brackets):
        multiply(start, _EMPHASIS if bracket == "(" else 1 / _EMPHASIS)
    return _joined(pieces)


def _joined(pieces: list[Fragment]) -> list[Fragment]:
    """Neighbours of one weight as one piece, so that words are not cut where the reader looked."""
    joined: list[Fragment] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and not last.chunk_break and not piece.chunk_break and last.weight == piece.weight:
            joined[-1] = Fragment(last.text + piece.text, piece.weight)
        else:
            joined.append(piece)
    return joined
