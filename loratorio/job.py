"""One press of a WebUI's Generate button, as the page's part and the host's part of the extension both see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:  # a WebUI's start-up need not wait for the engine
    from .engine import WeightHistory


@dataclass(frozen=True)
class PassRecord:
    """One finished sampling: what was composed in it.

    Attributes:
        loras: names as in the prompt, in its order, without those that act in every pass.
        strengths: of those LoRAs in the UNet. places: as their tags have them, or nothing.
        batch: number of the batch within the job, from 0.
        hires: whether it is the second pass of hires fix, which replaces the first one's picture.
        history: Ω per step; empty unless weight maps were asked for.
        owners: image, within the batch, of each of the history's rows. Empty: row i is image i.
    """

    loras: tuple[str, ...]
    strengths: tuple[float, ...]
    places: tuple[str, ...]
    batch: int
    hires: bool
    history: WeightHistory
    owners: tuple[int, ...] = ()


@dataclass
class Job:
    """What lasts for one press of the Generate button.

    Attributes:
        p: the WebUI's processing object.
        settings: the knobs.
        tell: shows a sentence to the user (page and infotext); set by the script.
        passes: what was composed so far.
        notes: the sentences told so far, each once, for the infotext.
        adapters: LoRAs that the host has read, kept for the job's other batches, since some kinds take seconds.
        hires_prompts: the job's own prompts for the hires pass, while others stand in their place for the WebUI to read.
    """

    p: Any
    settings: Settings
    tell: Callable[[str], None] = lambda sentence: None
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    adapters: dict[Any, Any] = field(default_factory=dict)
    hires_prompts: list[str] | None = None

    def note(self, sentence: str) -> None:
        """Tell the user `sentence`, once a job."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.tell(sentence)
