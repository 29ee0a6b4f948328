"""The panel: an accordion with its own tick box, a component per knob, and a line that follows the prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from ..compose.methods import FOR_PICTURES, METHODS
from ..errors import LoratorioError
from ..pictures.colours import COLOURS
from ..prompt.roles import looks_like_speed_lora
from ..settings import KNOB_BY_NAME, KNOBS, PRESET_KNOBS, PRESETS, Knob, Settings, panel_rows
from . import docs, options, self_check
from . import gradio_compat as compat
from .components import component, shown

TITLE = "LoRAtorio"

CHECKING = "Checking: this makes about a dozen pictures of one to four steps and keeps none of them."

NONE_YET = "No LoRA in the prompt yet, so nothing is composed. Add one, for example <lora:name:0.8>."
"""The line's text before javascript/loratorio.js has read the prompt. The same sentence is there."""

CUSTOM, CUSTOM_HELP = "Custom", "Your own values under All settings."


def build(is_img2img: bool, defaults: Settings | None = None, repeats: str = "last") -> list[Any]:
    """Make the panel where the page is being built.

    Args:
        repeats: how the WebUI adds up several tags of one LoRA (`loratorio.hosts.sum_of_tags`).

    Returns:
        the components in the order of `KNOBS`: what the WebUI hands to the script, and an API call's positional arguments.
    """
    tab = "img2img" if is_img2img else "txt2img"
    settings = options.defaults() if defaults is None else defaults
    box, inside = compat.ticked_accordion(settings.enabled, TITLE, f"loratorio_{tab}")
    components: dict[str, Any] = {"enabled": box}
    (method,), *rows = panel_rows()[1:]
    with inside:
        gr.HTML(_line(tab, repeats), elem_id=f"loratorio_{tab}_line")
        preset = _preset(tab, settings)
        cost = gr.HTML(_cost(settings), elem_id=f"loratorio_{tab}_cost")
        components |= _row(panel_rows()[0], settings, tab)
        with gr.Accordion("All settings", open=False, elem_id=f"loratorio_{tab}_more"):
            with gr.Row(elem_classes="loratorio-row loratorio-method"):
                components[method.name] = _component(method, settings, tab)
                about = gr.HTML(_about(settings.method), elem_id=f"loratorio_{tab}_about")
            for row in rows:
                components |= _row(row, settings, tab)
            reset = gr.Button(
                "Reset all settings",
                elem_id=f"loratorio_{tab}_reset",
                elem_classes="loratorio-small",
                size="sm",
            )
            _self_check(tab)
        _connect_preset(preset, components, tab)
        _connect_reset(reset, components, settings)
        _follow_knobs(components, cost, about)
    for each in (preset, *components.values()):
        # The settings page holds the defaults; a copy of them in ui-config.json would outlive a change there.
        each.do_not_save_to_config = True
    return [components[knob.name] for knob in KNOBS]


def _self_check(tab: str) -> None:
    """The button of the self-check, and its table. javascript/loratorio_check.js reads the check's inputs from the page."""
    button = gr.Button(
        "Self-check", elem_id=f"loratorio_{tab}_check", elem_classes="loratorio-small", size="sm"
    )
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
        return {knob.name: _component(knob, settings, tab) for knob in knobs}


def _preset(tab: str, settings: Settings) -> Any:
    """The preset that the knobs match. It follows the knobs and sets them; its own value is neither sent nor saved."""
    in_force = next(
        (each.label for each in PRESETS.values() if settings.with_values(each.values) == settings), CUSTOM
    )
    choices = [*(each.label for each in PRESETS.values()), CUSTOM]
    return gr.Radio(
        choices,
        value=in_force,
        label="Preset",
        elem_id=f"loratorio_{tab}_preset",
        elem_classes="loratorio-preset",
    )


def _connect_preset(preset: Any, components: dict[str, Any], tab: str) -> None:
    """In the page alone: a choice applies at once, and no late answer overwrites a newer one."""
    knobs = [KNOB_BY_NAME[name] for name in PRESET_KNOBS]
    outputs = [components[knob.name] for knob in knobs]
    wanted = json.dumps(
        {each.label: [shown(knob, each.values[knob.name]) for knob in knobs] for each in PRESETS.values()}
    )
    in_force = (
        f"const in_force = (values) => Object.entries({wanted}).find(([, wanted]) => "
        f"wanted.every((each, i) => each === values[i]))?.[0] ?? '{CUSTOM}';"
    )
    for each in outputs:
        each.change(
            None,
            outputs,
            [preset],
            **compat.javascript(f"(...values) => {{ {in_force} return in_force(values); }}"),
        )
    # To choose one's own is to open the fold where they are.
    choose = f"""(chosen, ...values) => {{
        const wanted = {wanted}[chosen];
        if (wanted) return [chosen, ...wanted];
        gradioApp().querySelector('#loratorio_{tab}_more > .label-wrap:not(.open)')?.click();
        {in_force}
        return [in_force(values), ...values.slice(0, {len(outputs)})];
    }}"""
    preset.input(None, [preset, *outputs], [preset, *outputs], **compat.javascript(choose))


def _connect_reset(button: Any, components: dict[str, Any], settings: Settings) -> None:
    knobs = [knob for knob in KNOBS if knob.name != "enabled"]
    values = [shown(knob, getattr(settings, knob.name)) for knob in knobs]
    outputs = [components[knob.name] for knob in knobs]
    button.click(None, [], outputs, **compat.javascript(f"() => {json.dumps(values)}"))


_MOST_LORAS = 8
_COST_KNOBS = ("method", "recentre", "share", "reuse", "start", "end")
"""The knobs that change how many model rows are run."""


def _follow_knobs(components: dict[str, Any], cost: Any, about: Any) -> None:
    """Update a step's cost, the method's summary and the greyed knobs when they change."""
    asked = [components[name] for name in _COST_KNOBS]
    of_methods = [knob for knob in KNOBS if any(knob.ignored_by(method) for method in METHODS)]

    def update_cost(*values: Any) -> Any:
        try:
            settings = Settings.from_mapping({"enabled": True, **dict(zip(_COST_KNOBS, values, strict=True))})
        except LoratorioError:
            return gr.update()  # a number that is being typed
        return _cost(settings)

    def update_method(label: Any) -> list[Any]:
        try:
            method = str(KNOB_BY_NAME["method"].check(label))
        except LoratorioError:
            return [gr.update() for _ in (about, *of_methods)]
        return [_about(method), *(gr.update(interactive=not knob.ignored_by(method)) for knob in of_methods)]

    for each in asked:
        each.change(update_cost, asked, [cost], queue=False, show_progress=False)
    components["method"].change(
        update_method,
        [components["method"]],
        [about, *(components[knob.name] for knob in of_methods)],
        queue=False,
        show_progress=False,
    )


def _about(method: str) -> str:
    """The method in a sentence."""
    entry = METHODS[method].entry
    source = f" ({entry.source})" if entry.source else ""
    return f'<p class="loratorio-about">{escape(entry.summary + source)}</p>'


def _cost(settings: Settings) -> str:
    """The costs of a step with one LoRA, two, …; JavaScript shows the one for the prompt."""
    return f'<p class="loratorio-cost" data-costs="{escape(json.dumps(_costs(settings)))}"></p>'


def _costs(settings: Settings) -> list[float]:
    if "torch" not in sys.modules:  # a page without an engine behind it
        return []
    from ..sampling.cost import plain_steps

    # What does not change the rows shall not fill the cache.
    asked = Settings.from_mapping(
        {"enabled": True, **{name: getattr(settings, name) for name in _COST_KNOBS}}
    )
    return [round(plain_steps(asked, count), 2) for count in range(1, _MOST_LORAS + 1)]


def _line(tab: str, repeats: str) -> str:
    """The tick box's help, the line about the prompt's LoRAs, and their places. JavaScript keeps them up to date."""
    helps = {preset.label: preset.help for preset in PRESETS.values()} | {CUSTOM: CUSTOM_HELP}
    methods = escape(json.dumps([method.entry.label for method in METHODS.values() if method.takes_places]))
    hidden = [each.entry.label for name, each in METHODS.items() if name not in FOR_PICTURES]
    # Hidden, but there: a picture's infotext may bring any of them.
    style = "" if options.shows_research() else (
        f"<style>#loratorio_{tab}_method li:is({', '.join(f'[aria-label={json.dumps(each)}]' for each in hidden)})"
        " { display: none; }</style>"
    )  # fmt: skip
    return (
        f'{style}<p class="loratorio-help">{escape(KNOB_BY_NAME["enabled"].help)} '
        f'<a href="{escape(docs.link())}" target="_blank" rel="noopener">Documentation</a></p>'
        f'<p class="loratorio-loras" id="loratorio_{tab}_loras" data-speed="{escape(json.dumps(speed_loras()))}" '
        f'data-presets="{escape(json.dumps(helps))}" data-repeats="{repeats}" aria-live="polite">{escape(NONE_YET)}</p>'
        f'<div class="loratorio-places" id="loratorio_{tab}_places" data-colours="{escape(json.dumps(COLOURS))}" '
        f'data-methods="{methods}" hidden></div>'
    )


def speed_loras() -> list[str]:
    """Names and aliases of the WebUI's speed LoRAs, which act in every pass unless the prompt gives them a role: LCM, Lightning and
    the like."""
    known = getattr(sys.modules.get("networks"), "available_network_aliases", None) or {}
    return sorted(
        str(name)
        for name, entry in known.items()
        if looks_like_speed_lora(str(name), getattr(entry, "metadata", None) or {})
    )


def _component(knob: Knob, settings: Settings, tab: str) -> Any:
    shared = {
        "label": knob.label,
        "elem_id": f"loratorio_{tab}_{knob.name}",
        "interactive": not knob.ignored_by(settings.method),
        **compat.tooltip(knob.help),
    }
    name, values = component(knob)
    return getattr(gr, name)(value=shown(knob, getattr(settings, knob.name)), **values, **shared)
