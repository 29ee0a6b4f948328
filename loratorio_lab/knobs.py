"""The settings of measurements. They are explicit, so that a changed default leaves published figures as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratorio.settings import KNOB_BY_NAME, Settings

OTHERS: Mapping[str, Any] = {
    "patch_size": 2,
    "temperature": 0.1,
    "adaptive": False,
    "blend": "hard",
    "rescale": 0.0,
    "pool_size": 5,
    "pool_interval": 20,
    "start": 0.0,
    "end": 1.0,
    "yielding": 0.5,
    "own_words": True,
    "find_after": 2,
}
"""The knobs that no preset sets. Each measurement gives the others itself, or names a preset."""


def measured(knobs: Mapping[str, Any]) -> Settings:
    """These knobs, maybe a preset's, over `OTHERS`. Raises LoratorioError for unknown knobs."""
    return Settings(enabled=True).with_values({**OTHERS, **knobs})


def said(settings: Settings) -> str:
    """Every knob that affects the method's pictures, with its value, for the head of a table."""
    return ", ".join(
        f"{name} {getattr(settings, name)}"
        for name, knob in KNOB_BY_NAME.items()
        if knob.group != "shown" and name != "enabled" and not knob.ignored_by(settings.method)
    )
