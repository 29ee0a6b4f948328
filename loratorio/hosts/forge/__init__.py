"""The Forge family: Forge Neo, Forge (2025) and reForge.

Where it hooks in: `process_before_every_sampling` comes just before the host loads its UNet patcher. There the patcher is
replaced by a clone without LoRA patches, which carries one `sampler_pre_cfg_function`. At every evaluation of the model
that function learns which rows the host is about to run and puts itself in the place of the model; the host gets composed
rows back. The sampler's `launch_sampling` encloses the sampling loop: one `finally` there puts everything back.
"""

from __future__ import annotations

from ...job import Job
from ..shared.host import refuse
from .pass_loras import ForgeLoras
from .sampling import ForgePass
from .variants import Variant, variant


class Forge:
    """The WebUI as `scripts/loratorio_script.py` sees it (see `loratorio.hosts.shared.host.WebUIHost`)."""

    def __init__(self, member: Variant | None = None) -> None:
        self._variant = member or variant()
        self.name = self._variant.name

    def before_sampling(self, job: Job) -> None:
        try:
            with job.ended_by_errors():
                self._variant.forget_files()
                loras = ForgeLoras(job, self._variant)
                admitted = loras.admit()
                if admitted is not None:
                    ForgePass(loras, admitted, self._variant).install()
        except Exception as problem:
            refuse(job.p, problem, job.tell)


HOST = Forge()
