"""The settings page: what the panel starts with."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import LoratorioError
from ..settings import KNOBS, Knob, Settings

SECTION = ("loratorio", "LoRAtorio")


def option_name(knob: Knob) -> str:
    """Under this name the knob's default stands in the WebUI's config.json."""
    return f"loratorio_{knob.name}"


def defaults() -> Settings:
    """What the panel starts with: the settings page's values, `Settings`' own outside a WebUI or where a stored value is bad."""
    shared = sys.modules.get("modules.shared")
    stored = getattr(getattr(shared, "opts", None), "data", None) or {}
    values: dict[str, Any] = {}
    for knob in _offered():
        if option_name(knob) in stored:
            try:
                values[knob.name] = knob.check(stored[option_name(knob)])
            except LoratorioError as problem:
                print(f"LoRAtorio: the settings page's default is not used: {problem}")
    try:
        return Settings.from_mapping(values)
    except LoratorioError as problem:
        print(f"LoRAtorio: the settings page's defaults are not used: {problem}")
        return Settings()


def register() -> None:
    """Have the WebUI show the options on its settings page. To be called once, when the extension is loaded.

    Without a callback: to register one, the WebUI inspects the whole call stack, which takes longer than all else that
    is done at start-up.
    """
    from modules import shared

    for knob in _offered():
        info = shared.OptionInfo(_shown(knob), knob.label, *_component(knob), section=SECTION)
        shared.opts.add_option(option_name(knob), info.info(knob.help).needs_reload_ui())


def _offered() -> tuple[Knob, ...]:
    """Not the tick box: with it on by default, API calls that never heard of this extension would be composed."""
    return tuple(knob for knob in KNOBS if knob.name != "enabled")


def _shown(knob: Knob) -> Any:
    return dict(knob.choices)[str(knob.default)] if knob.kind == "choice" else knob.default


def _component(knob: Knob) -> tuple[Any, Any]:
    """The component of the settings page and its arguments."""
    import gradio as gr

    if knob.kind == "bool":
        return gr.Checkbox, None
    if knob.kind == "choice":
        return gr.Dropdown, {"choices": [label for _, label in knob.choices]}
    limits = {"minimum": knob.minimum, "maximum": knob.maximum, "step": knob.step}
    return (gr.Number if (knob.maximum - knob.minimum) / knob.step > 1000 else gr.Slider), limits
