"""A LoRA's trigger words, from its file and from the files that WebUIs store next to it.

LoraRetriever (arXiv 2402.09997) also chooses LoRAs by the prompt, but with a model of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PHRASE = "modelspec.trigger_phrase"
TAGS = "ss_tag_frequency"
LARGEST = 1_000_000
"""The most bytes that a file next to a LoRA may have to be read."""


def words_of(metadata: Mapping[str, str], file: Path | None = None) -> list[str]:
    """A LoRA's trigger words and phrases, from the first of these sources that has any: the trigger phrase in its metadata; the
    activation text in the WebUI's user metadata (`name.json`); the trained words in `name.civitai.info`; the training tags of at least
    half of its pictures."""
    phrase = _parts(metadata.get(PHRASE, ""))
    if phrase:
        return phrase
    if file is not None:
        beside = _parts(_read(file.with_suffix(".json")).get("activation text"))
        trained = _read(file.with_suffix(".civitai.info")).get("trainedWords")
        beside = beside or [part for each in _list(trained) for part in _parts(each)]
        if beside:
            return beside
    return _common_tags(metadata.get(TAGS, ""))


def called(words: Iterable[str], prompt: str) -> list[str]:
    """The words that are in the prompt, as whole words and in any case."""
    return [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]


def callers(words: Sequence[Sequence[str]], prompt: str) -> list[list[str]]:
    """For each LoRA, its words in the prompt that call it, without words that half of all LoRAs share, such as the tag "solo"."""
    counts = Counter(word.casefold() for own in words for word in {each.casefold() for each in own})
    most = max(1, len(words) // 2)
    return [[word for word in called(own, prompt) if counts[word.casefold()] <= most] for own in words]


def _common_tags(text: str) -> list[str]:
    try:
        by_folder = json.loads(text or "{}")
        counts: Counter[str] = Counter()
        for tags in by_folder.values():
            for tag, count in tags.items():
                counts[tag.strip()] += int(count)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    most = max(counts.values(), default=0)
    return [tag for tag, count in counts.items() if tag and 2 * count >= most]


def _parts(value: Any) -> list[str]:
    text = value if isinstance(value, str) else ""
    # Activation texts may hold the LoRA's own tag.
    return [part for part in (each.strip() for each in re.sub(r"<[^<>]*>", "", text).split(",")) if part]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or cannot be read."""
    try:
        if file.stat().st_size > LARGEST:
            return {}
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
