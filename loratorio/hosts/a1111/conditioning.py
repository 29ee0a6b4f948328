"""Text conditioning with some of the pass's LoRAs, made by the WebUI itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ...compose.mixes import Mix
from ..shared.text import Prompts, set_up_conds
from .loras import Network, activated, bundled_embeddings


def conditioning_under(p: Any, loras: Sequence[Network], mix: Mix, words: str) -> Prompts:
    """The pass's conditioning with each LoRA at its coefficient, and with own words, past the WebUI's caches."""
    acting = [lora for lora, coefficient in zip(loras, mix, strict=True) if coefficient]
    with ExitStack() as undo:
        undo.enter_context(_undisturbed(p))
        undo.enter_context(_scaled(loras, mix))
        undo.enter_context(activated(acting))
        undo.enter_context(bundled_embeddings(acting, loras))
        return set_up_conds(p, words)


@contextmanager
def _scaled(loras: Sequence[Network], mix: Mix) -> Iterator[None]:
    """Multiply the LoRAs' text-encoder strengths by their coefficients."""
    before = [lora.te_multiplier for lora in loras]
    for lora, coefficient in zip(loras, mix, strict=True):
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
