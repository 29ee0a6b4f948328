"""LoRAtorio as published, which most tests of the formulas are about, whatever the defaults are."""

from __future__ import annotations

from typing import Any

from loratorio.settings import PRESETS, Settings


def paper(**knobs: Any) -> Settings:
    """The preset Paper, with these knobs on top."""
    return Settings().with_values(PRESETS["paper"].values).with_values({"find_styles": False, **knobs})
