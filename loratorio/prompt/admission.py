"""Which LoRAs of a prompt are composed, and what the user is told about them: the same in the WebUIs and on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ..compose.mixes import Participants
from ..compose.regions import WHOLE, Box
from ..errors import LoratorioError
from .own_words import reading
from .roles import (
    OPTION,
    TaggedLora,
    assigned_roles,
    chosen_from_pool,
    lone_place_note,
    looks_like_speed_lora,
    no_room_note,
    participants_of,
    prompt_importance,
    recognised_note,
    repeats,
    skipped_note,
    united,
    unknown_options_note,
    unread_note,
    without_effect_note,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA that the prompt activates.

    Attributes:
        tagged: its tag and its file's metadata.
        strength, text: its strengths in the UNet and in the text encoder, when the sampling begins.
        source: the host's object that it is read from; None if the host has none.
        may_change: whether its strength may differ from step to step.
        is_own: whether these strengths hold throughout, because the source has those of another tag.
    """

    tagged: TaggedLora
    strength: float
    text: float
    source: Any = None
    may_change: bool = False
    is_own: bool = False


class LeftOut(LoratorioError):
    """The picture is made without this LoRA; the sentence is a note."""


class UnreadableLora(LoratorioError):
    """A LoRA's file cannot be read. The WebUI continues without it, and so does LoRAtorio."""


class Readable(Protocol):
    """A LoRA as it acts on one model: whether it changes nothing there, and sentences for the user."""

    @property
    def changes_nothing(self) -> bool: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


Lora = TypeVar("Lora", bound=Readable)


@dataclass(frozen=True)
class Admitted(Generic[Lora]):
    """The LoRAs that take part, in the order of a mix's coefficients.

    Attributes:
        active, loras: what the prompt says of each, and what was read of it.
        left_out: those that do not take part.
        participants: which of them are composed, and how.
        notes: sentences for the user.
    """

    active: tuple[ActiveLora, ...]
    loras: tuple[Lora, ...]
    left_out: tuple[ActiveLora, ...]
    participants: Participants
    notes: tuple[str, ...]


def each_once(
    activated: Sequence[ActiveLora], added: Callable[[Sequence[ActiveLora]], ActiveLora]
) -> list[ActiveLora]:
    """The LoRAs of these tags: of those that several tags name in one place, each once.

    added: what the host makes of a LoRA that all of these tags name, which differ in strength alone.
    """
    loras: list[ActiveLora] = []
    for numbers in repeats([lora.tagged for lora in activated]):
        tags = [activated[number] for number in numbers]
        if len(tags) == 1 or any(tag.may_change for tag in tags):
            loras += tags
        else:
            loras.append(replace(added(tags), tagged=united([tag.tagged for tag in tags])))
    return loras


def admit(
    active: Sequence[ActiveLora],
    prompt: str,
    read: Callable[[ActiveLora], Lora],
    size: tuple[int, int],
    region: Box = WHOLE,
    encode: Callable[[list[str]], Sequence[Tensor]] | None = None,
    read_by_place: Sequence[str] = (),
    other_options: Collection[str] = (),
) -> Admitted[Lora]:
    """The LoRAs that take part in a picture: of pools those that the prompt calls, without those that cannot be used or change nothing.

    Args:
        active: the prompt's LoRAs, each once.
        prompt: its text.
        read: reads a LoRA for the model. `LeftOut` and `UnreadableLora` leave it out, other errors only a pool's candidate.
        size, region: height and width of what is sampled, in latent pixels, and which part of the picture it is.
        encode: for methods that weigh trigger words, the base model's conditioning of each text, (tokens, width); else None.
        read_by_place: the prompts whose words LoRAs with a place read only in part (`reading`); none: they read all.
        other_options: named arguments of LoRA tags that others read.

    Raises:
        LoratorioError: the picture would not be the requested one.
    """
    left_out = [lora for lora in active if _is_never_picked(lora.tagged)]
    skipped = [lora.tagged.name for lora in left_out]
    others = [lora for lora in active if not _is_never_picked(lora.tagged)]
    chosen, choice = chosen_from_pool([lora.tagged for lora in others], prompt)
    notes, unread, without_effect = [choice], [], []
    taken: dict[int, tuple[ActiveLora, Lora]] = {}
    for number, tagged in chosen.items():
        lora = replace(others[number], tagged=tagged)
        if not math.isfinite(lora.strength):
            raise LoratorioError(f"The strength of LoRA {tagged.name} must be a number, not {lora.strength}.")
        try:
            found = read(lora)
        except LoratorioError as problem:
            if others[number].tagged.is_candidate:
                skipped.append(tagged.name)
            elif isinstance(problem, UnreadableLora):
                unread.append(tagged.name)
            elif isinstance(problem, LeftOut):
                notes.append(str(problem))
            else:
                raise
            continue
        # It predicts what the base predicts, and would have a share of the picture all the same.
        if found.changes_nothing:
            without_effect.append(tagged.name)
        else:
            taken[number] = lora, found
    if skipped and not (taken or without_effect or unread):
        raise LoratorioError("No LoRA of the pool matches this model: choose another folder or pattern.")
    tags = [lora.tagged for lora, _ in taken.values()]
    if read_by_place:
        tags = reading(tags, read_by_place)
    importance = None if encode is None else prompt_importance(tags, prompt, encode)
    participants = participants_of(tags, importance, prompt)
    notes += [unread_note(unread), without_effect_note(without_effect), skipped_note(skipped)]
    notes += [note for _, found in taken.values() for note in found.notes]
    notes += [
        recognised_note(assigned_roles(tags)),
        unknown_options_note(tags, other_options),
        no_room_note(tags, *size, region),
        lone_place_note(tags),
    ]
    return Admitted(
        tuple(lora for lora, _ in taken.values()),
        tuple(found for _, found in taken.values()),
        (*left_out, *(lora for number, lora in enumerate(others) if number not in taken)),
        participants,
        tuple(filter(None, notes)),
    )


def _is_never_picked(lora: TaggedLora) -> bool:
    """Whether it is a pool's, looks like a speed LoRA, and its tag gives no role."""
    return (
        lora.is_candidate and OPTION not in lora.options and looks_like_speed_lora(lora.name, lora.metadata)
    )
