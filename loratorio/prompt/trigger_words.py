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
FOLDERS = "ss_dataset_dirs"

HALF, NEARLY_ALL = 0.5, 0.95
"""In how many of its training captions a tag must be to count as a trigger word: to choose a LoRA by it, and to keep it from others."""

LARGEST = 1_000_000
"""The most bytes that a file next to a LoRA, or a table in its metadata, may have to be read."""

LONGEST, MOST = 100, 100
"""The most characters of a trigger phrase, and the most phrases of a LoRA. What is longer is a description."""


def words_of(metadata: Mapping[str, Any], file: Path | None = None, least: float = HALF) -> list[str]:
    """A LoRA's trigger words and phrases, from the first of these sources that has any: the activation text in the WebUI's user metadata
    (`name.json`); the trigger phrase in its own metadata; the trained words in `name.civitai.info`; the tags of its training captions.

    Args:
        metadata: of its file. WebUIs have read tables in it already; elsewhere they are JSON.
        least: in how many of the captions a tag must be, as a part of 1.
    """
    own = {} if file is None else _read(file.with_suffix(".json"))
    words = _parts(own.get("activation text")) or _parts(metadata.get(PHRASE))
    if not words and file is not None:
        trained = _read(file.with_suffix(".civitai.info")).get("trainedWords")
        words = [part for each in _list(trained) for part in _parts(each)]
    words = words or _common_tags(_table(metadata.get(TAGS)), _table(metadata.get(FOLDERS)), least)
    return [word for word in words if len(word) <= LONGEST][:MOST]


def phrase_in(phrase: str) -> re.Pattern[str]:
    """Finds a phrase in a prompt as whole words: in any case, with any blanks or underscores, brackets escaped or not, a possessive s.

    Of the phrase's own emphasis only the words count.
    """
    words = re.findall(r"[^\s_()\[\]\\]+", re.sub(r":\s*[-+]?[\d.]+\s*(?=[)\]])", "", phrase))
    if not any(re.search(r"\w", word) for word in words):
        return re.compile(r"(?!)")
    end = r"(?:\\[)\]])?" if phrase.endswith((")", "]")) else ""
    joined = r"(?:[\s_]|\\[()\[\]])+".join(map(re.escape, words))
    return re.compile(rf"(?<![\w-]){joined}{end}(?:['\u2019]s)?(?![\w-])", re.IGNORECASE)


def called(words: Iterable[str], prompt: str) -> list[str]:
    """The words that are in the prompt, as whole words and in any case."""
    return [word for word in words if phrase_in(word).search(prompt)]


def callers(words: Sequence[Sequence[str]], prompt: str) -> list[list[str]]:
    """For each LoRA, its words in the prompt that call it, without words that half of all LoRAs share, such as the tag "solo"."""
    counts = Counter(word.casefold() for own in words for word in {each.casefold() for each in own})
    most = max(1, len(words) // 2)
    return [[word for word in called(own, prompt) if counts[word.casefold()] <= most] for own in words]


def _common_tags(by_folder: Mapping[str, Any], folders: Mapping[str, Any], least: float) -> list[str]:
    counts: Counter[str] = Counter()
    for tags in by_folder.values():
        for tag, count in tags.items() if isinstance(tags, Mapping) else ():
            if isinstance(tag, str) and isinstance(count, int):
                counts[tag.strip()] += count
    # Captions that are sentences have no common tag, and the number of pictures says so.
    pictures = [each.get("img_count") for each in folders.values() if isinstance(each, Mapping)]
    captions = max(counts.values(), default=0)
    captions = max(captions, sum(count for count in pictures if isinstance(count, int)))
    return [tag for tag, count in counts.items() if tag and count >= least * captions]


def _table(value: Any) -> Mapping[str, Any]:
    """A table of a LoRA's metadata; empty if it cannot be read."""
    if isinstance(value, str) and len(value) <= LARGEST:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


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
