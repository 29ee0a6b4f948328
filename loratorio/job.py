"""One press of a WebUI's Generate button, shared by the page's part and the host's part of the extension."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .pictures.infotext import LoraUse
from .settings import Settings

if TYPE_CHECKING:  # a WebUI's start-up need not wait for the engine
    from .compose.regions import Place
    from .sampling.history import WeightHistory


@dataclass(frozen=True)
class PassRecord:
    """One finished sampling: what was composed in it.

    Attributes:
        uses: the LoRAs, in the prompt's order: those that have weights, then those that are added inside their places. Without those that
            act in every pass.
        batch: number of the batch within the job, from 0.
        hires: whether it is the second pass of hires fix, which replaces the first one's picture.
        history: Ω per step; empty unless weight maps were asked for.
        owners: image, within the batch, of each of the history's rows. Empty: row i is image i.
        found: for each picture of the batch the names and places of the LoRAs with at=auto; none where they were not found.
    """

    uses: tuple[LoraUse, ...]
    batch: int
    hires: bool
    history: WeightHistory
    owners: tuple[int, ...] = ()
    found: tuple[tuple[tuple[str, Place], ...], ...] = ()

    @property
    def loras(self) -> tuple[str, ...]:
        """Their names, as in the prompt. The first of them are those of the history's weights."""
        return tuple(use.name for use in self.uses)


@dataclass(frozen=True)
class Note:
    """A sentence for the user, and the pass that it is about. batch, hires: as in `PassRecord`."""

    sentence: str
    batch: int
    hires: bool


@dataclass
class Job:
    """The state of one press of the Generate button.

    Attributes:
        p: the WebUI's processing object.
        settings: the knobs.
        standing: sentences that are true for every pass.
        tell: called with every new sentence.
        changed: called after every new pass or note.
        passes: the finished passes.
        told: the notes so far, each once per pass.
        begun: the passes that have begun, as (batch, hires).
        adapters: LoRAs that the host has read, kept for the job's other batches, because some kinds take seconds.
        hires_prompts: the job's own prompts for the hires pass, while they are replaced by prompts that the WebUI can read.
    """

    p: Any
    settings: Settings
    standing: Sequence[str] = ()
    tell: Callable[[str], None] = lambda sentence: None
    changed: Callable[[], None] = lambda: None
    passes: list[PassRecord] = field(default_factory=list)
    told: list[Note] = field(default_factory=list)
    begun: set[tuple[int, bool]] = field(default_factory=set)
    adapters: dict[Any, Any] = field(default_factory=dict)
    hires_prompts: list[str] | None = None

    @property
    def batch(self) -> int:
        """Number of the batch that is being made, from 0."""
        return int(getattr(self.p, "iteration", 0) or 0)

    @property
    def is_hires(self) -> bool:
        """Whether the second pass of hires fix is being made."""
        return bool(getattr(self.p, "is_hr_pass", False))

    @property
    def notes(self) -> list[str]:
        """All sentences so far, each once."""
        return list(dict.fromkeys(note.sentence for note in self.told))

    def end_batch(self) -> None:
        """A batch of pictures is finished: add a note if nothing was sampled for it."""
        if self.batch not in {batch for batch, _ in self.begun}:
            self.note(NOT_COMPOSED)

    def begin_pass(self) -> None:
        """A sampling begins."""
        self.begun.add((self.batch, self.is_hires))
        for sentence in self.standing:
            self.note(sentence)

    def note(self, sentence: str) -> None:
        """Tell the user `sentence`, about the current pass."""
        note = Note(sentence, self.batch, self.is_hires)
        if note in self.told:
            return
        is_new = sentence not in self.notes
        self.told.append(note)
        if is_new:
            self.tell(sentence)
        self.changed()

    def record(self, done: PassRecord) -> None:
        """A sampling is over."""
        self.passes.append(done)
        self.changed()

    def release(self) -> None:
        """The job is over: free the LoRAs that were read for it.

        The job and the WebUI's object refer to each other, so both live until Python collects cycles, which it does by their
        number and not by the gigabytes that they hold.
        """
        self.adapters.clear()

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Inside this block, an exception ends the job: the WebUI has no event for it."""
        try:
            yield
        except BaseException as problem:
            self.release()
            # Its frames hold the pass with its LoRAs, and a WebUI's server keeps the error until Python looks for rings.
            traceback.clear_frames(problem.__traceback__)
            raise

    def notes_of(self, batch: int) -> list[str]:
        """The sentences about a batch's pictures. With two passes, a sentence about only one of them names the pass."""
        has_two = {(batch, False), (batch, True)} <= self.begun
        of_batch = [note for note in self.told if note.batch == batch]
        sentences = []
        for sentence in dict.fromkeys(note.sentence for note in of_batch):
            passes = {note.hires for note in of_batch if note.sentence == sentence}
            which = "" if not has_two or len(passes) == 2 else HIRES_PASS if True in passes else FIRST_PASS
            sentences.append(which + sentence)
        return sentences


NOT_COMPOSED = (
    "LoRAtorio composed nothing in this picture. Either the WebUI did not sample it, or another extension, such as Tiled Diffusion's "
    "DemoFusion, samples in its own way with the LoRAs merged."
)
INTERRUPTED = "LoRAtorio composed nothing: interrupted before the first step."
FIRST_PASS, HIRES_PASS = "First pass: ", "Hires pass: "
