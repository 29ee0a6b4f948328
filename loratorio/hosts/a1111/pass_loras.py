"""The LoRAs of one pass, read by the WebUI's own Lora extension."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ...job import Job
from ...prompt.admission import ActiveLora
from ..shared.pass_loras import PassLoras, ReadLora
from ..shared.text import encoded
from .loras import (
    activated,
    activated_loras,
    adapter_of,
    changes_text,
    check_text_numbers,
    forget_former_files,
    identity,
    partly_fitting,
    partly_used,
    restore_base,
    unet_layers,
)
from .other_extensions import obstacle, remarks


class A1111Loras(PassLoras):
    """The LoRAs of a pass of AUTOMATIC1111's WebUI."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        forget_former_files(self.p)

    def activated(self) -> list[ActiveLora]:
        return activated_loras(self.p)

    def added(self, tags: Sequence[ActiveLora]) -> ActiveLora:
        strength, text = sum(tag.strength for tag in tags), sum(tag.text for tag in tags)
        return replace(tags[0], strength=strength, text=text, is_own=True)

    def obstacle(self) -> str | None:
        return obstacle(self.p)

    def remarks(self, loras: Sequence[ReadLora]) -> Iterator[str]:
        return remarks(self.p)

    def model_identity(self) -> Hashable:
        from modules import shared

        # The WebUI may load another checkpoint into the same object.
        return shared.sd_model.sd_checkpoint_info.filename, weakref.ref(shared.sd_model)

    def identity(self, lora: ActiveLora) -> Hashable:
        return identity(lora.source)

    def text_identity(self, lora: ActiveLora) -> Hashable:
        network, *more = identity(lora.source)
        return (weakref.ref(network), *more)

    def read(self, lora: ActiveLora, skip_misfits: bool) -> ReadLora:
        from modules import shared

        network, layers = lora.source, unet_layers(shared.sd_model)
        restore_base(layers)  # some kinds depend on the weight that they change
        adapter = adapter_of(network, layers, skip_misfits=skip_misfits)
        adapter.check_numbers()
        check_text_numbers(network)
        note = partly_fitting(network, adapter, shared.sd_model) if skip_misfits else partly_used(network)
        return ReadLora(lora, adapter, notes=(note,) if note else ())

    def read_once(self, lora: ActiveLora, skip_misfits: bool = False) -> ReadLora:
        # The WebUI may have rebuilt the network since its deltas were cached: text is made with the present one.
        from modules import shared

        text = lora.source if changes_text(lora, shared.sd_model) else None
        return replace(super().read_once(lora, skip_misfits), text=text)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        from modules import devices, shared

        with activated(()), devices.autocast():
            return encoded(shared.sd_model, texts)
