"""The panel: an accordion with its own tick box, a component per knob, and a line that follows the prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..colours import COLOURS
from ..compose.methods import METHODS
from ..errors import LoratorioError
from ..roles import looks_like_speed_lora
from ..settings import KNOB_BY_NAME, KNOBS, PRESETS, Knob, Settings, panel_rows
from . import gradio_compat as compat
from . import options, self_check
from .components import component, shown

TITLE = "LoRAtorio"

RESET, RESET_HELP = "reset", "All knobs as they are when the page is loaded."

CHECKING = "Checking: about a dozen pictures of one to four steps. None of them is kept."

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
        presets = _Presets(tab, settings)
        rows = panel_rows(folded=False)
        components |= _row(rows[0], settings, tab)
        about = gr.HTML(_about(settings), elem_id=f"loratorio_{tab}_about")
        for row in rows[1:]:
            components |= _row(row, settings, tab)
        with gr.Accordion("More", open=False, elem_id=f"loratorio_{tab}_more"):
            for row in panel_rows(folded=True):
                components |= _row(row, settings, tab)
            _self_check(tab)
        presets.connect(components)
        _follow_method(components, about)
    for each in components.values():
        # The settings page holds the defaults; a copy of them in ui-config.json would outlive a change there.
        each.do_not_save_to_config = True
    return [components[knob.name] for knob in KNOBS]


def _self_check(tab: str) -> None:
    """The button of the self-check, and the place for its table. javascript/loratorio_check.js reads what it runs with off the page."""
    button = gr.Button("Self-check", elem_id=f"loratorio_{tab}_check", size="sm")
    asked = gr.Textbox(visible=False, elem_id=f"loratorio_{tab}_check_asked")
    asked.do_not_save_to_config = True
    gr.HTML(
        f'<p class="loratorio-checking" data-tab="{tab}" hidden>{escape(CHECKING)} <button type="button">Stop</button></p>'
    )
    table = gr.HTML("", elem_classes="loratorio-check")
    running = button.click(
        self_check.answer_page, [asked], [table], **compat.javascript(f"() => loratorioCheck.begin('{tab}')")
    )
    running.then(None, [], [], **compat.javascript(f"() => loratorioCheck.end('{tab}')"))


def _row(knobs: Sequence[Knob], settings: Settings, tab: str) -> dict[str, Any]:
    with gr.Row(elem_classes="loratorio-row"):
        return {
            knob.name: _component(knob, getattr(settings, knob.name), tab, settings.method) for knob in knobs
        }


class _Presets:
    """A button for each preset, and one for the defaults. It sets knobs in the page and is nothing else: no value of its own is sent
    or kept."""

    def __init__(self, tab: str, defaults: Settings) -> None:
        every = {knob.name: getattr(defaults, knob.name) for knob in KNOBS if knob.name != "enabled"}
        self._values = {name: dict(preset.values) for name, preset in PRESETS.items()} | {RESET: every}
        labels = {name: preset.label for name, preset in PRESETS.items()} | {RESET: "Reset"}
        with gr.Row(elem_classes="loratorio-presets", elem_id=f"loratorio_{tab}_presets"):
            self._buttons = {
                name: gr.Button(label, elem_id=f"loratorio_{tab}_preset_{name}", size="sm")
                for name, label in labels.items()
            }
            gr.HTML(
                f'<a href="{escape(docs_link())}" target="_blank" rel="noopener">Documentation</a>',
                elem_classes="loratorio-docs",
            )

    def connect(self, components: dict[str, Any]) -> None:
        for name, button in self._buttons.items():
            values = {knob: shown(KNOB_BY_NAME[knob], value) for knob, value in self._values[name].items()}
            outputs = [components[knob] for knob in values]
            function = f"() => {json.dumps(list(values.values()))}"
            button.click(None, [], outputs, **compat.javascript(function))


def docs_link() -> str:
    """Where the documentation is: the page that the extension was installed from, or the file that came with it."""
    root = Path(__file__).resolve().parents[2]
    extensions = getattr(sys.modules.get("modules.extensions"), "extensions", ())
    for extension in extensions:
        remote = str(getattr(extension, "remote", None) or "")
        if Path(extension.path).resolve() == root and remote.startswith("https://"):
            return f"{remote.removesuffix('.git')}#readme"
    return f"file={root / 'README.md'}"


_MOST_LORAS = 8
_COST_KNOBS = ("method", "recentre", "share", "reuse", "start", "end")
"""The knobs that change how many model rows are run."""


def _follow_method(components: dict[str, Any], about: Any) -> None:
    """What the method does and costs, and which knobs it looks at, whenever that changes."""
    asked = [components[name] for name in _COST_KNOBS]
    of_methods = [knob for knob in KNOBS if any(knob.ignored_by(method) for method in METHODS)]

    def update_about(*values: Any) -> Any:
        try:
            settings = Settings.from_mapping({"enabled": True, **dict(zip(_COST_KNOBS, values, strict=True))})
        except LoratorioError:
            return gr.update()  # a number that is being typed
        return _about(settings)

    def update_knobs(label: Any) -> list[Any]:
        try:
            method = str(KNOB_BY_NAME["method"].check(label))
        except LoratorioError:
            return [gr.update() for _ in of_methods]
        return [gr.update(interactive=not knob.ignored_by(method)) for knob in of_methods]

    for each in asked:
        each.change(update_about, asked, [about], queue=False, show_progress=False)
    components["method"].change(
        update_knobs,
        [components["method"]],
        [components[knob.name] for knob in of_methods],
        queue=False,
        show_progress=False,
    )


def _about(settings: Settings) -> str:
    """The chosen method in a sentence, and what a step with one LoRA, two, … costs, of which JavaScript shows the prompt's."""
    entry = METHODS[settings.method].entry
    source = f" ({entry.source})" if entry.source else ""
    return (
        f'<p class="loratorio-about">{escape(entry.summary + source)} '
        f'<span class="loratorio-cost" data-costs="{escape(json.dumps(_costs(settings)))}"></span></p>'
    )


def _costs(settings: Settings) -> list[float]:
    if "torch" not in sys.modules:  # a page without an engine behind it
        return []
    from ..cost import plain_steps

    # What does not change the rows shall not fill the cache.
    asked = Settings.from_mapping(
        {"enabled": True, **{name: getattr(settings, name) for name in _COST_KNOBS}}
    )
    return [round(plain_steps(asked, count), 2) for count in range(1, _MOST_LORAS + 1)]


def _line(tab: str) -> str:
    """What the tick box does, the line about the prompt's LoRAs, and their places, which JavaScript keeps true."""
    help_text = escape(KNOB_BY_NAME["enabled"].help)
    speed = escape(json.dumps(speed_loras()))
    helps = {name: preset.help for name, preset in PRESETS.items()} | {RESET: RESET_HELP}
    presets = escape(json.dumps(helps))
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


def _component(knob: Knob, value: Any, tab: str, method: str) -> Any:
    shared = {
        "label": knob.label,
        "elem_id": f"loratorio_{tab}_{knob.name}",
        "interactive": not knob.ignored_by(method),
        **compat.tooltip(knob.help),
    }
    name, values = component(knob)
    return getattr(gr, name)(value=shown(knob, value), **values, **shared)
