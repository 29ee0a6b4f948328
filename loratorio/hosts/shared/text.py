"""Text conditioning per mix of LoRAs, made by the WebUI's own prompt parser and text encoder."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ...compose.mixes import NO_WORDS, Branch, Mix, Words
from ...prompt.own_words import with_words

TextCache = dict[Any, list[Any]]
"""Conditioning made by one state of the text encoder, in the form of the WebUI's caches: what it was made for, and what it is."""

KEPT = 64
"""States of the text encoder whose conditioning is kept, the latest used ones: a grid goes back to them. About 80 MB with SDXL."""
PASSES = 4
"""All states that one of so many latest passes used are kept, however many: a job's with hires fix or a refiner, and the next job's."""


class KeptTexts:
    """Conditioning by state of the text encoder: the model, the LoRAs that act on it, and the words that prompts are read with."""

    def __init__(self) -> None:
        self._caches: dict[Hashable, TextCache] = {}
        self._used: deque[tuple[weakref.ref[Any], set[Hashable]]] = deque(maxlen=PASSES)

    def of(self, user: Any, state: Hashable) -> TextCache:
        """What is kept of a state. user: the pass that asks."""
        if not self._used or self._used[-1][0]() is not user:
            self._used.append((weakref.ref(user), set()))
            needed = set[Hashable]().union(*(states for _, states in self._used))
            # The oldest come first, and what the latest passes used last.
            for old in list(self._caches)[: -max(KEPT, len(needed))]:
                del self._caches[old]
        self._used[-1][1].add(state)
        found = self._caches[state] = self._caches.pop(state, {})
        return found

    def forget(self) -> None:
        """Free all of it."""
        self._caches.clear()
        self._used.clear()


TEXTS = KeptTexts()
"""What all passes in this process share."""


class Prompts:
    """Prompt schedules as the WebUI's sampler takes them, each made at its first use.

    Args:
        make: the conditional schedules, or the unconditional ones; the latter None where the pass has no unconditional rows.
    """

    def __init__(self, make: Callable[[bool], Any]) -> None:
        self._make = make

    @cached_property
    def cond(self) -> Any:
        return self._make(True)

    @cached_property
    def uncond(self) -> Any:
        return self._make(False)


class TextConditioning:
    """The conditioning of one sampling pass under any mix of its LoRAs, each made once.

    Args:
        changes_text: for each LoRA, whether text conditioning depends on it. Mixes that differ only in other LoRAs share it.
        make: the conditioning under a mix, as it is read with a LoRA's words or none. LoRAs that do not change text have coefficient 0.
        host_has_merged: whether the WebUI's own conditioning has all of these LoRAs.
    """

    def __init__(
        self,
        changes_text: Sequence[bool],
        make: Callable[[Mix, Words], Prompts],
        host_has_merged: bool = True,
    ) -> None:
        self._changes_text = tuple(changes_text)
        self._make = make
        self._made: dict[tuple[Mix, Words], Prompts] = {}
        self._merged = self._state((1.0,) * len(self._changes_text)) if host_has_merged else None

    def prepare(self, branches: Iterable[Branch], words: Mapping[Mix, Words]) -> None:
        """Make what is missing of these branches' conditioning, that of conditional ones as it is read with their mix's words."""
        for mix, cond in branches:
            prompts = self.of(mix, words.get(mix, NO_WORDS) if cond else NO_WORDS)
            if prompts is not None:
                _ = prompts.cond if cond else prompts.uncond

    def of(self, mix: Mix, words: Words = NO_WORDS) -> Prompts | None:
        """The conditioning of `mix`, as it is read with a LoRA's words or none; None if it is the WebUI's own."""
        state = self._state(mix)
        if state == self._merged and not words:
            return None
        key = (state, words)
        if key not in self._made:
            self._made[key] = self._make(state, words)
        return self._made[key]

    @property
    def is_the_hosts(self) -> bool:
        """Whether all mixes, except those with words, have the WebUI's own conditioning."""
        return self._merged is not None and not any(self._changes_text)

    def _state(self, mix: Mix) -> Mix:
        return tuple(
            coefficient if changes else 0.0
            for coefficient, changes in zip(mix, self._changes_text, strict=True)
        )


def set_up_conds(p: Any, words: Words, kept: TextCache, cond: bool) -> Any:
    """Let the WebUI parse and encode the pass's prompts, each as it is read with a LoRA's words, or its negative prompts.

    Args:
        kept: takes the place of the WebUI's caches, which are keyed by the prompt and the LoRAs named in it, not by the LoRAs that are
            active. So conditioning made here must neither come from them nor stay in them.
        cond: whether the prompts are wanted, else the negative ones. The others are not encoded.
    """

    def get(function, required_prompts, steps, caches, extra_network_data, hires_steps=None):  # type: ignore[no-untyped-def]
        if getattr(required_prompts, "is_negative_prompt", False) == cond:
            return None
        cache = kept.setdefault((cond, hires_steps is None), [None, None, None])
        own = type(p).get_conds_with_caching
        return own(p, function, required_prompts, steps, [cache], extra_network_data, hires_steps)

    name = "hr_prompts" if getattr(p, "is_hr_pass", False) else "prompts"
    prompts, overridden = getattr(p, name), vars(p).get("get_conds_with_caching")
    setattr(p, name, [with_words(prompt, words) for prompt in prompts])
    p.get_conds_with_caching = get
    try:
        return _set_up_conds(p)[0 if cond else 1]
    finally:
        setattr(p, name, prompts)
        if overridden is None:
            del p.get_conds_with_caching
        else:
            p.get_conds_with_caching = overridden


def _set_up_conds(p: Any) -> tuple[Any, Any]:
    from modules.processing import StableDiffusionProcessing

    if getattr(p, "is_hr_pass", False):
        p.hr_c = p.hr_uc = None
        p.calculate_hr_conds()
        return p.hr_c, p.hr_uc
    # The base class's: the one of txt2img would make the second pass's conditioning (or activate its LoRAs) as well.
    StableDiffusionProcessing.setup_conds(p)
    return p.c, p.uc


def encoded(sd_model: Any, texts: Sequence[str]) -> list[Tensor]:
    """The conditioning of each text by the text encoder as it is now, (tokens, width)."""
    from modules import prompt_parser

    schedules = prompt_parser.get_learned_conditioning(sd_model, prompt_parser.SdConditioning(texts), 1)
    conds = [schedule[-1].cond for schedule in schedules]
    return [cond["crossattn"] if isinstance(cond, dict) else cond for cond in conds]
