"""What the WebUI script asks of a host."""

from __future__ import annotations

import traceback
from typing import Any, Protocol

from ...job import Job
from ...refusal import refusals


class WebUIHost(Protocol):
    """A WebUI, as the script sees it.

    A WebUI prints exceptions of a script's event methods and goes on: an error must not leave this method, but
    come from inside the sampling itself, where it stops the job with its sentence.
    """

    name: str

    def before_sampling(self, job: Job) -> None:
        """`job.p.sampler` is about to sample: once a pass, so twice with hires fix."""


def refuse(p: Any, problem: Exception) -> None:
    """Make the job `p` stop with `problem` as soon as it would sample.

    An exception in a script's event is only printed by the WebUI, and the picture would be another than asked for. One
    out of the sampling stops the job, is shown on the page, and is answered by the API: with status 422 and the sentence
    for a LoratorioError, with 500 for anything else.
    """

    # Its frames hold LoRAs, and `p`, which holds it, may last for long.
    traceback.clear_frames(problem.__traceback__)

    def stop(*args: Any, **kwargs: Any) -> None:
        with refusals():
            raise problem

    p.sample = stop
    # Before the LoRAs are activated, too: what other extensions make of them then would wait for a sampling that never comes.
    p.parse_extra_network_prompts = stop
    # Within `p.sample` it is too late for that; the pass itself is yet to come.
    if getattr(p, "sampler", None) is not None:
        p.sampler.launch_sampling = p.sampler.sample = p.sampler.sample_img2img = stop
