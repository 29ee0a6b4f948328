"""What surrounds a WebUI's sampling loop: entered once for each pass, and then gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...job import Job
from ...refusal import refusals

Around = Callable[[Callable[[], Any]], Any]
"""Given the sampling loop, runs it and returns what it returns."""


def enclose(job: Job, around: Around) -> None:
    """Have `around` run the next sampling loop of the job's sampler.

    It runs one loop: a sampler may live longer than a pass (A1111's img2img makes one for all of a job's batches), and further loops
    are the WebUI's own until this is called again. Called twice before the loop (Forge's hires fix), the second call replaces the first.
    """
    sampler = job.p.sampler
    if isinstance(sampler.launch_sampling, _Enclosure):
        sampler.launch_sampling.take_off()
    sampler.launch_sampling = _Enclosure(job, around, sampler)


class _Enclosure:
    """Stands in the place of a sampler's `launch_sampling`. Afterwards it holds nothing, and passes calls on where it could not be
    taken off because another extension has wrapped it."""

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
            return launch(steps, lambda: around(func))

    def take_off(self) -> None:
        self._pass = None
        if vars(self._sampler).get("launch_sampling") is self:
            del self._sampler.launch_sampling
            if self._own is not None:
                self._sampler.launch_sampling = self._own
