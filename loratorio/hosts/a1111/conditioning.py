"""Text conditioning per mix of LoRAs, made by the WebUI's own prompt parser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ...compose.methods import Mix
from .loras import Network, activated, bundled_embeddings, changes_text


class Prompts(NamedTuple):
    """What the WebUI's sampler takes: a MulticondLearnedConditioning and a list of schedules for the negative prompt."""

    cond: Any
    uncond: Any


class TextConditioning:
    """The conditioning of one sampling pass under any mix of its LoRAs, each made once.

    LoRAs that change no text share the base's conditioning. Where all LoRAs act at full coefficient, the conditioning
    is what the WebUI made itself.

    Args:
        p: the WebUI's processing object.
        loras: the pass's LoRAs, in the order of a mix's coefficients.
        merged: the conditioning that the WebUI made with all of them; None if it has not.
    """

    def __init__(self, p: Any, loras: Sequence[Network], merged: Prompts | None) -> None:
        self._p = p
        self._loras = tuple(loras)
        self._speaks = tuple(changes_text(lora) for lora in loras)
        self._made: dict[Mix, Prompts] = {}
        self._has_merged = merged is not None
        if merged is not None:
            self._made[self._state((1.0,) * len(self._loras))] = merged

    def of(self, mix: Mix) -> Prompts:
        """The conditioning of `mix`."""
        state = self._state(mix)
        if state not in self._made:
            self._made[state] = self._make(state)
        return self._made[state]

    @property
    def is_shared(self) -> bool:
        """Whether all mixes have the conditioning that the WebUI made itself."""
        return self._has_merged and not any(self._speaks)

    def _state(self, mix: Mix) -> Mix:
        """The mix with the coefficients of LoRAs without text set to 0: what the conditioning depends on."""
        return tuple(
            coefficient if speaks else 0.0 for coefficient, speaks in zip(mix, self._speaks, strict=True)
        )

    def _make(self, state: Mix) -> Prompts:
        speaking = [lora for lora, coefficient in zip(self._loras, state, strict=True) if coefficient]
        with ExitStack() as undo:
            undo.enter_context(_undisturbed(self._p))
            undo.enter_context(_scaled(self._loras, state))
            undo.enter_context(activated(speaking))
            undo.enter_context(bundled_embeddings(speaking, self._loras))
            return _set_up_conds(self._p)


def _set_up_conds(p: Any) -> Prompts:
    """Let the WebUI parse the pass's prompts and encode them, past its caches."""
    from modules.processing import StableDiffusionProcessing

    if p.is_hr_pass:
        p.hr_c = p.hr_uc = None
        p.calculate_hr_conds()
        return Prompts(p.hr_c, p.hr_uc)
    # The base class's: the one of txt2img would make the second pass's conditioning as well.
    StableDiffusionProcessing.setup_conds(p)
    return Prompts(p.c, p.uc)


@contextmanager
def _scaled(loras: Sequence[Network], state: Mix) -> Iterator[None]:
    """Multiply the LoRAs' text-encoder strengths by their coefficients."""
    before = [lora.te_multiplier for lora in loras]
    for lora, coefficient in zip(loras, state, strict=True):
        if coefficient:
            lora.te_multiplier *= coefficient
    try:
        yield
    finally:
        for lora, strength in zip(loras, before, strict=True):
            lora.te_multiplier = strength


@contextmanager
def _undisturbed(p: Any) -> Iterator[None]:
    """Everything that making conditioning leaves behind is as before afterwards, and the caches are passed by.

    The WebUI's caches are keyed by the prompt and by the LoRAs named in it, not by the LoRAs that are active: what is
    made here must neither come from them nor stay in them.
    """
    from modules import devices, sd_hijack, shared

    def afresh(  # type: ignore[no-untyped-def]
        function, required_prompts, steps, caches, extra_network_data, hires_steps=None
    ):
        with devices.autocast():
            return function(
                shared.sd_model, required_prompts, steps, hires_steps, shared.opts.use_old_scheduling
            )

    hijack = sd_hijack.model_hijack
    fields = ("c", "uc", "hr_c", "hr_uc", "step_multiplier", "firstpass_steps")
    before = {name: getattr(p, name) for name in fields if hasattr(p, name)}
    comments, infotext = list(hijack.comments), dict(hijack.extra_generation_params)
    overridden = vars(p).get("get_conds_with_caching")
    p.get_conds_with_caching = afresh
    try:
        yield
    finally:
        if overridden is None:
            del p.get_conds_with_caching
        else:
            p.get_conds_with_caching = overridden
        hijack.comments[:], hijack.extra_generation_params = comments, infotext
        for name, value in before.items():
            setattr(p, name, value)


def encoded(texts: Sequence[str]) -> list[Tensor]:
    """The base model's conditioning of each text, (tokens, width)."""
    from modules import devices, prompt_parser, shared

    with activated(()), devices.autocast():
        schedules = prompt_parser.get_learned_conditioning(
            shared.sd_model, prompt_parser.SdConditioning(texts), 1
        )
    conds = [schedule[-1].cond for schedule in schedules]
    return [cond["crossattn"] if isinstance(cond, dict) else cond for cond in conds]
