"""What a picture says of itself: the knobs and LoRAs as fields of an infotext, and the infotext as the WebUIs write and read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .. import __version__
from ..settings import KNOB_BY_NAME, KNOBS, Knob, Settings

VERSION_KEY = "LoRAtorio version"
LORAS_KEY = "LoRAtorio LoRAs"
HIRES_LORAS_KEY = "LoRAtorio hires LoRAs"
PLACES_KEY = "LoRAtorio places"
"""Places that were found (at=auto). They are found again when the picture is made again."""


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


class LoraUse(NamedTuple):
    """A LoRA as it was composed in a pass.

    Attributes:
        strength: in the UNet; the least that it had, where it changed from step to step.
        place: as its tag has it, or nothing.
        most: the most that it had, where it changed.
        share: how much of the picture it had, from 0 to 1; for a candidate of a pool, else None.
        text: its strength in the text encoder, where it has a part for that.
        without: the phrases of the prompt that its passes did not read.
        style: whether it was found to be a style.
    """

    name: str
    strength: float
    place: str = ""
    most: float | None = None
    share: float | None = None
    text: float | None = None
    without: tuple[str, ...] = ()
    style: bool = False

    def __str__(self) -> str:
        strength = number(self.strength)
        if self.most is not None and self.most != self.strength:
            strength = f"{self.strength:.3g} to {self.most:.3g}"
        text = "" if self.text in (None, self.strength) else f" text {number(self.text)}"
        place = f" at {self.place}" if self.place else ""
        share = "" if self.share is None else f" ({self.share * 100:.0f} %)"
        without = f" without {' + '.join(self.without)}" if self.without else ""
        style = " as style" if self.style else ""
        return f"{self.name}:{strength}{text}{place}{without}{style}{share}"


UNUSED = 0.005
"""Candidates of a pool with a smaller share of the picture than this are not named in the infotext."""


def params(
    settings: Settings,
    loras: Iterable[tuple[Any, ...]],
    hires_loras: Iterable[tuple[Any, ...]] = (),
) -> dict[str, str]:
    """The fields for `p.extra_generation_params`: the settings that differ from the defaults, the version of those defaults, and the
    LoRAs that were composed (`LoraUse`, or its first fields).

    Nothing when the box is unticked. The WebUI quotes the values itself where they need it; its rule mistakes a value
    that starts with a quotation mark, but quotes any that has a colon, and so every list of LoRAs is safe, whatever a
    LoRA is called.
    """
    if not settings.enabled:
        return {}
    fields = {KNOB_BY_NAME["enabled"].infotext_key: "True", VERSION_KEY: __version__}
    for knob in KNOBS:
        value = getattr(settings, knob.name)
        if value != knob.default_with(settings.method) and not knob.ignored_by(settings.method):
            fields[knob.infotext_key] = text(knob, value)
    for key, composed in ((LORAS_KEY, loras), (HIRES_LORAS_KEY, hires_loras)):
        uses = [LoraUse(*each) for each in composed]
        named = [each for each in uses if each.share is None or each.share >= UNUSED]
        if named:
            fields[key] = ", ".join(map(str, named))
        if len(named) < len(uses):
            fields[f"{key} unused"] = f"{len(uses) - len(named)} of the pool"
    return fields


def found_places(found: Iterable[tuple[str, str]]) -> str:
    """The value of `PLACES_KEY`: each LoRA with its place, as a tag has it."""
    return ", ".join(f"{name} at {place}" for name, place in found)


def text(knob: Knob, value: Any) -> str:
    """A knob's value as the infotext shows it; `knob.check` reads it back exactly."""
    if knob.kind == "choice":
        return dict(knob.choices)[value]
    return str(value) if knob.kind == "bool" else number(value)


def number(value: float) -> str:
    """The shortest text that is read back as exactly this number."""
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)
