"""The LoRAs of one pass, read by the host's own LoRA code."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...adapters.delta import Adapter
from ...errors import LoratorioError
from ...job import Job
from ...prompt.admission import ActiveLora
from ...prompt.roles import TaggedLora
from ...prompt.tags import BLOCK_WEIGHT
from ..shared.other_extensions import merged_because, replaced_attention, strengths_by_step
from ..shared.pass_loras import PassLoras, ReadLora
from ..shared.text import encoded
from .conditioning import text_encoder
from .loras import read
from .variants import Variant

MERGED_TEXT = (
    "The LoRAs' text encoder parts are merged, because this model reads the prompt together with a picture."
)


class ForgeLoras(PassLoras):
    """The LoRAs of a pass of a Forge."""

    def __init__(self, job: Job, variant: Variant) -> None:
        super().__init__(job)
        self._variant = variant
        self.idle_extensions = variant.idle_extensions

    def activated(self) -> list[ActiveLora]:
        return [
            ActiveLora(
                TaggedLora(file.name, file.options, file.metadata, file=Path(file.path)),
                file.unet,
                file.text,
                file,
            )
            for file in self._variant.applied(self.p)
        ]

    def added(self, tags: Sequence[ActiveLora]) -> ActiveLora:
        files = [tag.source for tag in tags]
        unet, text = (
            self._variant.added([getattr(file, part) for file in files]) for part in ("unet", "text")
        )
        return replace(tags[0], strength=unet, text=text, source=replace(files[0], unet=unet, text=text))

    def obstacle(self) -> str | None:
        loras = self.activated()
        by_step = BLOCK_WEIGHT not in self.idle_extensions
        return (
            self._variant.obstacle(self.p)
            or replaced_attention(self.p.sd_model.forge_objects.unet.model)
            or (strengths_by_step(self.p, [lora.tagged for lora in loras]) if by_step else None)
            or self._changed_strengths(loras)
        )

    def _changed_strengths(self, loras: Sequence[ActiveLora]) -> str | None:
        """The reason not to compose if an extension has changed the LoRAs that the host applied, as LoRA Block Weight does.

        LoRAtorio reads them again from their files, which do not have such changes.
        """
        applied = self.p.sd_model.forge_objects_after_applying_lora.unet
        originals = {
            key: len(patches)
            for key, patches in self._variant.patches(self.p.sd_model.forge_objects_original.unet)
        }
        asked = {lora.strength for lora in loras}
        for key, patches in self._variant.patches(applied):
            for patch in list(patches)[originals.get(key, 0) :]:
                if not any(math.isclose(float(patch[0]), strength, abs_tol=1e-9) for strength in asked):
                    return merged_because("another extension has changed the LoRAs' strengths layer by layer")
        return None

    def remarks(self, loras: Sequence[ReadLora]) -> Iterator[str]:
        if self._variant.text_sees_pictures() and any(lora.text is not None for lora in loras):
            yield MERGED_TEXT

    def model_identity(self) -> Hashable:
        # A refiner, and the checkpoint that comes back after it, are other models.
        return weakref.ref(self.p.sd_model.forge_objects_original.unet.model)

    def read(self, lora: ActiveLora, skip_misfits: bool) -> ReadLora:
        try:
            return read(lora, self.p.sd_model, self._variant)
        except LoratorioError:
            if not skip_misfits:
                raise
            return ReadLora(lora, Adapter(lora.tagged.name, {}))

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        with text_encoder(self.p, self.p.sd_model.forge_objects_original.clip):
            return encoded(self.p.sd_model, texts)
