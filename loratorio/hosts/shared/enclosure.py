"""A wrapper around a WebUI's sampling loop, for one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import LoratorioError
from ...job import Job
from ...refusal import refusals
from .other_extensions import hides_errors

Around = Callable[[Callable[[], Any]], Any]
"""Given the sampling loop, runs it and returns what it returns."""


def enclose(job: Job, around: Around) -> None:
    """Have `around` run the next sampling loop of the job's sampler.

    It encloses one loop. A sampler may live longer than a pass (A1111's img2img has one for all of a job's batches), so further loops
    are the WebUI's own until this is called again. If it is called twice before the loop (Forge's hires fix), the second call counts.
    """
    sampler = job.p.sampler
    if isinstance(sampler.launch_sampling, _Enclosure):
        sampler.launch_sampling.take_off()
    sampler.launch_sampling = _Enclosure(job, around, sampler)


class _Enclosure:
    """Replaces a sampler's `launch_sampling`. Afterwards it holds no references; if another extension has wrapped it, so that it cannot
    be removed, it passes calls on."""

    def __init__(self, job: Job, around: Around, sampler: Any) -> None:
        self._sampler = sampler
        self._launch = sampler.launch_sampling
        self._own = vars(sampler).get("launch_sampling")
        self._pass: tuple[Job, Around] | None = (job, around)

    def __call__(self, steps: int, func: Callable[[], Any]) -> Any:
        if self._pass is None:
            return self._launch(steps, func)
        (job, around), launch = self._pass, self._launch
        self.take_off()
        with refusals(), job.ended_by_errors():
            try:
                return launch(steps, lambda: around(func))
            except LoratorioError as problem:
                if hides_errors(job.p):
                    job.tell(str(problem))
                raise

    def take_off(self) -> None:
        self._pass = None
        if vars(self._sampler).get("launch_sampling") is self:
            del self._sampler.launch_sampling
            if self._own is not None:
                self._sampler.launch_sampling = self._own
