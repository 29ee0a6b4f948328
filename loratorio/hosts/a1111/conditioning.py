"""Text conditioning with some of the pass's LoRAs, made by the WebUI itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ...compose.mixes import Mix, Words
from ..shared.text import Prompts, set_up_conds
from .loras import Network, activated, at_text_strength, bundled_embeddings


def conditioning_under(
    p: Any, loras: Sequence[Network], strengths: Sequence[float], mix: Mix, words: Words
) -> Prompts:
    """The pass's conditioning with each LoRA at its strength times its coefficient, read with these words, past the WebUI's caches."""
    acting = [number for number, coefficient in enumerate(mix) if coefficient]
    scaled = [at_text_strength(loras[number], strengths[number] * mix[number]) for number in acting]
    with ExitStack() as undo:
        undo.enter_context(_undisturbed(p))
        undo.enter_context(activated(scaled))
        undo.enter_context(bundled_embeddings([loras[number] for number in acting], loras))
        return set_up_conds(p, words)


@contextmanager
def _undisturbed(p: Any) -> Iterator[None]:
    """Inside this block, conditioning bypasses the WebUI's caches. Afterwards its side effects are undone.

    The caches are keyed by the prompt and by the LoRAs named in it, not by the LoRAs that are active. So conditioning made
    here must neither come from them nor stay in them.
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
