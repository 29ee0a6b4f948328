"""The interface between the WebUI script and a host."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, Protocol

from ...job import Job
from ...refusal import refusals
from .other_extensions import hides_errors


class WebUIHost(Protocol):
    """A WebUI, for the script.

    A WebUI prints exceptions of a script's event methods and continues. So an error must not leave this method; it must
    come from inside the sampling itself, where it stops the job with its sentence.
    """

    name: str

    def before_sampling(self, job: Job) -> None:
        """Called before `job.p.sampler` samples: once per pass, so twice with hires fix."""


def refuse(p: Any, problem: Exception, tell: Callable[[str], None]) -> None:
    """Make the job `p` stop with `problem` as soon as it would sample. Where that would not be seen, `tell` the sentence too.

    The WebUI only prints an exception in a script's event, and the picture would not be the requested one. An exception
    in the sampling stops the job, is shown on the page, and is answered by the API: with status 422 and the sentence
    for a LoratorioError, with 500 for anything else.
    """

    # Its frames hold LoRAs, and `p`, which keeps the exception, may live long.
    traceback.clear_frames(problem.__traceback__)

    def stop(*args: Any, **kwargs: Any) -> None:
        if hides_errors(p):
            tell(str(problem))
        with refusals():
            raise problem

    p.sample = stop
    # Also before the LoRAs are activated: other extensions' changes to them would wait for a sampling that never comes.
    p.parse_extra_network_prompts = stop
    # Inside `p.sample` it is too late for that, but the pass itself has not started.
    if getattr(p, "sampler", None) is not None:
        p.sampler.launch_sampling = p.sampler.sample = p.sampler.sample_img2img = stop
