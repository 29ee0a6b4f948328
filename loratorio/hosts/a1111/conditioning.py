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
    kept = source.text_cache([(replace(lora, text=strength), 1.0) for lora, strength in acting], words)
    others = [lora.source for lora in loras]

    def make(cond: bool) -> Any:
        with ExitStack() as undo:
            undo.enter_context(_undisturbed(source.p))
            undo.enter_context(activated([at_text_strength(lora.source, text) for lora, text in acting]))
            undo.enter_context(bundled_embeddings([lora.source for lora, _ in acting], others))
            return set_up_conds(source.p, words, kept, cond)

    return Prompts(make)


@contextmanager
def _undisturbed(p: Any) -> Iterator[None]:
    """Side effects of making conditioning inside this block are undone after it."""
    from modules import sd_hijack

    hijack = sd_hijack.model_hijack
    fields = ("c", "uc", "hr_c", "hr_uc", "step_multiplier", "firstpass_steps")
    before = {name: getattr(p, name) for name in fields if hasattr(p, name)}
    comments, infotext = list(hijack.comments), dict(hijack.extra_generation_params)
    try:
        yield
    finally:
        hijack.comments[:], hijack.extra_generation_params = comments, infotext
        for name, value in before.items():
            setattr(p, name, value)
