"""The LoRAs of one generation: those that the prompt names, those out of its pools, and each one's role."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...adapters.bank import Bank
from ...compose.importance import importance, without_words
from ...compose.methods import Cast, Mix
from ...errors import LoratorioError
from ...pool import load_candidates, pool_files
from ...roles import Player, cast_of, looks_like_speed_lora, parts_of, recognised_note, trigger_words
from .checkpoint import Checkpoint
from .lora_files import LoadedLora, find_lora, load_lora
from .prompt import PromptLora
from .text import TextConditioner

Load = Callable[[Path, str, Checkpoint, float, float], LoadedLora]
"""`load_lora`, or what keeps files that are asked for again."""


@dataclass(frozen=True)
class Team:
    """All LoRAs of a generation, in the order of the bank.

    Attributes:
        tags: one per LoRA; a pool's tag is repeated under each candidate's own name.
        players: the LoRAs as the roles see them.
        notes: sentences for the user: files that were skipped, speed LoRAs that were recognised.
    """

    tags: tuple[PromptLora, ...]
    loras: tuple[LoadedLora, ...]
    players: tuple[Player, ...]
    notes: tuple[str, ...] = ()

    @property
    def cast(self) -> Cast:
        return cast_of(self.players)

    @property
    def composed(self) -> list[str]:
        """Names of the composed LoRAs, in the order of the weights."""
        return [self.players[number].name for number in self.cast.number_of_solo]

    def conditioner(self, checkpoint: Checkpoint, texts: Sequence[str]) -> TextConditioner:
        """For these texts, under any mix of the LoRAs."""
        banks = [Bank([lora.text[i] for lora in self.loras]) for i in range(len(checkpoint.text_encoders))]
        return TextConditioner(checkpoint, banks, texts)

    def weighed(self, prompt: str, checkpoint: Checkpoint) -> Cast:
        """The cast with each LoRA's importance in the prompt, for W-Composite; those without trigger words count as average."""
        words = {i: trigger_words(player.metadata, prompt) for i, player in enumerate(self.players)}
        known = [i for i, own in words.items() if own]
        if not known:
            return self.cast
        texts = [prompt, *(without_words(prompt, words[i]) for i in known)]
        conditioner = self.conditioner(checkpoint, texts)
        base: Mix = (0.0,) * len(self.players)
        told = [conditioner.of(text, base).tokens for text in texts]
        return cast_of(self.players, dict(zip(known, importance(told[0], told[1:]), strict=True)))


def gather(
    tags: Sequence[PromptLora], folder: Path | None, checkpoint: Checkpoint, load: Load = load_lora
) -> Team:
    """Load what the tags ask for, each file by `load`.

    Raises:
        LoratorioError: a LoRA that is named cannot be used (one out of a pool is skipped instead), or a pool is empty.
    """
    parts: list[tuple[PromptLora, LoadedLora, Player]] = []
    notes: list[str] = []
    names = [tag.name for tag in tags if not tag.pool]
    for tag in tags:
        if folder is None:
            raise LoratorioError(
                f"The prompt names LoRA {tag.name}, but there is no LoRA folder: give --lora-dir."
            )
        if not tag.pool:
            parts.append(_load(tag, find_lora(folder, tag.name), checkpoint, load))
            continue
        taken = [*names, *(own.name for own, _, _ in parts)]
        candidates = load_candidates(
            pool_files(tag.name, folder, taken),
            lambda file, tag=tag: _candidate(tag, file, checkpoint, load),  # type: ignore[misc]
        )
        parts += candidates.loaded
        notes += [candidates.note] if candidates.note else []
    players = tuple(player for _, _, player in parts)
    recognised = recognised_note(parts_of(players))
    notes += [recognised] if recognised else []
    return Team(tuple(tag for tag, _, _ in parts), tuple(lora for _, lora, _ in parts), players, tuple(notes))


def _load(
    tag: PromptLora, file: Path, checkpoint: Checkpoint, load: Load
) -> tuple[PromptLora, LoadedLora, Player]:
    lora = load(file, tag.name, checkpoint, tag.te, tag.unet)
    return tag, lora, Player(tag.name, tag.options, read_metadata(file), tag.pool)


def _candidate(
    tag: PromptLora, file: Path, checkpoint: Checkpoint, load: Load
) -> tuple[PromptLora, LoadedLora, Player]:
    if "role" not in tag.options and looks_like_speed_lora(file.stem, read_metadata(file)):
        raise LoratorioError(
            f"{file.stem} is a speed LoRA, which is no matter of choice: name it in the prompt."
        )
    return _load(replace(tag, name=file.stem), file, checkpoint, load)


def read_metadata(file: Path) -> Mapping[str, str]:
    """What a .safetensors file says of itself; nothing if it cannot be read."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(str(file), framework="pt") as opened:
        return dict(opened.metadata() or {})
    return {}
