"""The LoRAs of one generation: those that the prompt names, those out of its pools, and each one's role."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters.bank import Bank
from ..compose.mixes import Mix, Participants
from ..errors import LoratorioError
from ..lora_folder import LoraFolder
from ..pool import load_candidates, pool_files
from ..roles import (
    TaggedLora,
    assigned_roles,
    chosen_from_pool,
    looks_like_speed_lora,
    participants_of,
    prompt_importance,
    recognised_note,
    repeats,
    united,
    unknown_options_note,
    without_effect_note,
)
from .checkpoint import Checkpoint
from .lora_files import LoadedLora, find_lora, load_lora
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
    """

    tags: tuple[PromptLora, ...]
    loras: tuple[LoadedLora, ...]
    tagged: tuple[TaggedLora, ...]
    notes: tuple[str, ...] = ()

    @property
    def participants(self) -> Participants:
        return participants_of(self.tagged)

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

        return participants_of(self.tagged, prompt_importance(self.tagged, prompt, encode))


def load_lora_set(
    tags: Sequence[PromptLora],
    folder: Path | None,
    checkpoint: Checkpoint,
    load: Load = load_lora,
    prompt: str = "",
) -> LoraSet:
    """Load what the tags ask for, each file by `load`; of pools what `prompt`, without tags, calls.

    Raises:
        LoratorioError: a LoRA that is named cannot be used (one out of a pool is skipped instead), or a pool is empty.
    """
    parts: list[tuple[PromptLora, LoadedLora, TaggedLora]] = []
    notes: list[str] = []
    if tags and folder is None:
        raise LoratorioError(
            f"The prompt names LoRA {tags[0].name}, but there is no LoRA folder: give --lora-dir."
        )
    found = LoraFolder(folder) if tags and folder is not None else None
    names = [tag.name for tag in tags if not tag.pool]
    located: list[tuple[PromptLora, Path | None]] = []
    for tag in tags:
        assert found is not None
        file, note = (None, "") if tag.pool else find_lora(found, tag.name)
        notes += [note] if note and note not in notes else []
        located.append((tag, file))
    for tag, file in _each_once(located):
        assert found is not None
        if file is not None:
            parts.append(_load(tag, file, checkpoint, load))
            continue
        taken = [*names, *(own.name for own, _, _ in parts)]
        files = pool_files(tag.name, found, taken)
        candidates = [
            TaggedLora(found.name_of(file), tag.options, read_metadata(file), True, file) for file in files
        ]
        chosen, note = chosen_from_pool(candidates, prompt)
        notes += [note] if note else []
        loaded = load_candidates(
            [files[number] for number in chosen],
            partial(_candidate, tag, checkpoint, load, {files[n]: lora for n, lora in chosen.items()}),
        )
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
    )


def _each_once(tags: Sequence[tuple[PromptLora, Path | None]]) -> Iterator[tuple[PromptLora, Path | None]]:
    """The tags with their files; those of one LoRA as one, with their strengths added up, as merging does. A pool has no file."""
    tagged = [TaggedLora(tag.name, tag.options, pooled=tag.pool, file=file) for tag, file in tags]
    for numbers in repeats(tagged):
        first, file = tags[numbers[0]]
        if file is not None:
            own = [tags[number][0] for number in numbers]
            options = united([tagged[number] for number in numbers]).options
            first = PromptLora(first.name, sum(tag.te for tag in own), sum(tag.unet for tag in own), options)
        yield first, file


def _load(
    tag: PromptLora, file: Path, checkpoint: Checkpoint, load: Load
) -> tuple[PromptLora, LoadedLora, TaggedLora]:
    lora = load(file, tag.name, checkpoint, tag.te, tag.unet)
    return tag, lora, TaggedLora(tag.name, tag.options, read_metadata(file), tag.pool, file)


def _candidate(
    tag: PromptLora, checkpoint: Checkpoint, load: Load, chosen: Mapping[Path, TaggedLora], file: Path
) -> tuple[PromptLora, LoadedLora, TaggedLora]:
    tagged = chosen[file]
    if "role" not in tag.options and looks_like_speed_lora(file.stem, tagged.metadata):
        raise LoratorioError(
            f"{file.stem} is a speed LoRA, which is no matter of choice: name it in the prompt."
        )
    return _load(replace(tag, name=tagged.name, pool=tagged.is_candidate), file, checkpoint, load)


def read_metadata(file: Path) -> Mapping[str, str]:
    """What a .safetensors file says of itself; nothing if it cannot be read."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(str(file), framework="pt") as opened,
    ):
        return dict(opened.metadata() or {})
    return {}
