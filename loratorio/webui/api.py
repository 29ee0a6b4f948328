"""The knobs of a generation from the script's arguments: the page's values, or those of an API call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from ..errors import LoratorioError
from ..prompt.tags import IN_NEGATIVE, has_tag
from ..settings import KNOB_BY_NAME, KNOBS, Settings, defaults_of
from . import options, xyz


def settings_from_args(args: Sequence[Any], p: Any = None) -> Settings:
    """The settings of `args`, overridden by those that an X/Y/Z plot set on the processing object `p`.

    Args:
        args: one value per knob in the order of `KNOBS`; or first one mapping of knob names, and then the rest is ignored, because the
            WebUI fills it with the panel's defaults. Missing values and None: the settings page's defaults. Sentences name the knobs
            as the caller does: by name for a mapping, else by the panel's labels.

    Raises:
        LoratorioError: an unknown knob, a bad value, too many values. Not if the panel's box is unticked: then its values are not
            validated.
    """
    chosen = xyz.chosen(p)
    panel = _values(args)
    values = {**panel, **defaults_of(chosen.get("method"), panel.get("method")), **chosen}
    by_name = bool(args) and isinstance(args[0], Mapping)
    try:
        return replace(options.defaults(), naming="name" if by_name else "label").with_values(values)
    except LoratorioError:
        if args and args[0] is False and len(args) == len(KNOBS) and not chosen:
            return Settings()
        raise


def standing(settings: Settings, args: Sequence[Any], p: Any) -> list[str]:
    """Sentences about every picture of the job `p`: one for each knob that an API call or a plot sets without effect (the panel greys
    those out), and one about LoRA tags in the negative prompt."""
    named = _values(args) if args and isinstance(args[0], Mapping) else {}
    sentences = settings.without_effect({**named, **xyz.chosen(p)})
    negative = (getattr(p, name, None) or () for name in ("all_negative_prompts", "all_hr_negative_prompts"))
    if any(map(has_tag, dict.fromkeys(chain(*negative)))):
        sentences.append(IN_NEGATIVE)
    return sentences


OFF = 'The LoRAs were merged: the call has LoRAtorio settings but does not enable it. Add "enabled": true.'


def is_off_by_mistake(settings: Settings, args: Sequence[Any]) -> bool:
    """Whether an API call has settings but does not say whether to compose."""
    named = _values(args) if args and isinstance(args[0], Mapping) else {}
    return bool(named) and not settings.enabled and "enabled" not in named


def _values(args: Sequence[Any]) -> dict[str, Any]:
    if args and isinstance(args[0], Mapping):
        return {
            name: value for name, value in args[0].items() if value is not None or name not in KNOB_BY_NAME
        }
    if len(args) > len(KNOBS):
        raise LoratorioError(
            f"LoRAtorio takes {len(KNOBS)} arguments ({', '.join(knob.name for knob in KNOBS)}), not {len(args)}. "
            'It is easier to give one object as the only argument, such as {"enabled": true}.'
        )
    return {knob.name: value for knob, value in zip(KNOBS, args, strict=False) if value is not None}
