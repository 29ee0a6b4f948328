"""The denoising loop.

The model's prediction is composed as noise e (eps models) or as denoised latents D (v models), then given back to the
sampler as what it expects. Letters in shapes: B images, C channels, H×W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

from ..compose.guidance import guide
from ..compose.methods import Composition
from ..sampling.calls import Row
from ..sampling.engine import Predict
from ..sampling.step import Step
from .samplers import Sampler

Compose = Callable[[Step, Predict], Composition]
RunModel = Callable[[Tensor, Any, Sequence[Row]], Tensor]
"""(scaled latents (B, C, H, W), timestep, rows) to the model's raw predictions of the rows, float32."""


@dataclass(frozen=True)
class SamplingSchedule:
    """A scheduler whose timesteps are set, of which the last `steps` steps are sampled. Heun evaluates the model twice in each but the
    last."""

    scheduler: Any
    steps: int

    @classmethod
    def of(
        cls, sampler: Sampler, schedule: Mapping[str, Any], steps: int, strength: float, device: Any
    ) -> SamplingSchedule:
        """`strength` 1 samples all steps; less, as for img2img, only the last part of them, at least one."""
        scheduler = sampler.make(schedule)
        scheduler.set_timesteps(steps, device=device)
        whole = -(-len(scheduler.timesteps) // scheduler.order)
        made = cls(scheduler, whole if strength >= 1 else max(1, int(steps * strength)))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(made._first)
        return made

    @property
    def per_step(self) -> int:
        """Evaluations of the model in each step but the last, which has one."""
        return int(self.scheduler.order)

    @property
    def timesteps(self) -> Tensor:
        """One for each evaluation."""
        return self.scheduler.timesteps[self._first :]  # type: ignore[no-any-return]

    @property
    def _first(self) -> int:
        return len(self.scheduler.timesteps) - (self.per_step * (self.steps - 1) + 1)

    def start(self, noise: Tensor, picture: Tensor | None) -> Tensor:
        """The first noisy latents, of noise alone or of a picture's latents with noise."""
        if picture is None:
            return noise * self.scheduler.init_noise_sigma  # type: ignore[no-any-return]
        times = self.timesteps[:1].repeat(len(noise))
        return self.scheduler.add_noise(picture, noise, times)  # type: ignore[no-any-return]

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """(α, σ) of the model's input x = α·x₀ + σ·e at evaluation `index` of those sampled."""
        if hasattr(self.scheduler, "sigmas"):
            sigma = float(self.scheduler.sigmas[self._first + index])
            alpha = (sigma**2 + 1) ** -0.5
            return alpha, sigma * alpha
        kept = float(self.scheduler.alphas_cumprod[int(self.timesteps[index])])
        return kept**0.5, (1 - kept) ** 0.5


def denoise(
    schedule: SamplingSchedule,
    latents: Tensor,
    generators: Sequence[torch.Generator],
    cfg: float,
    compose: Compose,
    run: RunModel,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample along the schedule.

    Args:
        latents: where it starts, (B, C, H, W) float32.
        generators: one per image, for samplers that add noise.
        cfg: guidance scale s; at 1 no unconditional rows are run.
        compose: brings a step's rows together.
        run: runs the model.
        progress: told (steps done, all steps) at the start and after each step.

    Returns:
        Clean latents (B, C, H, W).
    """
    v_model = schedule.scheduler.config.prediction_type == "v_prediction"
    step_options = _step_options(schedule.scheduler, generators)
    if progress is not None:
        progress(0, schedule.steps)
    for evaluation, time in enumerate(schedule.timesteps):
        scaled: Tensor = schedule.scheduler.scale_model_input(latents, time)
        alpha, sigma = schedule.alpha_sigma(evaluation)
        index = evaluation // schedule.per_step

        step = Step(
            index=index,
            total=schedule.steps,
            # z of a v model on the scale of D, so that z − D points along e.
            latents=scaled / alpha if v_model else latents,
            uncond_count=0 if cfg == 1 else len(latents),
            denoised=v_model,
            sigma=sigma / alpha,
            guidance=cfg,
        )
        predict = partial(run, scaled, time)
        if v_model:
            predict = partial(_denoised_of_v, predict, scaled, alpha, sigma)
        composition = compose(step, predict)
        guided = (
            composition.cond
            if composition.uncond is None
            else guide(composition.cond, composition.uncond, cfg)
        )
        if v_model:
            guided = (alpha * scaled - guided) / sigma
        stepped: Tensor = schedule.scheduler.step(guided, time, latents, **step_options).prev_sample
        latents = stepped
        if progress is not None:
            progress(index + 1, schedule.steps)
    return latents


def _denoised_of_v(
    predict: Predict, scaled: Tensor, alpha: float, sigma: float, rows: Sequence[Row]
) -> Tensor:
    """D = α·x − σ·v of the rows' v predictions; x is the model's input of the row's slot."""
    return alpha * scaled[[row.slot for row in rows]] - sigma * predict(rows)


def _step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    takes_noise = isinstance(scheduler, EulerAncestralDiscreteScheduler)
    return {"generator": list(generators)} if takes_noise else {}
