"""The panel: an accordion with its own tick box, a component per knob, and a line that follows the prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from ..colours import COLOURS
from ..roles import looks_like_speed_lora
from ..settings import KNOB_BY_NAME, KNOBS, PRESETS, Knob, Settings, panel_rows
from . import gradio_compat as compat
from . import options
from .components import component, shown

TITLE = "LoRAtorio"

NONE_YET = "No LoRA in the prompt yet. Add one, as in <lora:name:0.8>, or the pictures stay the WebUI's own."
"""What the line says before javascript/loratorio.js has read the prompt; the same sentence is there."""


def build(is_img2img: bool, defaults: Settings | None = None) -> list[Any]:
    """Make the panel where the page is being built.

    Returns:
        the components in the order of `KNOBS`: what the WebUI hands to the script, and an API call's positional arguments.
    """
    tab = "img2img" if is_img2img else "txt2img"
    settings = options.defaults() if defaults is None else defaults
    box, inside = compat.ticked_accordion(settings.enabled, TITLE, f"loratorio_{tab}")
    components: dict[str, Any] = {"enabled": box}
    with inside:
        gr.HTML(_line(tab), elem_id=f"loratorio_{tab}_line")
        presets = _Presets(tab)
        for row in panel_rows(folded=False):
            components |= _row(row, settings, tab)
        with gr.Accordion("More", open=False, elem_id=f"loratorio_{tab}_more"):
            for row in panel_rows(folded=True):
                components |= _row(row, settings, tab)
        presets.connect(components)
    for each in components.values():
        # The settings page holds the defaults; a copy of them in ui-config.json would outlive a change there.
        each.do_not_save_to_config = True
    return [components[knob.name] for knob in KNOBS]


def _row(knobs: Sequence[Knob], settings: Settings, tab: str) -> dict[str, Any]:
    with gr.Row(elem_classes="loratorio-row"):
        return {knob.name: _component(knob, getattr(settings, knob.name), tab) for knob in knobs}


class _Presets:
    """A button for each preset. It sets knobs in the page and is nothing else: no value of its own is sent or kept."""

    def __init__(self, tab: str) -> None:
        with gr.Row(elem_classes="loratorio-presets", elem_id=f"loratorio_{tab}_presets"):
            self._buttons = {
                name: gr.Button(preset.label, elem_id=f"loratorio_{tab}_preset_{name}", size="sm")
                for name, preset in PRESETS.items()
            }

    def connect(self, components: dict[str, Any]) -> None:
        for name, button in self._buttons.items():
            values = {knob: shown(KNOB_BY_NAME[knob], value) for knob, value in PRESETS[name].values.items()}
            outputs = [components[knob] for knob in values]
            function = f"() => {json.dumps(list(values.values()))}"
            button.click(None, [], outputs, **compat.javascript(function))


def _line(tab: str) -> str:
    """What the tick box does, the line about the prompt's LoRAs, and their places, which JavaScript keeps true."""
    help_text = escape(KNOB_BY_NAME["enabled"].help)
    speed = escape(json.dumps(speed_loras()))
    presets = escape(json.dumps({name: preset.help for name, preset in PRESETS.items()}))
    return (
        f'<p class="loratorio-help">{help_text}</p>'
        f'<p class="loratorio-loras" id="loratorio_{tab}_loras" data-speed="{speed}" data-presets="{presets}" '
        f'aria-live="polite">{escape(NONE_YET)}</p>'
        f'<div class="loratorio-places" id="loratorio_{tab}_places" data-colours="{escape(json.dumps(COLOURS))}" hidden></div>'
    )


def speed_loras() -> list[str]:
    """Names (and aliases) of the WebUI's LoRAs that act in every pass unless the prompt says otherwise: LCM, Lightning and the like."""
    known = getattr(sys.modules.get("networks"), "available_network_aliases", None) or {}
    return sorted(
        str(name)
        for name, entry in known.items()
        if looks_like_speed_lora(str(name), getattr(entry, "metadata", None) or {})
    )


def _component(knob: Knob, value: Any, tab: str) -> Any:
    shared = {
        "label": knob.label,
        "elem_id": f"loratorio_{tab}_{knob.name}",
        "interactive": True,
        **compat.tooltip(knob.help),
    }
    name, values = component(knob)
    return getattr(gr, name)(value=shown(knob, value), **values, **shared)
