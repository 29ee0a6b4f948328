"""Samplers by the WebUI's names. Imports neither torch nor diffusers before one is made."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LoratorioError


@dataclass(frozen=True)
class Sampler:
    """A sampler as diffusers makes it. `scheduler`: the name of its class there."""

    name: str
    label: str
    scheduler: str
    options: Mapping[str, Any]

    def make(self, schedule: Mapping[str, Any]) -> Any:
        """A scheduler for a model of this schedule (`Checkpoint.schedule`). Raises LoratorioError if it knows no such schedules."""
        import diffusers

        scheduler = getattr(diffusers, self.scheduler)
        options = {**schedule, **self.options}
        known = inspect.signature(scheduler).parameters
        lacking = [name for name, value in options.items() if value and name not in known]
        if lacking:
            raise LoratorioError(
                f"{self.label} has no schedule like this model's ({', '.join(lacking)}). Choose another sampler."
            )
        return scheduler(**{name: value for name, value in options.items() if name in known})


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", "Euler", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
        Sampler("euler-a", "Euler a", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}),
        Sampler(
            "dpmpp-2m-karras",
            "DPM++ 2M Karras",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True, "timestep_spacing": "linspace"},
        ),
        Sampler("heun", "Heun", "HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
        Sampler("unipc", "UniPC", "UniPCMultistepScheduler", {"timestep_spacing": "linspace"}),
        Sampler(
            "ddim",
            "DDIM",
            "DDIMScheduler",
            {
                "timestep_spacing": "leading",
                "steps_offset": 1,
                "clip_sample": False,
                "set_alpha_to_one": False,
            },
        ),
    )
}


def find_sampler(name: str, called: str = "sampler") -> Sampler:
    """By name or label, in any case. Raises LoratorioError with the nearest name."""
    text = name.strip().lower()
    for sampler in SAMPLERS.values():
        if text in (sampler.name, sampler.label.lower()):
            return sampler
    near = difflib.get_close_matches(text, SAMPLERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise LoratorioError(f"{called} must be one of {', '.join(SAMPLERS)}, not {name!r}{hint}")
