"""An example of a host: a WebUI that has no LoRA, so that every pass is left to it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ...job import Job
from ..shared.sampling_pass import ActiveLora, ReadLora, SamplingPass


class ExamplePass(SamplingPass):
    def active_loras(self) -> list[ActiveLora]:
        return []

    def obstacle(self) -> str | None:
        return None

    def model_identity(self) -> Hashable:
        return "model"

    def read(self, lora: ActiveLora, is_refiner: bool) -> ReadLora:
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        raise NotImplementedError

    @contextmanager
    def enclosed(self) -> Iterator[None]:
        yield


class Example:
    name = "Example"

    def before_sampling(self, job: Job) -> None:
        ExamplePass(job).admit()


HOST = Example()
