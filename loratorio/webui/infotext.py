"""The knobs in a picture's infotext, one readable field each, and back from there into the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LoratorioError
from ..infotext import HIRES_LORAS_KEY, LORAS_KEY, params
from ..settings import KNOB_BY_NAME, KNOBS, Knob, Settings

if TYPE_CHECKING:
    from ..job import PassRecord

Params = Mapping[str, Any]
"""An infotext as the WebUI parsed it: field names and values, all text."""


def begin(fields: dict[str, Any], settings: Settings) -> None:
    """Write the knobs into `p.extra_generation_params` when a job begins.

    As early as this, because the WebUI writes the file that its paste button reads before the first picture is sampled. What an
    earlier job left is taken out: the pictures of an X/Y/Z plot share one mapping.
    """
    for key in [key for key in fields if key.split(" ")[0] == "LoRAtorio"]:
        del fields[key]
    fields.update(params(settings, ()))


def finish(fields: dict[str, Any], settings: Settings, passes: Sequence[PassRecord]) -> None:
    """Add what was composed in the last batch: in its first pass and, if that had other LoRAs, in its hires pass."""
    last: dict[bool, list[tuple[str, float, str]]] = {False: [], True: []}
    for each in passes:
        last[each.hires] = list(zip(each.loras, each.strengths, each.places, strict=True))
        if not each.hires:
            last[True] = []
    for key in (LORAS_KEY, HIRES_LORAS_KEY):
        fields.pop(key, None)
    fields.update(params(settings, last[False], last[True] if last[True] != last[False] else ()))


def value_from(knob: Knob, params: Params) -> Any:
    """What the panel's component shows after pasting `params`; None leaves it as it is.

    A picture made without LoRAtorio unticks the box. Text without a line of parameters is only a prompt and changes
    nothing. A picture of an older version lacks the newer knobs: they go to what it was made with.
    """
    if knob.name != "enabled" and KNOB_BY_NAME["enabled"].infotext_key not in params:
        return None
    if "Steps" not in params and knob.infotext_key not in params:
        return None
    unsaid = knob.default if knob.before is None else knob.before
    try:
        value = knob.check(params.get(knob.infotext_key, unsaid))
    except LoratorioError as problem:
        print(f"LoRAtorio: pasting: {problem}")
        return None
    return dict(knob.choices)[str(value)] if knob.kind == "choice" else value


def _paster(knob: Knob) -> Callable[[Params], Any]:
    def paste(params: Params) -> Any:
        return value_from(knob, params)

    return paste


PASTERS: dict[str, Callable[[Params], Any]] = {knob.name: _paster(knob) for knob in KNOBS}


def paste_fields(components: Sequence[Any]) -> list[tuple[Any, Callable[[Params], Any]]]:
    """For `self.infotext_fields`: each component of the panel with what an infotext makes of it."""
    return [(component, PASTERS[knob.name]) for component, knob in zip(components, KNOBS, strict=True)]


def paste_field_names() -> list[Callable[[Params], Any]]:
    """For `self.paste_field_names`: what "send to img2img" takes along from tab to tab.

    The WebUI compares these with the second half of the paste fields; that they are functions, not names, is no matter to it.
    """
    return list(PASTERS.values())
