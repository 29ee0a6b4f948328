"""The panel: an accordion with its own tick box, a component per knob, and a line that follows the prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from ..compose.methods import FOR_PICTURES, METHODS
from ..pictures.colours import COLOURS
from ..prompt import places
from ..prompt.roles import ROLES, looks_like_speed_lora
from ..settings import KNOB_BY_NAME, KNOBS, PRESET_KNOBS, PRESETS, Knob, Settings, panel_rows
from . import docs, lookup, options, self_check
from . import gradio_compat as compat
from .components import component, shown

TITLE = "LoRAtorio"

CHECKING = "Checking: this makes about a dozen pictures of one to four steps and keeps none of them."

NONE_YET = "No LoRA in the prompt yet, so nothing is composed. Add one, for example <lora:name:0.8>."

ROLES_HELP = (
    "content: composed patch by patch, where it fits. style: acts everywhere, in all passes, and is not weighted. always: acts in every "
    "pass and is never composed (LCM, Lightning, Turbo and other speed LoRAs)."
)

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
        gr.HTML(_cost(settings), elem_id=f"loratorio_{tab}_cost")
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
        _follow_knobs(components, about, tab)
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


def _follow_knobs(components: dict[str, Any], about: Any, tab: str) -> None:
    """Update a step's cost, the method's summary and the greyed knobs when they change."""
    of_cost = [components[name] for name in lookup.COST_KNOBS]
    follow_cost = compat.javascript(f"(...values) => {{ loratorioCost('{tab}', values); return []; }}")
    for each in of_cost:
        each.change(None, of_cost, [], **follow_cost)
    of_methods = [knob for knob in KNOBS if any(knob.ignored_by(method) for method in METHODS)]
    # In the page alone, so that no late answer overwrites a newer one. Text that is being typed changes nothing.
    methods = json.dumps(
        {
            method.entry.label: [
                {"value": _about(name)},
                *(compat.usable(not knob.ignored_by(name)) for knob in of_methods),
            ]
            for name, method in METHODS.items()
        }
    )
    outputs = [about, *(components[knob.name] for knob in of_methods)]
    follow = f"(label) => ({methods}[label] ?? Array({len(outputs)}).fill({{}})).map(each => ({{__type__: 'update', ...each}}))"
    components["method"].change(None, [components["method"]], outputs, **compat.javascript(follow))
    # A method with a default of its own gets it when it is chosen by hand, and the next method gets the usual one back.
    for knob in [knob for knob in KNOBS if knob.by_method]:
        own = json.dumps({METHODS[name].entry.label: value for name, value in knob.by_method})
        choose = (
            f"(label, value) => {{ const own = {own}; return own[label] ?? (Object.values(own).includes(value) ? "
            f"{json.dumps(knob.default)} : value); }}"
        )
        both = [components["method"], components[knob.name]]
        components["method"].input(None, both, [components[knob.name]], **compat.javascript(choose))


def _about(method: str) -> str:
    """The method in a sentence."""
    entry = METHODS[method].entry
    source = f" ({entry.source})" if entry.source else ""
    return f'<p class="loratorio-about">{escape(entry.summary + source)}</p>'


def _cost(settings: Settings) -> str:
    """What a step costs. JavaScript asks for it with these values, the prompt's LoRAs and the page's steps and CFG."""
    values = [shown(KNOB_BY_NAME[name], getattr(settings, name)) for name in lookup.COST_KNOBS]
    return f'<p class="loratorio-cost" data-values="{escape(json.dumps(values))}"></p>'


def _line(tab: str, repeats: str) -> str:
    """The tick box's help, the line about the prompt's LoRAs, and their places. JavaScript keeps them up to date."""
    hidden = [each.entry.label for name, each in METHODS.items() if name not in FOR_PICTURES]
    # Hidden, but there: a picture's infotext may bring any of them.
    style = "" if options.shows_research() else (
        f"<style>#loratorio_{tab}_method li:is({', '.join(f'[aria-label={json.dumps(each)}]' for each in hidden)})"
        " { display: none; }</style>"
    )  # fmt: skip
    return (
        f'{style}<p class="loratorio-help">{escape(KNOB_BY_NAME["enabled"].help)} '
        f'<a href="{escape(docs.link())}" target="_blank" rel="noopener">Documentation</a></p>'
        f'<p class="loratorio-loras" id="loratorio_{tab}_loras" data-names="{escape(json.dumps(_names(repeats)))}" aria-live="polite">'
        f'{escape(NONE_YET)}</p><div class="loratorio-places" id="loratorio_{tab}_places" hidden></div>'
    )


def _names(repeats: str) -> dict[str, Any]:
    """What the page's JavaScript must call things, and what it must know of them."""
    alone = [KNOB_BY_NAME[name].label for name in ("recentre", "reuse", "rescale")]
    return {
        "none_yet": NONE_YET,
        "one_only": f"With a single LoRA, only {', '.join(alone[:-1])} and {alone[-1]} change the picture.",
        "roles": list(ROLES),
        "roles_help": ROLES_HELP,
        "presets": {preset.label: preset.help for preset in PRESETS.values()} | {CUSTOM: CUSTOM_HELP},
        "places": {name: tuple(box) for name, box in places.NAMED.items()},
        "aliases": places.ALIASES,
        "colours": COLOURS,
        "with_places": [method.entry.label for method in METHODS.values() if method.takes_places],
        "speed": speed_loras(),
        "repeats": repeats,
    }


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
