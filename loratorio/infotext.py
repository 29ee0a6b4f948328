"""What a picture says of itself: the knobs and LoRAs as fields of an infotext, and the infotext as the WebUIs write and read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .settings import KNOBS, Knob, Settings

LORAS_KEY = "LoRAtorio LoRAs"
HIRES_LORAS_KEY = "LoRAtorio hires LoRAs"


def infotext(prompt: str, negative: str, fields: Mapping[str, object]) -> str:
    """Prompt, negative prompt and one line of ``name: value`` fields; fields that are None are left out."""
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    return "\n".join(
        part for part in (prompt, f"Negative prompt: {negative}" if negative else "", line) if part
    )


def _quoted(value: object) -> str:
    """As it stands unless it has a comma, colon or line break, which divide fields; then as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",:\n") else text


def params(
    settings: Settings,
    loras: Iterable[tuple[str, float, str]],
    hires_loras: Iterable[tuple[str, float, str]] = (),
) -> dict[str, str]:
    """The fields for `p.extra_generation_params`: every knob, and the LoRAs that were composed with their strengths and places.

    Nothing when the box is unticked. The WebUI quotes the values itself where they need it; its rule mistakes a value
    that starts with a quotation mark, but quotes any that has a colon, and so every list of LoRAs is safe, whatever a
    LoRA is called.
    """
    if not settings.enabled:
        return {}
    fields = {knob.infotext_key: text(knob, getattr(settings, knob.name)) for knob in KNOBS}
    for key, composed in ((LORAS_KEY, list(loras)), (HIRES_LORAS_KEY, list(hires_loras))):
        if composed:
            fields[key] = ", ".join(
                f"{name}:{number(strength)}{f' at {place}' if place else ''}"
                for name, strength, place in composed
            )
    return fields


def text(knob: Knob, value: Any) -> str:
    """A knob's value as the infotext shows it; `knob.check` reads it back exactly."""
    if knob.kind == "choice":
        return dict(knob.choices)[value]
    return str(value) if knob.kind == "bool" else number(value)


def number(value: float) -> str:
    """The shortest text that is read back as exactly this number."""
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)
