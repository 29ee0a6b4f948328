"""The settings page: what the panel starts with."""

from __future__ import annotations

import sys
from typing import Any

from .. import __version__
from ..errors import LoratorioError
from ..settings import FORMER_METHODS, KNOB_BY_NAME, KNOBS, Knob, Settings
from .components import component, shown

SECTION = ("loratorio", "LoRAtorio")


def option_name(knob: Knob) -> str:
    """Under this name the knob's default stands in the WebUI's config.json."""
    return f"loratorio_{knob.name}"


def defaults() -> Settings:
    """What the panel starts with: the settings page's values, `Settings`' own outside a WebUI or where a stored value is bad."""
    stored = _stored()
    values: dict[str, Any] = {}
    for knob in _offered():
        if option_name(knob) in stored:
            try:
                values[knob.name] = knob.check(stored[option_name(knob)], "label")
            except LoratorioError as problem:
                print(f"LoRAtorio: a default of the settings page was ignored: {problem}")
    try:
        return Settings(naming="label").with_values(values)
    except LoratorioError as problem:
        print(f"LoRAtorio: the defaults of the settings page were ignored: {problem}")
        return Settings()


def register() -> None:
    """Have the WebUI show the options on its settings page. To be called once, when the extension is loaded.

    Without a callback: to register one, the WebUI inspects the whole call stack, which takes longer than all else that
    is done at start-up.
    """
    import gradio as gr
    from modules import shared

    _follow_new_defaults(shared.opts.data)
    for knob in _offered():
        name, values = component(knob)
        default = shown(knob, knob.default)
        info = shared.OptionInfo(default, knob.label, getattr(gr, name), values or None, section=SECTION)
        shared.opts.add_option(option_name(knob), info.info(knob.help).needs_reload_ui())
    ticked = shared.OptionInfo(False, "Ticked when the page is opened", section=SECTION)
    shared.opts.add_option(TICKED, ticked.info("API calls are not affected.").needs_reload_ui())
    research = shared.OptionInfo(False, "Show research methods", section=SECTION)
    shared.opts.add_option(RESEARCH, research.info(RESEARCH_HELP).needs_reload_ui())


TICKED = "loratorio_ticked"
"""The option to have the box ticked when the page is opened. javascript/loratorio.js does it: were the box ticked from the start, API
calls that never heard of this extension would be composed."""

RESEARCH = "loratorio_research"
"""The option to list the methods of other papers, for comparison, in the panel too."""

RESEARCH_HELP = (
    "List the methods of other papers in the panel too. X/Y/Z plots and API calls can always use them."
)

VERSION = "loratorio_version"
"""Under this name the version whose defaults were last in force stands in the WebUI's config.json."""


def _follow_new_defaults(stored: dict[str, Any]) -> None:
    """The WebUI stores every option when one is changed, its default or not: what is still an older version's default becomes ours."""
    version = str(stored.get(VERSION, ""))
    method = KNOB_BY_NAME["method"]
    former = FORMER_METHODS.get(str(stored.get(option_name(method), "")).lower())
    if former is not None:
        stored[option_name(method)] = shown(method, former)
    for knob in _offered():
        name = option_name(knob)
        try:
            if name in stored and knob.check(stored[name]) == knob.default_in(version):
                stored[name] = shown(knob, knob.default)
        except LoratorioError:
            continue  # said when it is used
    stored[VERSION] = __version__


def shows_research() -> bool:
    """Whether the panel lists every method."""
    return bool(_stored().get(RESEARCH, False))


def _stored() -> dict[str, Any]:
    """What the WebUI's config.json has; nothing outside a WebUI."""
    shared = sys.modules.get("modules.shared")
    return getattr(getattr(shared, "opts", None), "data", None) or {}


def _offered() -> tuple[Knob, ...]:
    """Not the tick box: with it on by default, API calls that never heard of this extension would be composed."""
    return tuple(knob for knob in KNOBS if knob.name != "enabled")
