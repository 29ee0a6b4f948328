"""What the WebUI script and a WebUI host say to each other. No host is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LoratorioError
from ..settings import Settings

if TYPE_CHECKING:  # a WebUI's start-up need not wait for the engine
    from ..engine import WeightHistory


NO_LORA = "The prompt names no LoRA, so LoRAtorio had nothing to compose: the picture is the WebUI's own."

ALL_ALWAYS = "Every LoRA of the prompt acts on every row (role=always), so LoRAtorio had nothing to compose."

BYPASSED = (
    "Another extension, or a newer WebUI, calls the model past LoRAtorio, so the picture would not be composed. "
    "Untick LoRAtorio, or switch the other extension off."
)


@dataclass(frozen=True)
class ComposedPass:
    """One finished sampling: what was composed in it.

    Attributes:
        loras: names as in the prompt, in its order, without those that act in every pass.
        strengths: of those LoRAs in the UNet.
        batch: number of the batch within the job, from 0.
        hires: whether it is the second pass of hires fix, which replaces the first one's picture.
        history: Ω per step; empty unless weight maps were asked for.
        owners: image, within the batch, of each of the history's rows. Empty: row i is image i.
    """

    loras: tuple[str, ...]
    strengths: tuple[float, ...]
    batch: int
    hires: bool
    history: WeightHistory
    owners: tuple[int, ...] = ()


@dataclass
class Job:
    """One press of the Generate button: what the script knows and what the host finds out.

    Attributes:
        p: the WebUI's processing object.
        settings: the knobs.
        tell: shows a sentence to the user (page and infotext); set by the script.
        passes: what was composed so far.
        notes: the sentences told so far, each once, for the infotext.
        scratch: what a host keeps from batch to batch.
    """

    p: Any
    settings: Settings
    tell: Callable[[str], None] = lambda sentence: None
    passes: list[ComposedPass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scratch: dict[Any, Any] = field(default_factory=dict)

    def note(self, sentence: str) -> None:
        """Tell the user `sentence`, once a job."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.tell(sentence)


class WebUIHost(Protocol):
    """A WebUI, as the script sees it. The script calls these at the host's events of the same name.

    A WebUI prints exceptions of a script's event methods and goes on: an error must not leave these two methods, but
    come from inside the sampling itself, where it stops the job with its sentence.
    """

    name: str

    def process_batch(self, job: Job) -> None:
        """The batch's LoRAs are activated, its text conditioning is not yet made."""

    def before_sampling(self, job: Job) -> None:
        """`job.p.sampler` is about to sample: once a pass, so twice with hires fix."""


def refuse(p: Any, problem: Exception) -> None:
    """Make the job `p` stop with `problem` as soon as it would sample.

    An exception in a script's event is only printed by the WebUI, and the picture would be another than asked for. One
    out of the sampling stops the job, is shown on the page, and is answered by the API: with status 422 and the sentence
    for a LoratorioError, with 500 for anything else.
    """

    def stop(*args: Any, **kwargs: Any) -> None:
        raise answerable(problem)

    p.sample = stop
    # Within `p.sample` it is too late for that; the pass itself is yet to come.
    if getattr(p, "sampler", None) is not None:
        p.sampler.launch_sampling = p.sampler.sample = p.sampler.sample_img2img = stop


def answerable(problem: Exception) -> Exception:
    """`problem` with what a WebUI's API makes its answer of."""
    if isinstance(problem, LoratorioError):
        problem.status_code, problem.detail = 422, str(problem)  # type: ignore[attr-defined]
    return problem
