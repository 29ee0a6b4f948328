"""The settings page: what the panel starts with."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import LoratorioError
from ..settings import KNOBS, Knob, Settings
from .components import component, shown

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
    import gradio as gr
    from modules import shared

    for knob in _offered():
        name, values = component(knob)
        default = shown(knob, knob.default)
        info = shared.OptionInfo(default, knob.label, getattr(gr, name), values or None, section=SECTION)
        shared.opts.add_option(option_name(knob), info.info(knob.help).needs_reload_ui())


def _offered() -> tuple[Knob, ...]:
    """Not the tick box: with it on by default, API calls that never heard of this extension would be composed."""
    return tuple(knob for knob in KNOBS if knob.name != "enabled")
