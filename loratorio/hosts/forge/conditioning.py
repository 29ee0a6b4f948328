"""Text conditioning with some of the pass's LoRAs, made by the host's own prompt parser and text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...compose.mixes import Mix, Words
from ..shared.pass_loras import PassLoras, ReadLora
from ..shared.text import Prompts, set_up_conds
from .variants import Variant


def conditioning_under(
    source: PassLoras, loras: Sequence[ReadLora], variant: Variant, mix: Mix, words: Words
) -> Prompts:
    """The pass's conditioning with each LoRA at its coefficient, read with these words, past the host's caches."""
    p = source.p
    kept = source.text_cache(
        [(lora.active, coefficient) for lora, coefficient in zip(loras, mix, strict=True)], words
    )

    def make(cond: bool) -> Any:
        with text_encoder(p, _clip(p, loras, variant, mix)), _undisturbed(p):
            return set_up_conds(p, words, kept, cond)

    return Prompts(make)


def _clip(p: Any, loras: Sequence[ReadLora], variant: Variant, mix: Mix) -> Any:
    """The host's text encoder with these LoRAs, each at its strength times its coefficient."""
    acting = [(lora, coefficient) for lora, coefficient in zip(loras, mix, strict=True) if coefficient]
    if len(acting) == 1 and acting[0][1] == 1.0:
        return acting[0][0].text
    original = p.sd_model.forge_objects_original.clip
    if not acting:
        return original
    return variant.with_text(original, [(lora.text, coefficient) for lora, coefficient in acting])


@contextmanager
def text_encoder(p: Any, clip: Any) -> Iterator[None]:
    """Inside this block, the model's text encoder is `clip`."""
    objects = p.sd_model.forge_objects
    before, objects.clip = objects.clip, clip
    try:
        yield
    finally:
        objects.clip = before


_TOUCHED = ("c", "uc", "hr_c", "hr_uc", "step_multiplier", "firstpass_steps")
_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")


def forget_conditioning(p: Any) -> None:
    """Empty the host's caches of text conditioning: they don't know that a LoRA's file was replaced."""
    for name in _CACHES:
        cache = getattr(p, name, [])
        cache[:] = [None] * len(cache)


@contextmanager
def _undisturbed(p: Any) -> Iterator[None]:
    """After conditioning was made inside this block, `p` is unchanged."""
    before = {name: getattr(p, name) for name in _TOUCHED if hasattr(p, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(p, name, value)
