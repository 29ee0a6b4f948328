"""Answers for the panel: which LoRAs of a prompt exist, how many candidates a pool has, and what a step costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import LoratorioError
from ..prompt.tags import trouble
from ..settings import Settings
from . import pools

PATH, COST_PATH = "/loratorio/found", "/loratorio/cost"
MOST = 100
"""The most names and pools that are looked up."""

COST_KNOBS = ("method", "recentre", "share", "reuse", "start", "end")
"""The knobs that change how many model rows are run."""
_MOST_LORAS = 8


def add_route(_: Any, app: Any) -> None:
    """For the WebUI's callback when its server has started: answer the page's questions.

    The answer contains only the requested names.
    """

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        answered = found(_texts(asked.get("loras")), _texts(asked.get("pools")), pools.count, pools.is_new)
        return {**answered, "wrong": wrong(_texts(asked.get("tags")))}

    def answer_cost(asked: dict[str, Any]) -> list[float] | None:
        values = asked.get("values")
        try:
            return costs(
                Settings.from_mapping(
                    dict(zip(COST_KNOBS, values if isinstance(values, list) else (), strict=False))
                )
            )
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


def costs(settings: Settings) -> list[float]:
    """The cost of a step with one LoRA, two, …, in plain steps."""
    if "torch" not in sys.modules:  # a page without an engine behind it
        return []
    from ..sampling.cost import plain_steps

    # What does not change the rows shall not fill the cache.
    asked = Settings.from_mapping({"enabled": True, **{name: getattr(settings, name) for name in COST_KNOBS}})
    return [round(plain_steps(asked, count), 2) for count in range(1, _MOST_LORAS + 1)]


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
