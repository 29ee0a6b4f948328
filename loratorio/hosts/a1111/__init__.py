"""AUTOMATIC1111's WebUI 1.8 to 1.10.

Where it hooks in: `process_before_every_sampling` hands over the pass's sampler, whose `launch_sampling` encloses the
sampling loop and nothing else. Inside, the LoRAs are taken off the model, each row gets its own from the bank, and the
sampler's model wrapper answers with composed rows. One `finally` puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...job import Job
from ..shared.enclosure import enclose
from .pass_loras import A1111Loras
from .sampling import A1111Pass


class A1111:
    """The WebUI as `scripts/loratorio_script.py` sees it (see `loratorio.hosts.shared.host.WebUIHost`)."""

    name = "AUTOMATIC1111"

    def before_sampling(self, job: Job) -> None:
        def composed(sample: Callable[[], Any]) -> Any:
            loras = A1111Loras(job)
            admitted = loras.admit()
            return sample() if admitted is None else A1111Pass(loras, admitted).run(sample)

        enclose(job, composed)


HOST = A1111()
