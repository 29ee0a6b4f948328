"""One press of a WebUI's Generate button, as the page's part and the host's part of the extension both see it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .pictures.infotext import LoraUse
from .settings import Settings

if TYPE_CHECKING:  # a WebUI's start-up need not wait for the engine
    from .sampling.history import WeightHistory


@dataclass(frozen=True)
class PassRecord:
    """One finished sampling: what was composed in it.

    Attributes:
        uses: the LoRAs, in the prompt's order, without those that act in every pass.
        batch: number of the batch within the job, from 0.
        hires: whether it is the second pass of hires fix, which replaces the first one's picture.
        history: Ω per step; empty unless weight maps were asked for.
        owners: image, within the batch, of each of the history's rows. Empty: row i is image i.
    """

    uses: tuple[LoraUse, ...]
    batch: int
    hires: bool
    history: WeightHistory
    owners: tuple[int, ...] = ()

    @property
    def loras(self) -> tuple[str, ...]:
        """Their names, as in the prompt."""
        return tuple(use.name for use in self.uses)


@dataclass(frozen=True)
class Note:
    """A sentence for the user, and the pass that it is true of. batch, hires: as in `PassRecord`."""

    sentence: str
    batch: int
    hires: bool


@dataclass
class Job:
    """What lasts for one press of the Generate button.

    Attributes:
        p: the WebUI's processing object.
        settings: the knobs.
        standing: sentences that are true of every pass.
        tell: called with every new sentence.
        changed: called when a pass, or a note, has come.
        passes: what was composed so far.
        told: the notes so far, each once a pass.
        begun: the passes that have begun, as (batch, hires).
        adapters: LoRAs that the host has read, kept for the job's other batches, since some kinds take seconds.
        hires_prompts: the job's own prompts for the hires pass, while others stand in their place for the WebUI to read.
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
        """A batch of pictures is made: say so where nothing was sampled for it."""
        if self.batch not in {batch for batch, _ in self.begun}:
            self.note(NOT_COMPOSED)

    def begin_pass(self) -> None:
        """A sampling begins."""
        self.begun.add((self.batch, self.is_hires))
        for sentence in self.standing:
            self.note(sentence)

    def note(self, sentence: str) -> None:
        """Tell the user `sentence`, of the pass that is being made."""
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
        """The job is over: free what was read for it.

        The job hangs on the WebUI's object and that on the job, so both last until Python looks for such rings, which it does by their
        number and not by the gigabytes that they hold.
        """
        self.adapters.clear()

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """While this lasts, an exception ends the job: the WebUI tells nobody that it is over."""
        try:
            yield
        except BaseException as problem:
            self.release()
            # Its frames hold the pass with its LoRAs, and a WebUI's server keeps the error until Python looks for rings.
            traceback.clear_frames(problem.__traceback__)
            raise

    def notes_of(self, batch: int) -> list[str]:
        """The sentences about a batch's pictures; where it has two passes and one is true of one only, it says of which."""
        has_two = {(batch, False), (batch, True)} <= self.begun
        of_batch = [note for note in self.told if note.batch == batch]
        sentences = []
        for sentence in dict.fromkeys(note.sentence for note in of_batch):
            passes = {note.hires for note in of_batch if note.sentence == sentence}
            which = "" if not has_two or len(passes) == 2 else HIRES_PASS if True in passes else FIRST_PASS
            sentences.append(which + sentence)
        return sentences


NOT_COMPOSED = (
    "LoRAtorio composed nothing in this picture: the WebUI sampled no step of it, or another extension samples in its own way, with the "
    "LoRAs merged (Tiled Diffusion's DemoFusion does)."
)
FIRST_PASS, HIRES_PASS = "First pass: ", "Hires pass: "
