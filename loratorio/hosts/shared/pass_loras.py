"""The LoRAs of one sampling pass of a WebUI: which it has activated, and what each does to the model that samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...adapters.delta import Adapter
from ...compose.methods import METHODS
from ...compose.mixes import Words
from ...compose.regions import WHOLE, Box
from ...errors import LoratorioError
from ...job import Job
from ...prompt.admission import ActiveLora, Admitted, LeftOut, UnreadableLora, admit, each_once
from ...prompt.roles import TaggedLora
from .other_extensions import SAMPLE_PARTS, SAMPLE_TILES, chosen_script, known_options, takes_maps
from .tags import WrittenTags
from .text import TEXTS, TextCache

NO_LORA = "LoRAtorio composed nothing: the prompt names no LoRA. The picture is the WebUI's own."

ALL_ALWAYS = "LoRAtorio composed nothing: every LoRA of the prompt acts on every row (role=always)."

REFINER_WITHOUT = "No LoRA of the prompt matches the refiner, so its steps have no LoRAs."

_LATENT_PIXEL = 8
"""Picture pixels on a side."""


@dataclass(frozen=True)
class ReadLora:
    """A LoRA as it acts on one model.

    Attributes:
        adapter: its changes to the UNet, at its strength; at strength 1 if the host gives the strength at every step.
        text: the host's object for its text conditioning; None if it does not change text.
        notes: sentences for the user.
        was_replaced: whether its file has changed since the WebUI applied it to its model.
    """

    active: ActiveLora
    adapter: Adapter
    text: Any = None
    notes: tuple[str, ...] = ()
    was_replaced: bool = False

    @property
    def name(self) -> str:
        """As in the prompt."""
        return self.active.tagged.name

    @property
    def changes_nothing(self) -> bool:
        """Whether the picture is the same with it."""
        is_off = self.active.strength == 0 and not self.active.may_change
        return (is_off or self.adapter.changes_nothing) and self.text is None


class PassLoras(ABC):
    """The LoRAs of a pass. Make one per pass.

    Attributes:
        job, p: the press of the button that it belongs to, and the WebUI's processing object.
    """

    idle_extensions: Collection[str] = ()
    """Words in the paths of extensions that read options of LoRA tags, but do nothing in this WebUI (`other_extensions`)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.p = job.p

    # -- what a host says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def activated(self) -> list[ActiveLora]:
        """The LoRAs that the WebUI has activated for this pass, one for each tag, in the prompt's order."""

    @abstractmethod
    def added(self, tags: Sequence[ActiveLora]) -> ActiveLora:
        """What the WebUI makes of a LoRA that all of these tags name, which differ in strength alone."""

    @abstractmethod
    def obstacle(self) -> str | None:
        """The sentence that says why this pass is left to the WebUI's own merging; None if it can be composed."""

    def remarks(self, loras: Sequence[ReadLora]) -> Iterator[str]:
        """Sentences on what will not be composed although the pass is."""
        yield from ()

    @abstractmethod
    def model_identity(self) -> Hashable:
        """Equal as long as the model that samples is the same one."""

    def identity(self, lora: ActiveLora) -> Hashable:
        """Equal for two activations of one LoRA that act in the same way."""
        return lora.source  # type: ignore[no-any-return]

    def text_identity(self, lora: ActiveLora) -> Hashable:
        """Equal for two activations of one LoRA that act on text in the same way. It does not keep the LoRA in memory."""
        return self.identity(lora)

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

    # -- before the first step ----------------------------------------------------------------------------------------

    def active(self) -> list[ActiveLora]:
        """The LoRAs of this pass: of those that several tags name in one place, each once."""
        return each_once(self.activated(), self.added)

    def admit(self) -> Admitted[ReadLora] | None:
        """The LoRAs of this pass that take part; None, and a note, if the pass is left to the WebUI's own merging.

        Raises:
            LoratorioError: the picture would not be the requested one.
        """
        self.job.begin_pass()
        active, missing = self.active(), self._missing()
        why_not = self.obstacle() if active else "" if missing else NO_LORA
        if why_not and any(lora.tagged.is_candidate for lora in active):
            raise LoratorioError(f"{why_not} A pool cannot be merged: remove it from the prompt.")
        if why_not:
            self.job.note(why_not)
            return None
        admitted = admit(
            [*active, *missing],
            self.prompt,
            self._usable,
            self._latent_size(),
            self.region,
            self.encode if METHODS[self.job.settings.method].uses_importance else None,
            self.prompts if self.job.settings.own_words else (),
            known_options(self.p, self.idle_extensions),
        )
        script = chosen_script(self.p)
        if script.lower() in SAMPLE_PARTS and admitted.participants.has_places:
            raise LoratorioError(
                f"The script {script} samples the picture in parts, so places (at=…) would apply to each part. "
                "Remove at=… from the prompt, or use hires fix or Ultimate SD upscale."
            )
        if script.lower() in SAMPLE_TILES and admitted.participants.seeks_places:
            raise LoratorioError(
                f"The script {script} samples the picture in tiles, so at=auto would find other places in each tile. Make a picture "
                "without it first, and write its places into the tags with Keep in the panel."
            )
        for note in (*admitted.notes, *self.remarks(admitted.loras)):
            self.job.note(note)
        if self.job.settings.weight_maps and not takes_maps(script):
            self.job.note(f"Weight maps are not available with the script {script}.")
        if admitted.participants.are_composed:
            return admitted
        if admitted.loras:
            self.job.note(ALL_ALWAYS)
        return None

    def _missing(self) -> list[ActiveLora]:
        """The LoRAs that have a tag but are not loaded by the WebUI."""
        tags = WrittenTags(self.p)
        for lora in self.activated():
            tags.take(lora.tagged.name)
        return [ActiveLora(TaggedLora(name, tag.options), 0, 0) for name, tag in tags.left.items()]

    def _usable(self, lora: ActiveLora) -> ReadLora:
        """The LoRA; in the hires pass, where an error would waste the first pass, its parts that match, as the WebUI itself would use
        them."""
        if lora.source is None:
            raise UnreadableLora(f"The WebUI has not loaded LoRA {lora.tagged.name}.")
        try:
            return self.read_once(lora)
        except UnreadableLora:
            raise
        except LoratorioError as problem:
            if not self.is_hires:
                raise
            with suppress(LoratorioError):
                part = self.read_once(lora, skip_misfits=True)
                if not part.changes_nothing:
                    note = f"{problem} The hires pass uses the parts that match."
                    return replace(part, notes=(note, *part.notes))
            raise LeftOut(f"{problem} The hires pass does not use it.") from problem

    def read_once(self, lora: ActiveLora, skip_misfits: bool = False) -> ReadLora:
        """`read`, kept for the job's other batches, because some kinds take seconds to read."""
        key = (self.identity(lora), self.model_identity(), skip_misfits)
        if key not in self.job.adapters:
            self.job.adapters[key] = self.read(lora, skip_misfits)
        known: ReadLora = self.job.adapters[key]
        return replace(known, active=lora)  # the tag may say something else in the next batch

    def text_cache(self, acting: Sequence[tuple[ActiveLora, float]], words: Words) -> TextCache:
        """The conditioning that is kept of a text encoder that these LoRAs act on, each at a part of its strength."""
        state = tuple((self.text_identity(lora), lora.text * part) for lora, part in acting if part)
        return TEXTS.of(self, (self.model_identity(), state, words))

    def on_refiner(self, active: Sequence[ActiveLora], before: Sequence[ReadLora]) -> tuple[ReadLora, ...]:
        """The pass's LoRAs on the refiner that was loaded, with a note about those that do not match it."""
        loras = tuple(self.read_once(lora, skip_misfits=True) for lora in active)
        both = list(zip(loras, before, strict=True))
        gone = [
            now.name
            for now, then in both
            if then.adapter.deltas and not now.adapter.deltas and now.text is None
        ]
        if gone and len(gone) < len(loras):
            self.job.note(
                f"LoRA{'s' if len(gone) > 1 else ''} {', '.join(gone)} {'do' if len(gone) > 1 else 'does'} not match the refiner, "
                f"so its steps do not use {'them' if len(gone) > 1 else 'it'}."
            )
        elif gone:
            self.job.note(REFINER_WITHOUT)
        for now, then in both:
            if then.text is not None and now.text is None and now.name not in gone:
                self.job.note(
                    f"The text encoder part of LoRA {now.name} does not match the refiner, so its steps do not use it."
                )
            else:
                for note in now.notes:
                    self.job.note(f"Refiner: {note}")
        return loras

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
    def prompts(self) -> list[str]:
        """Each picture's, as this pass has it."""
        return self.p.hr_prompts if self.is_hires else self.p.prompts  # type: ignore[no-any-return]

    @property
    def prompt(self) -> str:
        """The first picture's."""
        return self.prompts[0]
