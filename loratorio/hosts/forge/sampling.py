"""One sampling pass of a Forge, composed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...compose.methods import Composition
from ...errors import LoratorioError
from ...prompt.admission import Admitted
from ...sampling.calls import ModelCall, Row, predicted_by
from ...sampling.step import Step
from ..shared.enclosure import enclose
from ..shared.pass_loras import REFINER_WITHOUT, PassLoras, ReadLora
from ..shared.sampling_pass import BYPASSED, SamplingPass
from ..shared.text import TEXTS, TextConditioning
from .conditioning import conditioning_under, forget_conditioning
from .loras import layers_of
from .rows import MARK, Call, ForgeRows
from .variants import Patcher, Variant

REFINER_MERGED = "The refiner's steps were not composed: its LoRAs are merged."


def replaced_note(names: Sequence[str]) -> str:
    """The note about LoRAs whose files have changed since the host applied them to its model."""
    one = len(names) == 1
    return (
        f"The {'file of LoRA' if one else 'files of LoRAs'} {', '.join(names)} {'has' if one else 'have'} changed on disk since "
        f"the WebUI read {'it' if one else 'them'}. From now on the new contents are used."
    )


class Hook:
    """The function in the clone's model options. Hosts copy it with the patcher; it stays the same object."""

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        self.function: Callable[..., tuple[Any, ...]] | None = function

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self.function(*args) if self.function else args

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self


class UnetClone:
    """A clone of the model's UNet patcher without LoRAs, for the model until it is given back.

    Args:
        before_evaluation: called when the host is about to run conditions on it. numbers: how many the LoRAs have, in its dtype.
    """

    def __init__(
        self, variant: Variant, sd_model: Any, before_evaluation: Callable[..., Any], numbers: int
    ) -> None:
        self._before: Patcher = sd_model.forge_objects.unet
        self.patcher = variant.without_loras(self._before, sd_model)
        self._hook = Hook(variant.hook(before_evaluation))
        self._option = variant.hook_option
        hooks = self.patcher.model_options.get(self._option, [])
        # A host may call us twice for one pass, our clone of the first time being in place.
        kept = [hook for hook in hooks if not isinstance(hook, Hook)]
        self.patcher.model_options[self._option] = [*kept, self._hook]
        self.dtype = variant.computation_dtype(self.patcher)
        self.patcher.add_extra_preserved_memory_during_sampling(numbers * self.dtype.itemsize)

    def come_last(self, options: dict[str, Any]) -> None:
        """What another extension's function in these model options does to the rows is done before we look at them."""
        hooks = options.get(self._option, [])
        if self._hook in hooks:
            options[self._option] = [*(hook for hook in hooks if hook is not self._hook), self._hook]

    def give_back(self, objects: Any) -> None:
        """In a model's objects, put back what was there before."""
        self._hook.function = None
        if objects.unet is self.patcher:
            objects.unet = self._before


@dataclass
class ForgeEvaluation:
    """The state of one evaluation of the model.

    Attributes:
        rows: the host's. step: the engine's step for them. composition: its composed predictions.
        waiting: marks of the blocks that the host has not requested yet. A repeated request runs the model once more.
    """

    rows: ForgeRows
    step: Step
    waiting: set[int]
    composition: Composition | None = None


class ForgePass(SamplingPass):
    """Composes the next sampling of the job's sampler, after `install`."""

    def __init__(self, source: PassLoras, admitted: Admitted[ReadLora], variant: Variant) -> None:
        super().__init__(source, admitted)
        self._variant = variant
        self._functions = variant.sampling()
        self._replaced = [lora.name for lora in self.loras if lora.was_replaced]
        if self._replaced:
            TEXTS.forget()
        self._texts = self._text_conditioning()
        self._unet = self._without_loras()
        self._evaluation: ForgeEvaluation | None = None
        self._evaluated_at = -1  # the denoiser's step
        self._refiner_note = REFINER_MERGED

    def install(self) -> None:
        """Replace the pass's UNet by a clone without LoRAs, and enclose the sampling loop."""
        if self._replaced:
            self.job.note(replaced_note(self._replaced))
        self.p.sd_model.forge_objects.unet = self._unet.patcher
        enclose(self.job, self.run)

    # -- what lasts for a model: once, and again when the refiner comes in --------------------------------------------

    def _text_conditioning(self) -> TextConditioning:
        """Text conditioning under every mix. Made before the UNet is loaded: on a small GPU the text encoder would evict it."""
        merged_text = self._variant.text_sees_pictures()
        texts = TextConditioning(
            [lora.text is not None and not merged_text for lora in self.loras],
            partial(conditioning_under, self.source, self.loras, self._variant),
            host_has_merged=(self.all_take_part and not self._replaced) or merged_text,
        )
        texts.prepare(self.engine.branches_ahead(self.p.steps, self._guidance() != 1), self.engine.words)
        return texts

    def _without_loras(self) -> UnetClone:
        return UnetClone(self._variant, self.p.sd_model, self._before_evaluation, self.engine.bank.numbers)

    def _give_back_unet(self, objects: Any) -> None:
        self._end_evaluation()
        self._unet.give_back(objects)

    def _attach(self) -> None:
        bank, unet = self.engine.bank, self._unet.patcher
        self.attachment.enter_context(bank.attached(layers_of(bank.adapters, unet)))
        guard = unet.model.diffusion_model.register_forward_pre_hook(self._refuse_unrouted)
        self.attachment.callback(guard.remove)
        self._unet.come_last(self.p.sd_model.forge_objects.unet.model_options)
        bank.prepare(unet.load_device, self._unet.dtype)

    def _refuse_unrouted(self, *args: Any) -> None:
        """Before each call of the model: a call that bypasses LoRAtorio would be the base's, without any LoRA."""
        if not self.engine.bank.is_routed:
            raise LoratorioError(BYPASSED)

    def _follow_refiner(self, objects: Any) -> None:
        """Compose on the host's present model. LoRAs that do not match it have no effect there, as without LoRAtorio."""
        self.attachment.close()
        self._give_back_unet(objects)  # the host may keep the first model in memory
        taking_part = {lora.active.source for lora in self.loras}
        active = [lora for lora in self.source.active() if lora.source in taking_part]
        if self.source.obstacle() or len(active) != len(self.loras):
            return
        loras = self.source.on_refiner(active, self.loras)
        if not any(lora.adapter.deltas or lora.text is not None for lora in loras):
            self._refiner_note = REFINER_WITHOUT
            return
        self.loras = loras
        self.engine.rebind(self.bank())
        self._texts = self._text_conditioning()
        self._unet = self._without_loras()
        self.p.sd_model.forge_objects.unet = self._unet.patcher
        self._attach()

    # -- the sampling loop --------------------------------------------------------------------------------------------

    @contextmanager
    def enclosed(self) -> Iterator[None]:
        denoiser, sd_model = self.p.sampler.model_wrap_cfg, self.p.sd_model
        objects = sd_model.forge_objects
        update = denoiser.update_inner_model
        is_own = "update_inner_model" in vars(denoiser)

        def update_and_follow() -> None:
            # The host has changed the model, and has not loaded the new one's weights yet.
            update()
            self._follow_refiner(objects)

        denoiser.update_inner_model = update_and_follow
        try:
            self._attach()
            yield
        finally:
            del denoiser.update_inner_model
            if is_own:
                denoiser.update_inner_model = update
            self._give_back_unet(self.p.sd_model.forge_objects)
            if self._replaced:
                self._variant.forget_loras(sd_model)
                forget_conditioning(self.p)

    def missed(self) -> None:
        came_in = self.p.sd_model.forge_objects.unet.model is not self._unet.patcher.model
        if not came_in and not self.p.extra_generation_params.get("Refiner"):
            super().missed()
        self.job.note(self._refiner_note)

    def _before_evaluation(
        self,
        model: Any,
        cond: list[Any],
        uncond: list[Any] | None,
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> tuple[Any, ...]:
        """The host is about to run these conditions on `x` (B, C, H, W): mark them, and answer instead of the model."""
        denoiser = self.p.sampler.model_wrap_cfg
        self._end_evaluation()
        if self._evaluated_at == denoiser.step:  # an evaluation inside another extension's function
            raise LoratorioError(BYPASSED)
        self._evaluated_at = denoiser.step
        rows = ForgeRows(self._functions, self._texts, denoiser.step, cond, uncond, x, sigma)
        step = replace(rows.step(self.place_in_sampling(), self._guidance()), painted=self.painted)
        self._evaluation = ForgeEvaluation(rows, step, rows.mark())
        self.evaluations += 1
        inner = options.get("model_function_wrapper")
        answer = partial(self._answer, model, inner)
        return model, cond, uncond, x, sigma, {**options, "model_function_wrapper": answer}

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.rows.unmark()
        self._evaluation = None

    def _guidance(self) -> float:
        """The CFG scale of this pass."""
        own = getattr(self.p, "hr_cfg", None) if self.job.is_hires else None
        return float(self.p.cfg_scale if own is None else own)

    def _answer(self, model: Any, inner: Any, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """The composed denoised rows (R, C, H, W) of the requested blocks. The step's first call composes all of them.

        A guidance extension that runs the model once more gets the same blocks, run with its inputs and the step's weights.
        """
        c = dict(args["c"])
        marks, evaluation = c.pop(MARK, None), self._evaluation
        asked = None if evaluation is None else evaluation.rows.blocks_in(marks, args["input"])
        if evaluation is None or asked is None:
            raise LoratorioError(BYPASSED)

        def run(call: Call) -> Tensor:
            if inner is None:
                return apply_model(call.x, call.sigma, **call.c)  # type: ignore[no-any-return]
            kinds = call.cond_or_uncond
            own = {"input": call.x, "timestep": call.sigma, "c": call.c, "cond_or_uncond": kinds}
            return inner(apply_model, own)  # type: ignore[no-any-return]

        rows, options = evaluation.rows, c["transformer_options"]
        self.engine.calls.one_mix = inner is not None or _has_functions(options)
        if evaluation.composition is None:
            self.engine.calls.memory = DeclaredRows(self._variant, model, rows)
            predict = partial(self._predict, rows, options, run)
            evaluation.composition = self.engine.step(evaluation.step, predict)
            self.owners = evaluation.step.owners
        composition = evaluation.composition
        if evaluation.waiting.issuperset(asked):
            evaluation.waiting.difference_update(asked)
        else:
            kinds = {mark >= 0: kind for mark, kind in zip(asked, args["cond_or_uncond"], strict=True)}
            predict = partial(self._predict, rows.on(args["input"], args["timestep"], kinds), options, run)
            composition = self.engine.again(predict, cond=True in kinds, uncond=False in kinds)
        return rows.pick(composition, asked).to(args["input"].dtype)

    def _predict(
        self, rows: ForgeRows, options: dict[str, Any], run: Callable[[Call], Tensor], wanted: Sequence[Row]
    ) -> Tensor:
        """The host's model on any rows of the step; conditions that cannot share a batch go in calls of their own."""
        calls = [ModelCall(call.numbers, partial(run, call)) for call in rows.calls(wanted, options)]
        return predicted_by(calls, self.engine.bank)


def _has_functions(options: Any) -> bool:
    """Whether the host's transformer options contain functions, which belong to other extensions and run inside the model."""
    if isinstance(options, Mapping):
        options = options.values()
    elif not isinstance(options, (list, tuple)):
        return callable(options)
    return any(map(_has_functions, options))


class DeclaredRows:
    """As many rows per call as fit into the host's free memory, by its own estimate of a call's memory."""

    def __init__(self, variant: Variant, model: Any, rows: ForgeRows) -> None:
        self._variant = variant
        self._model = model
        self._x = rows.x

    def fitting(self, wanted: int) -> int:
        images = len(self._x)
        free = self._variant.free_memory(self._x.device)
        fitting = wanted
        while fitting > 1 and self._variant.needed_memory(self._model, [fitting, *self._x.shape[1:]]) >= free:
            fitting = fitting // 2
        return fitting - fitting % images if fitting > images else fitting

    def observed(self, rows: int) -> AbstractContextManager[None]:
        return nullcontext()
