"""Text conditioning per mix of LoRAs, made by the host's own prompt parser and text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ...compose.methods import Mix
from .flavours import Flavour
from .loras import Lora


class Prompts(NamedTuple):
    """Prompt schedules as the host's sampler takes them; `uncond` is None at CFG 1."""

    cond: Any
    uncond: Any


class TextConditioning:
    """The conditioning of one sampling pass under any mix of its LoRAs.

    Made before the UNet is loaded, since on a small GPU the text encoder would drive it out.
    """

    def __init__(self, p: Any, loras: Sequence[Lora], mixes: Sequence[Mix], flavour: Flavour) -> None:
        self._p = p
        self._loras = loras
        self._flavour = flavour
        self._merged_text = flavour.text_sees_pictures()
        self._merged = self._state((1.0,) * len(loras))
        self._made: dict[Mix, Prompts] = {}
        for state in dict.fromkeys(self._state(mix) for mix in mixes):
            if state != self._merged:
                self._made[state] = self._make(state)

    def of(self, mix: Mix) -> Prompts | None:
        """The conditioning of `mix`; None where it is what the host made itself."""
        state = self._state(mix)
        if state == self._merged:
            return None
        if state not in self._made:
            self._made[state] = self._make(state)
        return self._made[state]

    def _state(self, mix: Mix) -> Mix:
        """The mix with the coefficients of LoRAs without text set to 0: what the conditioning depends on."""
        return tuple(
            0.0 if lora.clip is None or self._merged_text else coefficient
            for coefficient, lora in zip(mix, self._loras, strict=True)
        )

    def _make(self, state: Mix) -> Prompts:
        with _text_encoder(self._p, self._clip(state)), _undisturbed(self._p):
            return _set_up_conds(self._p)

    def _clip(self, state: Mix) -> Any:
        """The host's text encoder with these LoRAs, each at its strength times its coefficient."""
        speaking = [
            (lora, coefficient) for lora, coefficient in zip(self._loras, state, strict=True) if coefficient
        ]
        if len(speaking) == 1 and speaking[0][1] == 1.0:
            return speaking[0][0].clip
        original = self._p.sd_model.forge_objects_original
        clip = original.clip
        for lora, coefficient in speaking:
            file = replace(lora.file, text=lora.file.text * coefficient)
            _, clip = self._flavour.load(original.unet, clip, file)
        return clip


@contextmanager
def _text_encoder(p: Any, clip: Any) -> Iterator[None]:
    objects = p.sd_model.forge_objects
    before, objects.clip = objects.clip, clip
    try:
        yield
    finally:
        objects.clip = before


def encoded(p: Any, texts: Sequence[str]) -> list[Tensor]:
    """The base model's conditioning of each text, (tokens, width)."""
    from modules import prompt_parser

    with _text_encoder(p, p.sd_model.forge_objects_original.clip):
        schedules = prompt_parser.get_learned_conditioning(p.sd_model, prompt_parser.SdConditioning(texts), 1)
    conds = [schedule[-1].cond for schedule in schedules]
    return [cond["crossattn"] if isinstance(cond, dict) else cond for cond in conds]


def _set_up_conds(p: Any) -> Prompts:
    from modules.processing import StableDiffusionProcessing

    if getattr(p, "is_hr_pass", False):
        p.hr_c = p.hr_uc = None
        p.calculate_hr_conds()
        return Prompts(p.hr_c, p.hr_uc)
    # The base class's: the one of txt2img would activate the second pass's LoRAs as well.
    StableDiffusionProcessing.setup_conds(p)
    return Prompts(p.c, p.uc)


_TOUCHED = ("c", "uc", "hr_c", "hr_uc", "step_multiplier", "firstpass_steps")
_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")


@contextmanager
def _undisturbed(p: Any) -> Iterator[None]:
    """Conditioning made inside neither comes from the host's caches nor stays in them, and `p` is as before afterwards.

    The caches are keyed by the prompt and the LoRAs named in it, not by the LoRAs that are active.
    """
    before = {name: getattr(p, name) for name in _TOUCHED + _CACHES if hasattr(p, name)}
    for name in _CACHES:
        if name in before:
            setattr(p, name, [None, None, None])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(p, name, value)
