"""What a measure's pictures are made with: said by the measure, so that a default that changes leaves its figures as they are."""

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
    "find_after": 2,
}
"""The knobs that no preset sets. Those that one sets are said by each measure, or by the preset that it names."""


def measured(knobs: Mapping[str, Any]) -> Settings:
    """These knobs, a preset's among them, over `OTHERS`. Raises LoratorioError for knobs that there are not."""
    return Settings(enabled=True).with_values({**OTHERS, **knobs})


def said(settings: Settings) -> str:
    """Every knob that matters to the method's pictures, and its value, for the head of a table."""
    return ", ".join(
        f"{name} {getattr(settings, name)}"
        for name, knob in KNOB_BY_NAME.items()
        if knob.group != "shown" and name != "enabled" and not knob.ignored_by(settings.method)
    )
