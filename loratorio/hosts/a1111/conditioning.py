"""Text conditioning with some of the pass's LoRAs, made by the WebUI itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ...compose.mixes import Mix, Words
from ...prompt.admission import ActiveLora
from ..shared.pass_loras import PassLoras
from ..shared.text import Prompts, set_up_conds
from .loras import activated, at_text_strength, bundled_embeddings


def conditioning_under(
    source: PassLoras, loras: Sequence[ActiveLora], strengths: Sequence[float], mix: Mix, words: Words
) -> Prompts:
    """The pass's conditioning with each LoRA at its strength times its coefficient, read with these words, past the WebUI's caches."""
    acting = [(loras[number], strengths[number] * part) for number, part in enumerate(mix) if part]
    kept = source.kept_texts([(replace(lora, text=strength), 1.0) for lora, strength in acting], words)
    with ExitStack() as undo:
        undo.enter_context(_undisturbed(source.p, kept))
        undo.enter_context(activated([at_text_strength(lora.source, strength) for lora, strength in acting]))
        undo.enter_context(
            bundled_embeddings([lora.source for lora, _ in acting], [lora.source for lora in loras])
        )
        return set_up_conds(source.p, words)


@contextmanager
def _undisturbed(p: Any, kept: dict[Any, list[Any]]) -> Iterator[None]:
    """Inside this block, conditioning comes from the caches `kept`, not the WebUI's. Afterwards its side effects are undone.

    Caches are keyed by the prompt and by the LoRAs named in it, not by the LoRAs that are active. So conditioning made
    here must neither come from the WebUI's nor stay in them.
    """
    from modules import sd_hijack

    def with_kept(  # type: ignore[no-untyped-def]
        function, required_prompts, steps, caches, extra_network_data, hires_steps=None
    ):
        is_negative = getattr(required_prompts, "is_negative_prompt", False)
        cache = kept.setdefault((function, is_negative, hires_steps), [None, None])
        return type(p).get_conds_with_caching(
            p, function, required_prompts, steps, [cache], extra_network_data, hires_steps
        )

    hijack = sd_hijack.model_hijack
    fields = ("c", "uc", "hr_c", "hr_uc", "step_multiplier", "firstpass_steps")
    before = {name: getattr(p, name) for name in fields if hasattr(p, name)}
    comments, infotext = list(hijack.comments), dict(hijack.extra_generation_params)
    overridden = vars(p).get("get_conds_with_caching")
    p.get_conds_with_caching = with_kept
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
