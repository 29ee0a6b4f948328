"""One composed sampling pass of a WebUI: the part that all hosts share.

A host derives from `SamplingPass` and defines how text is encoded and how rows are run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from torch import Tensor

from ...adapters.bank import Bank
from ...compose.mixes import NO_WORDS
from ...errors import LoratorioError
from ...job import INTERRUPTED, PassRecord
from ...pictures.infotext import LoraUse
from ...prompt.admission import Admitted
from ...prompt.places import OPTION as PLACE_OPTION
from ...prompt.roles import not_found_note, reactions_note, style_note
from ...sampling.engine import Engine
from ...sampling.place_search import Found
from .pass_loras import PassLoras, ReadLora

NO_STEP = (
    "LoRAtorio composed nothing: the sampler did not call the model in any step. The picture is the WebUI's own. "
    "Raise the steps, or the denoising strength."
)

BYPASSED = (
    "Another extension, or a newer WebUI, calls the model without LoRAtorio, so the picture would not be composed. "
    "Untick LoRAtorio, or switch off the other extension."
)

Result = TypeVar("Result")


def _take_present_model(sampler: Any) -> None:
    """img2img has one sampler for all batches, which would go on with the refiner of the batch before."""
    from modules import shared

    denoiser = sampler.model_wrap_cfg
    if denoiser.inner_model.inner_model is not shared.sd_model:
        denoiser.model_wrap = None
        sampler.model_wrap = denoiser.inner_model


class SamplingPass(ABC):
    """Composes one pass. Make one per pass; `run` encloses the WebUI's sampling loop.

    Attributes:
        job, p: the press of the button that it belongs to, and the WebUI's processing object.
        source: where the LoRAs come from.
        loras: those that take part, in the order of a mix's coefficients.
        all_take_part: whether those are all that the WebUI has activated and used for its own conditioning.
        engine: composes the pass's steps.
        attachment: everything to undo when the pass ends or its model is replaced.
        evaluations: how many times the model was composed so far.
        owners: image of each conditional row of the last evaluation.
    """

    def __init__(self, source: PassLoras, admitted: Admitted[ReadLora], row_limit: int = 0) -> None:
        self.job, self.p = source.job, source.p
        _take_present_model(self.p.sampler)
        self.source = source
        self.loras = admitted.loras
        self.all_take_part = all(lora.source is None for lora in admitted.left_out)
        self.engine = Engine(
            self.job.settings,
            self.bank(),
            admitted.participants,
            row_limit,
            source.region,
            self.found_before,
            self._styles_before(admitted.participants.numbers),
        )
        self.attachment = ExitStack()
        self.evaluations = 0
        self.owners: tuple[int, ...] = ()
        self._strengths: set[tuple[float, ...]] = set()

    @abstractmethod
    def enclosed(self) -> AbstractContextManager[Any]:
        """The context that encloses the sampling loop, in addition to `attachment`."""

    def missed(self) -> None:
        """The sampler called the model a different number of times than LoRAtorio composed it."""
        raise LoratorioError(BYPASSED)

    @property
    def found_before(self) -> list[Found] | None:
        """In the hires pass, for each picture the places that the first pass found for the same LoRAs; else None."""
        sought = [
            i for i, lora in enumerate(self.loras) if (place := lora.active.tagged.place) and place.sought
        ]
        names, first = [self.loras[i].name for i in sought], self._first_pass
        if first is None or not first.found:
            return None
        if any([name for name, _ in each] not in ([], names) for each in first.found):
            return None  # the hires pass has a prompt of its own
        return [dict(zip(sought, (place for _, place in each), strict=False)) for each in first.found]

    def _styles_before(self, numbers: Sequence[int]) -> frozenset[int] | None:
        """In the hires pass, the LoRAs that the first pass found to be styles, if it composed the same ones; else None."""
        names, first = {number: self.loras[number].name for number in numbers}, self._first_pass
        if first is None or {*first.loras} != {*names.values()}:
            return None
        styles = {use.name for use in first.uses if use.style}
        return frozenset(number for number, name in names.items() if name in styles)

    @property
    def _first_pass(self) -> PassRecord | None:
        """In the hires pass, what the first pass of this batch composed; else None."""
        passes = self.job.passes if self.job.is_hires else ()
        return next((each for each in passes if each.batch == self.job.batch and not each.hires), None)

    @property
    def painted(self) -> Tensor | None:
        """Where an inpainting mask leaves the picture to the sampler, (H, W) from 0 to 1; None: everywhere."""
        mask: Tensor | None = getattr(self.p.sampler.model_wrap_cfg, "nmask", None)
        return mask.float().flatten(0, -3).mean(dim=0) if isinstance(mask, Tensor) and mask.ndim > 2 else None

    def bank(self) -> Bank:
        """The LoRAs of this pass, ready to be attached."""
        return Bank([lora.adapter for lora in self.loras])

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
                self.record(is_whole=False)
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

    def record(self, is_whole: bool = True) -> None:
        """Record what was composed in the job. is_whole: the sampling was not interrupted."""
        self.engine.history.settle()
        names = [lora.name for lora in self.loras]
        if self.engine.pool.reactions:
            self.job.note(reactions_note(names, self.engine.pool.reactions, self.engine.pool.left_out))
        shares, participants = self.engine.history.shares, self.engine.participants
        numbers = [*participants.numbers, *(added.number for added in participants.additions)]
        found = self.engine.places.named(names)
        sought = [names[number] for number in self.engine.places.numbers]
        missing = not_found_note(sought, found, len(self.p.prompts))
        if missing and (found or is_whole):
            self.job.note(missing)
        if styles := style_note([names[number] for number in sorted(self.engine.styles.numbers)]):
            self.job.note(styles)
        self.job.record(
            PassRecord(
                uses=tuple(self._use(number, shares) for number in numbers),
                batch=self.job.batch,
                hires=self.job.is_hires,
                history=self.engine.history,
                owners=self.owners,
                found=found,
            )
        )

    def _use(self, number: int, shares: Mapping[int, float]) -> LoraUse:
        lora, has_text = self.loras[number].active, self.loras[number].text is not None
        seen = [strengths[number] for strengths in self._strengths] or [lora.strength]
        share = shares.get(number, 0.0) if lora.tagged.is_candidate and shares else None
        place = lora.tagged.options.get(PLACE_OPTION, "")
        text = lora.text if has_text else None
        without = self.engine.participants.words.get(number, NO_WORDS).without
        is_style = number in self.engine.styles.numbers
        return LoraUse(lora.tagged.name, min(seen), place, max(seen), share, text, without, is_style)

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
