"""One sampling pass of the WebUI, composed.

The WebUI's CFGDenoiser makes a step's rows (every image's conditional rows, then the unconditional ones), calls its
model wrapper on them in one or several parts, and combines what comes back. Here the rows are seen through the
`cfg_denoiser` callback, and the model wrapper is made to answer with composed rows; everything else of the step
(guidance, AND, masks, previews, refiner) stays the WebUI's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import LoratorioError
from ...prompt.admission import Admitted
from ...sampling.calls import Row, by_kind, predicted_by
from ...sampling.memory import measured_rows
from ...sampling.step import Step
from ..shared.pass_loras import PassLoras, ReadLora
from ..shared.sampling_pass import BYPASSED, SamplingPass
from ..shared.text import TextConditioning
from .conditioning import conditioning_under
from .loras import activated, restore_base, text_strength, unet_layers, unet_strength
from .rows import A1111Rows


@dataclass
class A1111Evaluation:
    """The state of one evaluation: the callback's parameters, the composed rows (R, C, H, W), and how many were requested."""

    params: Any
    answers: Tensor | None = None
    answered: int = 0


class A1111Pass(SamplingPass):
    """Composes one sampling of the job's sampler."""

    def __init__(self, source: PassLoras, admitted: Admitted[ReadLora]) -> None:
        from modules import shared

        # No more rows a call than the WebUI would give it when told to save memory.
        limit = 0 if shared.opts.batch_cond_uncond else max(1, len(source.p.prompts))
        super().__init__(source, admitted, limit)
        self._denoiser = self.p.sampler.model_wrap_cfg
        self._bound_to = shared.sd_model.sd_checkpoint_info  # the checkpoint that the LoRAs are attached to
        self._texts = self._text_conditioning()
        self._evaluation: A1111Evaluation | None = None
        self._model: Any = None  # the WebUI's model wrapper while it answers with our rows
        self._own_forward: Any = None
        self._given_up = False

    # -- what lasts for a model: once, and again when the refiner comes in --------------------------------------------

    def _attach(self) -> None:
        """Take the LoRAs off the current model's weights and attach them as the bank."""
        from modules import devices, shared

        layers = unet_layers(shared.sd_model)
        restore_base(layers)
        self.attachment.enter_context(self.engine.bank.attached(layers))
        self.engine.bank.prepare(devices.device, devices.dtype_inference)

    def _text_conditioning(self) -> TextConditioning:
        active = [lora.active for lora in self.loras]
        return TextConditioning(
            [lora.text is not None for lora in self.loras],
            partial(conditioning_under, self.source, active, [*map(text_strength, active)]),
            # What it has may be a former file's (`forget_former_files`).
            host_has_merged=self.all_take_part and not any(lora.text is not None for lora in self.loras),
        )

    def _follow_refiner(self) -> None:
        """Attach the same LoRAs to the refiner that was loaded."""
        from modules import shared

        self.attachment.close()
        self.loras = self.source.on_refiner([lora.active for lora in self.loras], self.loras)
        self.engine.rebind(self.bank())
        self._bound_to = shared.sd_model.sd_checkpoint_info
        self._texts = self._text_conditioning()
        self._attach()

    def _sampler_args(self) -> dict[str, Any]:
        """The arguments that the WebUI's sampler gives its denoiser at every step."""
        args: dict[str, Any] = self.p.sampler.sampler_extra_args
        return args

    # -- the sampling loop --------------------------------------------------------------------------------------------

    @contextmanager
    def enclosed(self) -> Iterator[None]:
        from modules import script_callbacks

        self._attach()
        script_callbacks.on_cfg_denoiser(self._before_evaluation)
        try:
            yield
        finally:
            script_callbacks.remove_callbacks_for_function(self._before_evaluation)
            self._unwrap()

    def missed(self) -> None:
        if not self._given_up:
            super().missed()

    def _before_evaluation(self, params: Any) -> None:
        """The `cfg_denoiser` callback: a step begins. Other extensions may still change `params`: read it later."""
        if params.denoiser is self._denoiser:
            self._evaluation = A1111Evaluation(params)
            self._wrap(self._denoiser.inner_model)

    def _wrap(self, model: Any) -> None:
        """Answer instead of the sampler's model wrapper. The refiner has a new one."""
        if model is not self._model:
            self._unwrap()
            self._model, self._own_forward = model, vars(model).get("forward")
            model.forward = partial(self._answer, model.forward)

    def _unwrap(self) -> None:
        if self._model is not None:
            del self._model.forward
            if self._own_forward is not None:
                self._model.forward = self._own_forward
            self._model = None

    def _answer(self, model: Callable[..., Tensor], x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """Called by the WebUI instead of its model, with the next `len(x)` rows of the step.

        x: (R, C, H, W). Returns the same kind as the model: denoised latents, or noise for a timestep sampler.
        """
        evaluation = self._evaluation
        if evaluation is None:
            raise LoratorioError(BYPASSED)
        if evaluation.answers is None and not self._given_up:
            evaluation.answers = self._composed(model, evaluation.params)
        if evaluation.answers is None:
            return model(x, sigma, **kwargs)
        answer = evaluation.answers[evaluation.answered : evaluation.answered + len(x)]
        if answer.shape != x.shape:
            raise LoratorioError(BYPASSED)
        evaluation.answered += len(x)
        return answer.to(x.dtype)

    def _composed(self, model: Callable[..., Tensor], params: Any) -> Tensor | None:
        """The step's composed rows, conditional ones first, (R, C, H, W); None if the pass is left to the WebUI."""
        from modules import shared

        if shared.sd_model.sd_checkpoint_info != self._bound_to:
            self._follow_refiner()
        rows = A1111Rows.of(
            params, self._denoiser, self._sampler_args(), self._texts, self.place_in_sampling()
        )
        trouble = rows.trouble()
        if trouble and self.evaluations:
            raise LoratorioError(trouble)
        if trouble:
            self._give_up(trouble)
            return None
        size = (self._bound_to.filename, tuple(params.x.shape[1:]), params.x.dtype)
        self.engine.calls.memory = measured_rows(params.x.device, size, len(params.x))
        # Only here: between the steps, other extensions must find the same LoRAs activated as without LoRAtorio.
        with activated(()):
            composition = self.engine.step(
                self._at_strengths(rows.step()), partial(self._predict, model, rows)
            )
        self.owners = rows.owners
        self.evaluations += 1
        parts = [composition.cond] if composition.uncond is None else [composition.cond, composition.uncond]
        return torch.cat(parts)

    def _at_strengths(self, step: Step) -> Step:
        """The step with the LoRAs' present strengths, which extensions may change from step to step."""
        strengths = tuple(unet_strength(lora.active) for lora in self.loras)
        self.saw_strengths(strengths)
        gone = (i for i, lora in enumerate(self.loras) if strengths[i] == 0 and lora.text is None)
        return replace(step, strengths=strengths, absent=frozenset(gone), painted=self.painted)

    def _predict(self, model: Callable[..., Tensor], step_rows: A1111Rows, rows: Sequence[Row]) -> Tensor:
        """The WebUI's model on any rows of the step; rows whose text is of different length go in calls of their own."""
        lengths = [step_rows.tokens(row) for row in rows]

        def run(numbers: Sequence[int]) -> Tensor:
            x, sigma, cond = step_rows.inputs([rows[number] for number in numbers])
            return model(x, sigma, cond=cond)

        return predicted_by(by_kind(lengths, run), self.engine.bank)

    def _give_up(self, why: str) -> None:
        """Before the first step is made: leave the whole pass to the WebUI's own merging."""
        self.attachment.close()
        self._given_up = True
        self.job.note(why)
