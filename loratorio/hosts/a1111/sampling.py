"""One sampling pass of the WebUI, composed.

The WebUI's CFGDenoiser makes a step's rows (every image's conditional rows, then the unconditional ones), calls its
model wrapper on them in one or several parts, and combines what comes back. Here the rows are seen through the
`cfg_denoiser` callback, and the model wrapper is made to answer with composed rows; everything else of the step
(guidance, AND, masks, previews, refiner) stays the WebUI's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...adapters.bank import Bank
from ...compose.importance import importance, without_words
from ...engine import Engine, Row, WeightHistory
from ...errors import LoratorioError
from ...pool import Candidates
from ...roles import Player, cast_of, parts_of, recognised_note, trigger_words
from ..base import ALL_ALWAYS, BYPASSED, ComposedPass, Job, answerable
from .conditioning import Prompts, TextConditioning, encoded
from .loras import (
    Network,
    activated,
    adapter_of,
    identity,
    lora_extension,
    name_of,
    players,
    restore_base,
    unet_layers,
)
from .neighbours import obstacle, remarks
from .rows import StepRows

Result = TypeVar("Result")


class ComposedSampling:
    """Composes what `sampler` samples. Make one per pass; `run` encloses the WebUI's sampling loop."""

    def __init__(self, job: Job, sampler: Any) -> None:
        self._job = job
        self._p = job.p
        self._sampler = sampler
        self._denoiser = sampler.model_wrap_cfg
        self._loras: tuple[Network, ...] = ()
        self._left_out = False
        self._attachment = ExitStack()
        self._engine: Engine | None = None
        self._model: Any = None
        self._own_forward: Any = None
        self._params: Any = None
        self._answers: Tensor | None = None
        self._answered = 0
        self._owners: tuple[int, ...] = ()
        self._steps_composed = 0
        self._given_up = False

    def run(self, sample: Callable[[], Result]) -> Result:
        """`sample()`, composed where that is possible and with the WebUI's own merging where it is not.

        Raises:
            LoratorioError: the picture would not be what was asked for.
        """
        try:
            return self._run(sample)
        except LoratorioError as problem:
            raise answerable(problem) from problem.__cause__

    def _run(self, sample: Callable[[], Result]) -> Result:
        from modules.sd_samplers_common import InterruptedException

        self._loras = tuple(lora_extension().loaded_networks)
        known = players(self._p, self._loras)
        why_not = obstacle(self._p, self._loras)
        if why_not and any(player.is_candidate for player in known):
            raise LoratorioError(
                f"{why_not} With a pool that is no picture of use: take the pool out of the prompt."
            )
        if why_not:
            self._job.note(why_not)
            return sample()
        known = self._without_misfits(known)
        self._cast = cast_of(known, self._importance(known))
        for remark in (*remarks(self._p), recognised_note(parts_of(known))):
            if remark:
                self._job.note(remark)
        if not self._cast.solos:
            self._job.note(ALL_ALWAYS)
            return sample()
        first_step = self._denoiser.step
        with ExitStack() as undo:
            undo.callback(self._attachment.close)
            self._bind()
            undo.enter_context(self._listening())
            undo.enter_context(self._refiner_conditioned())
            try:
                result = sample()
            except InterruptedException:  # the WebUI makes a picture of what there is
                if self._steps_composed:
                    self._job.passes.append(self._account())
                raise
        if not self._given_up:
            if self._steps_composed != self._denoiser.step - first_step:
                raise LoratorioError(BYPASSED)
            self._job.passes.append(self._account())
        return result

    def _without_misfits(self, known: list[Player]) -> list[Player]:
        """Leave out the candidates of a pool that this model has no use for; the page says which."""
        from modules import shared

        if not any(player.is_candidate for player in known):
            return known
        layers = unet_layers(shared.sd_model)
        restore_base(layers)
        self._model_info = shared.sd_model.sd_checkpoint_info
        fitting: list[tuple[Network, Player]] = []
        skipped: list[tuple[str, str]] = []
        for lora, player in zip(self._loras, known, strict=True):
            try:
                self._adapter(lora, layers, is_refiner=False)
            except LoratorioError as problem:
                if not player.is_candidate:
                    raise
                skipped.append((player.name, str(problem)))
            else:
                fitting.append((lora, player))
        if not fitting:
            raise LoratorioError("No LoRA of the pool fits this model: choose another folder or pattern.")
        if skipped:
            self._job.note(Candidates((), tuple(skipped)).note)
            self._left_out = True
        self._loras = tuple(lora for lora, _ in fitting)
        return [player for _, player in fitting]

    def _importance(self, known: Sequence[Player]) -> dict[int, float] | None:
        """By LoRA, how much its trigger words matter in the prompt; only asked for by the method that uses it."""
        if self._job.settings.method != "w_composite":
            return None
        prompt = (self._p.hr_prompts if self._p.is_hr_pass else self._p.prompts)[0]
        words = {i: trigger_words(player.metadata, prompt) for i, player in enumerate(known)}
        told = [i for i, own in words.items() if own]
        if not told:
            return None
        tokens = encoded([prompt, *(without_words(prompt, words[i]) for i in told)])
        return dict(zip(told, importance(tokens[0], tokens[1:]), strict=True))

    # -- what lasts for a model: once, and again when the refiner comes in ---------------------------------------

    def _bind(self) -> None:
        """Take the LoRAs off the current model and attach them as the bank."""
        from modules import shared

        self._attachment.close()
        is_refiner = self._engine is not None
        self._model_info = shared.sd_model.sd_checkpoint_info
        self._attachment.enter_context(activated(()))
        layers = unet_layers(shared.sd_model)
        restore_base(layers)
        bank = Bank([self._adapter(lora, layers, is_refiner) for lora in self._loras])
        if self._engine is not None:
            bank.plan_limit = self._engine.bank.plan_limit
            self._engine.bank = bank
        else:
            self._engine = Engine(self._job.settings, bank, self._cast, self._row_limit())
        self._attachment.enter_context(bank.attached(layers))
        args = self._sampler_args()
        # What the WebUI made with all of the prompt's LoRAs is of use unless some of them were left out.
        merged = None if self._left_out else Prompts(args["cond"], args["uncond"])
        self._texts = TextConditioning(self._p, self._loras, merged)

    def _adapter(self, lora: Network, layers: Any, is_refiner: bool) -> Any:
        """The LoRA's adapter; kept for the job's other batches, since some kinds take seconds to make."""
        key = ("adapter", identity(lora), self._model_info.filename)
        if key not in self._job.scratch:
            adapter = adapter_of(lora, layers, skip_misfits=is_refiner)
            adapter.check_finite()
            self._job.scratch[key] = adapter
        return self._job.scratch[key]

    def _row_limit(self) -> int:
        """Rows a model call may have: no more than the WebUI would give it when told to save memory."""
        from modules import shared

        return 0 if shared.opts.batch_cond_uncond else max(1, len(self._p.prompts))

    def _sampler_args(self) -> dict[str, Any]:
        """What the WebUI's sampler hands to its denoiser at every step."""
        args: dict[str, Any] = self._sampler.sampler_extra_args
        return args

    @contextmanager
    def _refiner_conditioned(self) -> Iterator[None]:
        """When the refiner comes in, the WebUI makes its conditioning anew: with the prompt's LoRAs, as it does without us."""
        set_up = self._p.setup_conds

        def set_up_with_loras() -> None:
            with activated(self._loras):
                set_up()

        self._p.setup_conds = set_up_with_loras
        try:
            yield
        finally:
            del self._p.setup_conds

    # -- what lasts for a step -----------------------------------------------------------------------------------

    @contextmanager
    def _listening(self) -> Iterator[None]:
        from modules import script_callbacks

        script_callbacks.on_cfg_denoiser(self._see)
        try:
            yield
        finally:
            script_callbacks.remove_callbacks_for_function(self._see)
            self._unwrap()

    def _see(self, params: Any) -> None:
        """The `cfg_denoiser` callback: a step begins. Other extensions may still change `params`: read it later."""
        if params.denoiser is self._denoiser:
            self._params, self._answers, self._answered = params, None, 0
            self._wrap(self._denoiser.inner_model)

    def _wrap(self, model: Any) -> None:
        """Answer in the place of the sampler's model wrapper. The refiner brings a new one."""
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
        """Called by the WebUI in the place of its model, with the next `len(x)` rows of the step."""
        if self._params is None:
            raise LoratorioError(BYPASSED)
        if self._answers is None and not self._given_up:
            self._compose_step(model)
        if self._given_up:
            return model(x, sigma, **kwargs)
        assert self._answers is not None
        answer = self._answers[self._answered : self._answered + len(x)]
        if answer.shape != x.shape:
            raise LoratorioError(BYPASSED)
        self._answered += len(x)
        return answer.to(x.dtype)

    def _compose_step(self, model: Callable[..., Tensor]) -> None:
        from modules import shared

        if shared.sd_model.sd_checkpoint_info != self._model_info:
            self._bind()
        rows = StepRows.of(self._params, self._denoiser, self._sampler_args(), self._texts)
        trouble = rows.trouble()
        if trouble and self._steps_composed:
            raise LoratorioError(trouble)
        if trouble:
            self._give_up(trouble)
            return
        assert self._engine is not None
        composition = self._engine.step(rows.step(), partial(self._predict, model, rows))
        self._owners = rows.owners
        parts = [composition.cond] if composition.uncond is None else [composition.cond, composition.uncond]
        self._answers = torch.cat(parts)
        self._steps_composed += 1

    def _predict(self, model: Callable[..., Tensor], step_rows: StepRows, rows: Sequence[Row]) -> Tensor:
        """The WebUI's model on any rows of the step; rows whose text is of different length go in calls of their own."""
        lengths = [step_rows.tokens(row) for row in rows]
        if len(set(lengths)) == 1:
            x, sigma, cond = step_rows.inputs(rows)
            return model(x, sigma, cond=cond)
        assert self._engine is not None
        predicted: dict[int, Tensor] = {}
        for length in dict.fromkeys(lengths):
            numbers = [number for number, each in enumerate(lengths) if each == length]
            part = [rows[number] for number in numbers]
            with self._engine.bank.routed([row.mix for row in part]):
                predicted.update(zip(numbers, self._predict(model, step_rows, part), strict=True))
        return torch.stack([predicted[number] for number in range(len(rows))])

    def _give_up(self, why: str) -> None:
        """Before the first step is made: leave the whole pass to the WebUI's own merging."""
        self._attachment.close()
        self._given_up = True
        self._job.note(why)

    def _account(self) -> ComposedPass:
        composed = [self._loras[number] for number in self._cast.number_of_solo]
        return ComposedPass(
            loras=tuple(map(name_of, composed)),
            strengths=tuple(float(lora.unet_multiplier) for lora in composed),
            batch=self._p.iteration,
            hires=bool(self._p.is_hr_pass),
            history=self._engine.history if self._engine else WeightHistory(),
            owners=self._owners,
        )
