"""The Forge family: Forge Neo, Forge (2025) and reForge.

Where it hooks in: `process_before_every_sampling` comes just before the host loads its UNet patcher. There the patcher is
replaced by a clone without LoRA patches, which carries one `sampler_pre_cfg_function`. At every evaluation of the model
that function learns which rows the host is about to run and puts itself in the place of the model; the host gets composed
rows back. The sampler's `launch_sampling` encloses the sampling loop: one `finally` there puts everything back.
"""

from __future__ import annotations

from typing import Any

from ...errors import LoratorioError
from ..base import Job
from .flavours import flavour
from .sampling import ComposedSampling


class Forge:
    """The WebUI as `scripts/loratorio_script.py` sees it (see `loratorio.hosts.base.WebUIHost`)."""

    def __init__(self) -> None:
        self._flavour = flavour()
        self.name = self._flavour.name

    def process_batch(self, job: Job) -> None:
        """Nothing to do: text conditioning is made when a pass is about to sample."""

    def before_sampling(self, job: Job) -> None:
        try:
            ComposedSampling(job, self._flavour).install()
        except Exception as problem:
            _stop(job.p.sampler, problem)


def _stop(sampler: Any, problem: Exception) -> None:
    """Let the sampler raise `problem` as soon as it would sample: an exception raised here would only be printed."""
    if isinstance(problem, LoratorioError):
        problem.status_code = 422  # type: ignore[attr-defined]
        problem.detail = str(problem)  # type: ignore[attr-defined]

    def launch_sampling(*args: Any, **kwargs: Any) -> None:
        raise problem

    sampler.launch_sampling = launch_sampling


HOST = Forge()
