"""Axes of the X/Y/Z plot: one for every knob."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from ..errors import LoratorioError
from ..pictures.infotext import number
from ..refusal import Refusal
from ..settings import KNOBS, PRESET, PRESETS, Knob, find_preset

PREFIX = "[LoRAtorio] "
_FIELD = "loratorio_xyz"


def chosen(p: Any) -> dict[str, Any]:
    """The knobs that the X/Y/Z plot has set for the picture of `p`."""
    return dict(getattr(p, _FIELD, None) or {})


def add_axes() -> None:
    """Add the axes to the loaded X/Y/Z script, once. Without that script there is nothing to do.

    To be called when all scripts are loaded and the page is not yet built.
    """
    script = _loaded_script()
    if script is None:
        return
    present = {option.label for option in script.axis_options}
    axes = [_axis(script, knob) for knob in KNOBS]
    axes.append(_preset_axis(script))
    script.axis_options.extend(axis for axis in axes if axis.label not in present)


def _loaded_script() -> ModuleType | None:
    """The module of the WebUI's X/Y/Z script; the hosts name it `xyz_grid.py` or `scripts.xyz_grid`."""
    scripts = sys.modules.get("modules.scripts")
    for data in getattr(scripts, "scripts_data", ()):
        name = getattr(data.script_class, "__module__", "")
        if name.removesuffix(".py").rpartition(".")[2] == "xyz_grid" and hasattr(data.module, "axis_options"):
            module: ModuleType = data.module
            return module
    return None


def _axis(script: ModuleType, knob: Knob) -> Any:
    label = PREFIX + knob.label
    confirm = _confirm(knob.label, partial(knob.check, naming="label"))
    if knob.kind in ("bool", "choice"):
        choices = ["True", "False"] if knob.kind == "bool" else [label for _, label in knob.choices]
        return script.AxisOption(label, str, _apply(knob), confirm=confirm, choices=lambda: choices)
    # Not int or float: for text the plot would raise its own error before it calls `confirm`.
    return script.AxisOption(label, _number(knob), _apply(knob), confirm=confirm, prepare=_expand(script))


def _number(knob: Knob) -> Callable[[Any], Any]:
    """A reader of the axis's values: numbers as numbers; other text is left for `confirm`."""

    def read(value: Any) -> Any:
        try:
            return knob.check(value)
        except LoratorioError:
            return value

    return read


def _preset_axis(script: ModuleType) -> Any:
    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, _FIELD, {"enabled": True, **chosen(p), **find_preset(value).values})

    labels = [preset.label for preset in PRESETS.values()]
    return script.AxisOption(
        PREFIX + PRESET.capitalize(),
        str,
        apply,
        confirm=_confirm(PRESET.capitalize(), find_preset),
        choices=lambda: labels,
    )


def _apply(knob: Knob) -> Callable[[Any, Any, Any], None]:
    """The function that the plot calls before each picture, with a shallow copy of one `p`, so the mapping is copied each time."""

    def apply(p: Any, value: Any, values: Any) -> None:
        # With the box unticked, a plot over our knobs would repeat the same picture.
        setattr(p, _FIELD, {"enabled": True, **chosen(p), knob.name: value})

    return apply


def _confirm(label: str, check: Callable[[Any], Any]) -> Callable[[Any, Sequence[Any]], None]:
    """What the plot calls before the first picture: the place to stop with a sentence."""

    def confirm(p: Any, values: Sequence[Any]) -> None:
        if not values:  # the plot would silently make no picture
            raise Refusal(f"X/Y/Z plot, {PREFIX}{label}: the axis has no values. Choose at least one.")
        for value in values:
            try:
                check(value)
            except LoratorioError as problem:
                raise Refusal(f"X/Y/Z plot, {PREFIX}{label}: {problem}") from None

    return confirm


def _expand(script: ModuleType) -> Callable[[str], list[str]]:
    """Ranges as in "0-1 (+0.1)" and "0-1 [5]". The first end where they say: the plot's own expansion goes one step too far."""

    def expand(text: str) -> list[str]:
        values: list[str] = []
        for part in script.csv_string_to_list_strip(text):
            by_step = script.re_range_float.fullmatch(part)
            by_count = script.re_range_count_float.fullmatch(part)
            if by_step is not None:
                start, end, step = (float(each) if each else 1.0 for each in by_step.groups())
                count = int((end - start) / step + 1e-6) + 1 if step else 1
            elif by_count is not None:
                start, end, wanted = (float(each) if each else 1.0 for each in by_count.groups())
                count = max(1, int(wanted))
                step = (end - start) / (count - 1) if count > 1 else 0.0
            else:
                values.append(part)
                continue
            values += [number(round(start + i * step, 10)) for i in range(count)]
        return values

    return expand
