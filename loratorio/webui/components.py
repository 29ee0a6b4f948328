"""A knob's component, for the panel, the settings page and the page of the command line alike."""

from __future__ import annotations

from typing import Any

from ..settings import Knob


def component(knob: Knob) -> tuple[str, dict[str, Any]]:
    """The name of Gradio's class for a knob, of any Gradio version, and the arguments that say what values it has."""
    if knob.kind == "bool":
        return "Checkbox", {}
    if knob.kind == "choice":
        return "Dropdown", {"choices": [label for _, label in knob.choices]}
    if knob.is_fine:
        # Without limits: Gradio would refuse a number beyond them before any script runs, and say neither whose it is nor
        # what may be typed, also where LoRAtorio is off. `Settings` checks it.
        return "Number", {}
    return "Slider", {"minimum": knob.minimum, "maximum": knob.maximum, "step": knob.step}


def shown(knob: Knob, value: Any) -> Any:
    """A knob's value as its component has it."""
    return dict(knob.choices)[str(value)] if knob.kind == "choice" else value
