"""Answers for the panel: which LoRAs of a prompt exist, how many candidates a pool has, which words a LoRA does not read, and what a
step costs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoratorioError
from ..prompt.own_words import reading
from ..prompt.roles import TaggedLora
from ..prompt.tags import split_tags, trouble
from ..settings import Settings
from . import pools

PATH, COST_PATH = "/loratorio/found", "/loratorio/cost"
MOST = 100
"""The most names and pools that are looked up."""

COST_KNOBS = ("method", "recentre", "share", "reuse", "start", "end")
"""The knobs that change how many model rows are run."""
_MOST_LORAS, _MOST_STEPS = 24, 60


def add_route(_: Any, app: Any) -> None:
    """For the WebUI's callback when its server has started: answer the page's questions.

    The answer contains only the requested names, and words of the prompt.
    """

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        answered = found(_texts(asked.get("loras")), _texts(asked.get("pools")), pools.count, pools.is_new)
        reads = [unread_words(prompt) for prompt in _texts([asked.get("prompt")])]
        return {**answered, "wrong": wrong(_texts(asked.get("tags"))), "reads": "".join(reads)}

    def answer_cost(asked: dict[str, Any]) -> float | None:
        values = asked.get("values")
        try:
            settings = Settings.from_mapping(
                dict(zip(COST_KNOBS, values if isinstance(values, list) else (), strict=False))
            )
            return cost(settings, asked.get("count"), asked.get("steps"), asked.get("cfg"))
        except LoratorioError:
            return None  # a number that is being typed

    app.add_api_route(PATH, answer, methods=["POST"])
    app.add_api_route(COST_PATH, answer_cost, methods=["POST"])


def found(
    loras: Sequence[str],
    patterns: Sequence[str],
    count: Callable[[str], int],
    is_new: Callable[[str], bool],
) -> dict[str, Any]:
    """`missing`: the LoRAs that the WebUI does not find; `pools`: by pattern, how many LoRAs it finds, or why none."""
    known = getattr(sys.modules.get("networks"), "available_network_aliases", None)
    missing = [] if known is None else [name for name in loras if not _has(name, known) and not is_new(name)]
    return {"missing": missing, "pools": {pattern: _count(pattern, count) for pattern in patterns}}


def wrong(tags: Sequence[str]) -> dict[str, str]:
    """By tag, why it cannot be read, without the readable tags."""
    has_loractl = pools.has_loractl()
    troubles = {tag: trouble(*tag.strip("<>").partition(":")[::2], has_loractl) for tag in tags}
    return {tag: why for tag, why in troubles.items() if why}


def unread_words(prompt: str) -> str:
    """A sentence on the words of a prompt with tags that its LoRAs' passes do not read, or nothing."""
    text, tags = split_tags(prompt)
    try:
        loras = reading([_tagged(tag.name, tag.options) for tag in tags], [text])
    except LoratorioError:  # a place that cannot be read: the line says so
        return ""
    parts = [
        f"{lora.name} reads the prompt without {' and '.join(lora.words.without)}"
        for lora in loras
        if lora.words.without
    ]
    return f"{'; '.join(parts)}." if parts else ""


def _tagged(name: str, options: Mapping[str, str]) -> TaggedLora:
    """A LoRA of the prompt with what the WebUI knows of its file."""
    known = getattr(sys.modules.get("networks"), "available_network_aliases", None) or {}
    entry = known.get(name)
    file = getattr(entry, "filename", None)
    return TaggedLora(
        name, options, getattr(entry, "metadata", None) or {}, file=Path(file) if file else None
    )


def cost(settings: Settings, count: Any, steps: Any, cfg: Any) -> float | None:
    """The cost of a mean step with `count` LoRAs, in plain steps; None without an engine behind the page, or for what is no number."""
    numbers = [each for each in (count, steps, cfg) if isinstance(each, int | float) and math.isfinite(each)]
    if "torch" not in sys.modules or len(numbers) < 3:
        return None
    from ..sampling.cost import plain_steps

    # What does not change the rows shall not fill the cache. Longer schedules cost a step as much.
    asked = Settings.from_mapping({"enabled": True, **{name: getattr(settings, name) for name in COST_KNOBS}})
    count, steps = (
        max(1, min(most, int(each))) for each, most in ((count, _MOST_LORAS), (steps, _MOST_STEPS))
    )
    return round(plain_steps(asked, count, steps, cfg != 1), 2)


def _has(name: str, known: Mapping[str, Any]) -> bool:
    return name in known or name in getattr(sys.modules["networks"], "available_networks", {})


def _count(pattern: str, count: Callable[[str], int]) -> int | str:
    try:
        return count(pattern)
    except LoratorioError as problem:
        return str(problem)


def _texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else []
    return [text for text in texts if isinstance(text, str)][:MOST]
