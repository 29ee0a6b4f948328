"""One composed sampling pass of a WebUI: the part that all hosts share.

A host derives from `SamplingPass` and defines where LoRAs come from, how text is encoded and how rows are run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ...adapters.bank import Bank
from ...adapters.delta import Adapter
from ...compose.methods import METHODS
from ...compose.mixes import Participants
from ...compose.regions import WHOLE, Box
from ...errors import LoratorioError
from ...job import Job, PassRecord
from ...pictures.infotext import LoraUse
from ...prompt.places import OPTION as PLACE_OPTION
from ...prompt.pool import Candidates
from ...prompt.roles import (
    TaggedLora,
    assigned_roles,
    chosen_from_pool,
    no_room_note,
    participants_of,
    prompt_importance,
    reactions_note,
    recognised_note,
    repeats,
    united,
    unknown_options_note,
    unread_note,
    without_effect_note,
)
from ...sampling.engine import Engine
from .other_extensions import known_options, sampling_in_parts, without_maps
from .tags import WrittenTags

NO_LORA = "LoRAtorio composed nothing: the prompt names no LoRA. The picture is the WebUI's own."

ALL_ALWAYS = "LoRAtorio composed nothing: every LoRA of the prompt acts on every row (role=always)."

REFINER_WITHOUT = "No LoRA of the prompt matches the refiner, so its steps have no LoRAs."

NO_STEP = (
    "LoRAtorio composed nothing: the sampler did not call the model in any step. The picture is the WebUI's own. "
    "Raise the steps, or the denoising strength."
)

INTERRUPTED = "LoRAtorio composed nothing: interrupted before the first step."

BYPASSED = (
    "Another extension, or a newer WebUI, calls the model without LoRAtorio, so the picture would not be composed. "
    "Untick LoRAtorio, or switch off the other extension."
)

_LATENT_PIXEL = 8
"""Picture pixels on a side."""

Result = TypeVar("Result")


class UnreadableLora(LoratorioError):
    """A LoRA's file cannot be read. The WebUI continues without it, and so does a pass."""


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA that the WebUI has activated for the pass.

    Attributes:
        tagged: its tag and its file's metadata.
        strength, text: its strengths in the UNet and in the text encoder, when the pass begins.
        source: the host's object that it is read from.
        may_change: whether its strength may differ from step to step.
        is_own: whether these strengths hold throughout, because the source has those of another tag.
    """

    tagged: TaggedLora
    strength: float
    text: float
    source: Any
    may_change: bool = False
    is_own: bool = False


@dataclass(frozen=True)
class ReadLora:
    """A LoRA as it acts on one model.

    Attributes:
        adapter: its changes to the UNet, at its strength; at strength 1 if the host gives the strength at every step.
        text: the host's object for its text conditioning; None if it does not change text.
        remark: a note for the user, or nothing.
        was_replaced: whether its file has changed since the WebUI applied it to its model.
    """

    active: ActiveLora
    adapter: Adapter
    text: Any = None
    remark: str = ""
    was_replaced: bool = False


class SamplingPass(ABC):
    """Composes one pass. Make one per pass; `admit` it, then `run` encloses the WebUI's sampling loop.

    Attributes:
        job, p: the press of the button that it belongs to, and the WebUI's processing object.
        loras: those that take part, in the order of a mix's coefficients.
        all_take_part: whether those are all that the WebUI has activated and used for its own conditioning.
        engine: composes the pass's steps.
        attachment: everything to undo when the pass ends or its model is replaced.
        evaluations: how many times the model was composed so far.
        owners: image of each conditional row of the last evaluation.
    """

    idle_extensions: Collection[str] = ()
    """Words in the paths of extensions that read options of LoRA tags, but do nothing in this WebUI (`other_extensions`)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.p = job.p
        self.loras: tuple[ReadLora, ...] = ()
        self.all_take_part = True
        self.engine: Engine
        self.attachment = ExitStack()
        self.evaluations = 0
        self.owners: tuple[int, ...] = ()
        self._strengths: set[tuple[float, ...]] = set()

    # -- what a host says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def activated(self) -> list[ActiveLora]:
        """The LoRAs that the WebUI has activated for this pass, one for each tag, in the prompt's order."""

    @abstractmethod
    def added(self, tags: Sequence[ActiveLora]) -> ActiveLora:
        """What the WebUI makes of a LoRA that all of these tags name, which differ in strength alone."""

    def active_loras(self) -> list[ActiveLora]:
        """The LoRAs of this pass: of those that several tags name in one place, each once."""
        activated = self.activated()
        loras = []
        for numbers in repeats([lora.tagged for lora in activated]):
            tags = [activated[number] for number in numbers]
            if len(tags) == 1 or any(tag.may_change for tag in tags):
                loras += tags
            else:
                loras.append(replace(self.added(tags), tagged=united([tag.tagged for tag in tags])))
        return loras

    @abstractmethod
    def obstacle(self) -> str | None:
        """The sentence that says why this pass is left to the WebUI's own merging; None if it can be composed."""

    def remarks(self) -> Iterator[str]:
        """Sentences on what will not be composed although the pass is."""
        yield from ()

    @abstractmethod
    def model_identity(self) -> Hashable:
        """Equal as long as the model that samples is the same one."""

    def identity(self, lora: ActiveLora) -> Hashable:
        """Equal for two activations of one LoRA that act in the same way."""
        return lora.source  # type: ignore[no-any-return]

    @abstractmethod
    def read(self, lora: ActiveLora, skip_misfits: bool) -> ReadLora:
        """The LoRA on the model that samples now.

        Args:
            skip_misfits: of one for another model take what fits, as the WebUI does: for a refiner, and for a hires pass.

        Raises:
            LoratorioError: it does not fit the model.
        """

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """The base model's conditioning of each text, (tokens, width)."""

    @abstractmethod
    def enclosed(self) -> AbstractContextManager[Any]:
        """The context that encloses the sampling loop, in addition to `attachment`."""

    def missed(self) -> None:
        """The sampler called the model a different number of times than LoRAtorio composed it."""
        raise LoratorioError(BYPASSED)

    # -- before the first step ----------------------------------------------------------------------------------------

    def admit(self) -> Participants | None:
        """The LoRAs that are composed in this pass; None, and a note, if the pass is left to the WebUI's own merging.

        Raises:
            LoratorioError: the picture would not be the requested one.
        """
        self.job.begin_pass()
        active = self.active_loras()
        missing = self._missing()
        why_not = self.obstacle() if active else "" if missing else NO_LORA
        if why_not and any(lora.tagged.is_candidate for lora in active):
            raise LoratorioError(f"{why_not} A pool cannot be merged: remove it from the prompt.")
        if why_not:
            self.job.note(why_not)
            return None
        chosen, note = chosen_from_pool([lora.tagged for lora in active], self.prompt)
        if note:
            self.job.note(note)
        taken = [replace(active[number], tagged=tagged) for number, tagged in chosen.items()]
        self.loras = tuple(self._usable(taken, missing))
        self.all_take_part = len(self.loras) == len(active)
        tagged = [lora.active.tagged for lora in self.loras]
        participants = participants_of(tagged, self._importance(tagged))
        script = sampling_in_parts(self.p)
        if script and participants.has_places:
            raise LoratorioError(
                f"The script {script} samples the picture in parts, so places (at=…) would apply to each part. "
                "Remove at=… from the prompt, or use hires fix or Ultimate SD upscale."
            )
        own_remarks = [lora.remark for lora in self.loras]
        of_tags = (
            recognised_note(assigned_roles(tagged)),
            unknown_options_note(tagged, known_options(self.p, self.idle_extensions)),
            no_room_note(tagged, *self._latent_size(), self.region),
            f"Weight maps are not available with the script {without_maps(self.p)}."
            if without_maps(self.p) and self.job.settings.weight_maps
            else "",
        )
        for remark in (*own_remarks, *self.remarks(), *of_tags):
            if remark:
                self.job.note(remark)
        if not participants.are_composed:
            if self.loras:
                self.job.note(ALL_ALWAYS)
            return None
        return participants

    def _missing(self) -> dict[str, bool]:
        """Names of LoRAs that have a tag but are not loaded by the WebUI, and whether they are only candidates of a pool."""
        tags = WrittenTags(self.p)
        for lora in self.activated():
            tags.take(lora.tagged.name)
        return {name: TaggedLora(name, tag.options).is_candidate for name, tag in tags.left.items()}

    def _usable(self, active: Sequence[ActiveLora], missing: Mapping[str, bool]) -> Iterator[ReadLora]:
        """The LoRAs, read, without those that change nothing, those whose file cannot be read, and those candidates of a pool that
        cannot be used; notes say which."""
        skipped = [(name, "") for name, is_candidate in missing.items() if is_candidate]
        unread = [name for name, is_candidate in missing.items() if not is_candidate]
        without_effect: list[str] = []
        found = 0
        for lora in active:
            if not math.isfinite(lora.strength):
                raise LoratorioError(
                    f"The strength of LoRA {lora.tagged.name} must be a number, not {lora.strength}."
                )
            try:
                read = self.read_once(lora)
            except LoratorioError as problem:
                if lora.tagged.is_candidate:
                    skipped.append((lora.tagged.name, str(problem)))
                elif isinstance(problem, UnreadableLora):
                    unread.append(lora.tagged.name)
                elif self.is_hires:
                    yield from self._fitting_part(lora, problem)
                else:
                    raise
                continue
            found += 1
            # It predicts what the base predicts, and would have a share of the picture all the same.
            is_off = lora.strength == 0 and not lora.may_change
            if (is_off or read.adapter.changes_nothing) and read.text is None:
                without_effect.append(lora.tagged.name)
            else:
                yield read
        if unread:
            self.job.note(unread_note(unread))
        if without_effect:
            self.job.note(without_effect_note(without_effect))
        if skipped and not found and not unread:
            raise LoratorioError("No LoRA of the pool matches this model: choose another folder or pattern.")
        if skipped:
            self.job.note(Candidates((), tuple(skipped)).note)

    def _fitting_part(self, lora: ActiveLora, problem: LoratorioError) -> Iterator[ReadLora]:
        """The matching parts of a LoRA in the hires pass, as the WebUI itself would use them, with a note about the `problem`. An error
        would waste the first pass."""
        part = None
        with suppress(LoratorioError):
            part = self.read_once(lora, skip_misfits=True)
        if part is None or (part.adapter.changes_nothing and part.text is None):
            self.job.note(f"{problem} The hires pass does not use it.")
        else:
            self.job.note(f"{problem} The hires pass uses the parts that match.")
            yield part

    def read_once(self, lora: ActiveLora, skip_misfits: bool = False) -> ReadLora:
        """`read`, kept for the job's other batches, because some kinds take seconds to read."""
        key = (self.identity(lora), self.model_identity(), skip_misfits)
        if key not in self.job.adapters:
            self.job.adapters[key] = self.read(lora, skip_misfits)
        known: ReadLora = self.job.adapters[key]
        return replace(known, active=lora)  # the tag may say something else in the next batch

    def loras_of_refiner(self, active: Sequence[ActiveLora]) -> tuple[ReadLora, ...]:
        """The pass's LoRAs on the refiner that was loaded, with a note about those that do not match it."""
        loras = tuple(self.read_once(lora, skip_misfits=True) for lora in active)
        gone = [
            now.active.tagged.name
            for now, before in zip(loras, self.loras, strict=True)
            if before.adapter.deltas and not now.adapter.deltas and now.text is None
        ]
        if gone and len(gone) < len(loras):
            self.job.note(
                f"LoRA{'s' if len(gone) > 1 else ''} {', '.join(gone)} {'do' if len(gone) > 1 else 'does'} not match the refiner, "
                f"so its steps do not use {'them' if len(gone) > 1 else 'it'}."
            )
        elif gone:
            self.job.note(REFINER_WITHOUT)
        for now, before in zip(loras, self.loras, strict=True):
            name = now.active.tagged.name
            if before.text is not None and now.text is None and name not in gone:
                self.job.note(
                    f"The text encoder part of LoRA {name} does not match the refiner, so its steps do not use it."
                )
            elif now.remark:
                self.job.note(f"Refiner: {now.remark}")
        return loras

    def _importance(self, tagged: Sequence[TaggedLora]) -> dict[int, float] | None:
        """By LoRA, how much its trigger words matter in the prompt; only asked for by a method that uses it."""
        if not METHODS[self.job.settings.method].uses_importance:
            return None
        return prompt_importance(tagged, self.prompt, self.encode)

    @property
    def is_hires(self) -> bool:
        """Whether this is the second pass of hires fix."""
        return self.job.is_hires

    @property
    def region(self) -> Box:
        """The part of the picture that is sampled: of inpainting "only masked" what surrounds the mask."""
        cut = getattr(self.p, "paste_to", None)
        if cut is None or not self.p.overlay_images:
            return WHOLE
        x, y, width, height = cut
        whole_width, whole_height = self.p.overlay_images[0].size
        return Box(x / whole_width, y / whole_height, (x + width) / whole_width, (y + height) / whole_height)

    def _latent_size(self) -> tuple[int, int]:
        """Height and width of what is sampled, in latent pixels."""
        height, width = self.p.height, self.p.width
        if self.is_hires:
            height, width = self.p.hr_upscale_to_y or height, self.p.hr_upscale_to_x or width
        return height // _LATENT_PIXEL, width // _LATENT_PIXEL

    @property
    def prompt(self) -> str:
        """The first picture's, as this pass has it."""
        prompts: list[str] = self.p.hr_prompts if self.is_hires else self.p.prompts
        return prompts[0]

    def bank(self) -> Bank:
        """The LoRAs of this pass, ready to be attached."""
        return Bank([lora.adapter for lora in self.loras])

    # -- the sampling loop --------------------------------------------------------------------------------------------

    def run(self, sample: Callable[[], Result]) -> Result:
        """`sample()`, the WebUI's sampling loop, composed and accounted for.

        Raises:
            LoratorioError: the picture would not be the requested one.
        """
        from modules.sd_samplers_common import InterruptedException

        denoiser = self.p.sampler.model_wrap_cfg
        first = denoiser.step
        try:
            with self.attachment, self.enclosed():
                result = sample()
        except InterruptedException:  # the WebUI makes a picture of what there is
            if self.evaluations:
                self.record()
            elif denoiser.step == first:
                self.job.note(INTERRUPTED)
            raise
        if self.evaluations != denoiser.step - first:
            self.missed()
        elif not self.evaluations:
            self.job.note(NO_STEP)
        if self.evaluations:
            for sentence in self.engine.without_effect(self.place_in_sampling()[1]):
                self.job.note(sentence)
            self.record()
        return result

    def record(self) -> None:
        """Record what was composed in the job."""
        self.engine.history.settle()
        if self.engine.pool.reactions:
            names = [lora.active.tagged.name for lora in self.loras]
            self.job.note(reactions_note(names, self.engine.pool.reactions, self.engine.pool.left_out))
        shares, participants = self.engine.history.shares, self.engine.participants
        numbers = [*participants.numbers, *(added.number for added in participants.additions)]
        self.job.record(
            PassRecord(
                uses=tuple(self._use(number, shares) for number in numbers),
                batch=self.job.batch,
                hires=self.is_hires,
                history=self.engine.history,
                owners=self.owners,
            )
        )

    def _use(self, number: int, shares: Mapping[int, float]) -> LoraUse:
        lora, has_text = self.loras[number].active, self.loras[number].text is not None
        seen = [strengths[number] for strengths in self._strengths] or [lora.strength]
        share = shares.get(number, 0.0) if lora.tagged.is_candidate and shares else None
        place = lora.tagged.options.get(PLACE_OPTION, "")
        text = lora.text if has_text else None
        return LoraUse(lora.tagged.name, min(seen), place, max(seen), share, text)

    def saw_strengths(self, strengths: tuple[float, ...]) -> None:
        """Remember, for the infotext, the strengths that the LoRAs have at this evaluation, where they may change."""
        self._strengths.add(strengths)

    def place_in_sampling(self) -> tuple[int, int]:
        """Number of the step, from 0, at which the WebUI's sampler stands, and how many steps there are.

        A WebUI's denoiser counts evaluations. Heun and similar samplers make two per step, and some make more than it expects.
        """
        denoiser = self.p.sampler.model_wrap_cfg
        total = max(1, denoiser.steps or 1)
        per_step = max(1, (denoiser.total_steps or 1) // total)
        return min(denoiser.step // per_step, total - 1), total
