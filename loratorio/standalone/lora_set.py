"""The LoRAs of one generation: those that the prompt names, those out of its pools, and each one's role."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..adapters.bank import Bank
from ..compose.mixes import Mix, Participants
from ..errors import LoratorioError
from ..prompt.pool import load_candidates
from ..prompt.roles import (
    TaggedLora,
    assigned_roles,
    looks_like_speed_lora,
    participants_of,
    prompt_importance,
    recognised_note,
    unknown_options_note,
    without_effect_note,
)
from .checkpoint import Checkpoint
from .lora_files import LoadedLora, load_lora
from .lora_lookup import look_up
from .prompt import PromptLora
from .text import TextConditioner

Load = Callable[[Path, str, Checkpoint, float, float], LoadedLora]
"""`load_lora`, or what keeps files that are asked for again."""


@dataclass(frozen=True)
class LoraSet:
    """All LoRAs of a generation, in the order of the bank.

    Attributes:
        tags: one per LoRA; a pool's tag is repeated under each candidate's own name.
        tagged: the LoRAs as the roles see them.
        notes: sentences for the user: files that were skipped, speed LoRAs that were recognised.
        prompt: without tags.
    """

    tags: tuple[PromptLora, ...]
    loras: tuple[LoadedLora, ...]
    tagged: tuple[TaggedLora, ...]
    notes: tuple[str, ...] = ()
    prompt: str = ""

    @property
    def participants(self) -> Participants:
        return participants_of(self.tagged, prompt=self.prompt)

    @property
    def composed(self) -> list[str]:
        """Names of the composed LoRAs, in the order of the weights."""
        return [self.tagged[number].name for number in self.participants.numbers]

    def conditioner(self, checkpoint: Checkpoint, texts: Sequence[str]) -> TextConditioner:
        """For these texts, and any others, under any mix of the LoRAs."""
        banks = [Bank([lora.text[i] for lora in self.loras]) for i in range(len(checkpoint.text_encoders))]
        return TextConditioner(checkpoint, banks, texts, [lora.embeddings for lora in self.loras])

    def weighed(self, prompt: str, checkpoint: Checkpoint) -> Participants:
        """The participants with each LoRA's importance in the prompt, for W-Composite; those without trigger words count as average."""

        def encode(texts: list[str]) -> list[Tensor]:
            conditioner = self.conditioner(checkpoint, texts)
            base: Mix = (0.0,) * len(self.tagged)
            return [conditioner.of(text, base).tokens for text in texts]

        return participants_of(self.tagged, prompt_importance(self.tagged, prompt, encode), prompt)


def load_lora_set(
    tags: Sequence[PromptLora],
    folder: Path | None,
    checkpoint: Checkpoint,
    load: Load = load_lora,
    prompt: str = "",
) -> LoraSet:
    """Load the LoRAs of the tags, each file by `load`; from pools those that `prompt`, without tags, calls.

    Raises:
        LoratorioError: a LoRA that is named cannot be used (one out of a pool is skipped instead), or a pool is empty.
    """
    parts: list[tuple[PromptLora, LoadedLora, TaggedLora]] = []
    found, notes = look_up(tags, folder, prompt)
    for tag, loras in ((each.tag, each.loras) for each in found):
        if not tag.pool:
            parts += [_load(tag, lora, file, checkpoint, load) for file, lora in loras.items()]
            continue
        loaded = load_candidates(list(loras), partial(_candidate, tag, checkpoint, load, loras))
        parts += loaded.loaded
        notes += [loaded.note] if loaded.note else []
    idle = [tag.name for tag, lora, _ in parts if lora.changes_nothing]
    parts = [part for part in parts if not part[1].changes_nothing]
    notes += [without_effect_note(idle)] if idle else []
    tagged = tuple(each for _, _, each in parts)
    notes += [note for _, lora, _ in parts for note in lora.notes]
    notes += [
        note for note in (recognised_note(assigned_roles(tagged)), unknown_options_note(tagged)) if note
    ]
    return LoraSet(
        tuple(tag for tag, _, _ in parts),
        tuple(lora for _, lora, _ in parts),
        tagged,
        tuple(notes),
        prompt,
    )


def _load(
    tag: PromptLora, tagged: TaggedLora, file: Path, checkpoint: Checkpoint, load: Load
) -> tuple[PromptLora, LoadedLora, TaggedLora]:
    return tag, load(file, tag.name, checkpoint, tag.te, tag.unet), tagged


def _candidate(
    tag: PromptLora, checkpoint: Checkpoint, load: Load, chosen: Mapping[Path, TaggedLora], file: Path
) -> tuple[PromptLora, LoadedLora, TaggedLora]:
    tagged = chosen[file]
    if "role" not in tag.options and looks_like_speed_lora(file.stem, tagged.metadata):
        raise LoratorioError(
            f"{file.stem} is a speed LoRA: these are never picked from a pool. Name it in the prompt."
        )
    own = replace(tag, name=tagged.name, pool=tagged.is_candidate)
    return _load(own, replace(tagged, pooled=own.pool), file, checkpoint, load)
