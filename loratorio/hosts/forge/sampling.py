"""One sampling pass of a Forge, composed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters.delta import Adapter
from ...compose.methods import Composition
from ...errors import LoratorioError
from ...job import Job
from ...prompt.roles import TaggedLora
from ...prompt.tags import BLOCK_WEIGHT
from ...sampling.calls import ModelCall, Row, predicted_by
from ...sampling.engine import Engine, Step
from ..shared.enclosure import enclose
from ..shared.other_extensions import merged_because, replaced_attention, strengths_by_step
from ..shared.sampling_pass import BYPASSED, REFINER_WITHOUT, ActiveLora, ReadLora, SamplingPass
from ..shared.text import TextConditioning, encoded
from .conditioning import conditioning_under, forget_conditioning, text_encoder
from .loras import layers_of, read
from .rows import MARK, Call, ForgeRows
from .variants import Patcher, Variant

MERGED_TEXT = (
    "The LoRAs' text encoder parts are merged, because this model reads the prompt together with a picture."
)
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

    def __init__(self, job: Job, variant: Variant) -> None:
        super().__init__(job)
        self._variant = variant
        self.idle_extensions = variant.idle_extensions
        self._functions = variant.sampling()
        self._texts: TextConditioning
        self._hook: Hook
        self._unet: Patcher  # the clone without LoRAs, and what stood in its place
        self._unet_before: Patcher
        self._evaluation: ForgeEvaluation | None = None
        self._evaluated_at = -1  # the denoiser's step
        self._replaced: list[str] = []  # LoRAs whose file was
        self._refiner_note = REFINER_MERGED

    def install(self) -> None:
        """Replace the pass's UNet by a clone without LoRAs, and enclose the sampling loop.

        If the LoRAs cannot be composed, nothing changes and the job gets a note with the reason.
        """
        self._variant.forget_files()
        participants = self.admit()
        if participants is not None:
            self._replaced = [lora.active.tagged.name for lora in self.loras if lora.was_replaced]
            if self._replaced:
                self.job.note(replaced_note(self._replaced))
            self.engine = Engine(
                self.job.settings, self.bank(), participants, region=self.region, found=self.found_before
            )
            self._make_texts()
            self._replace_unet()
            enclose(self.job, self.run)

    # -- what is asked before the first step --------------------------------------------------------------------------

    def activated(self) -> list[ActiveLora]:
        return [
            ActiveLora(
                TaggedLora(file.name, file.options, file.metadata, file=Path(file.path)),
                file.unet,
                file.text,
                file,
            )
            for file in self._variant.applied(self.p)
        ]

    def added(self, tags: Sequence[ActiveLora]) -> ActiveLora:
        files = [tag.source for tag in tags]
        unet, text = (
            self._variant.added([getattr(file, part) for file in files]) for part in ("unet", "text")
        )
        return replace(tags[0], strength=unet, text=text, source=replace(files[0], unet=unet, text=text))

    def obstacle(self) -> str | None:
        loras = self.activated()
        by_step = BLOCK_WEIGHT not in self.idle_extensions
        return (
            self._variant.obstacle(self.p)
            or replaced_attention(self.p.sd_model.forge_objects.unet.model)
            or (strengths_by_step(self.p, [lora.tagged for lora in loras]) if by_step else None)
            or self._changed_strengths(loras)
        )

    def _changed_strengths(self, loras: Sequence[ActiveLora]) -> str | None:
        """The reason not to compose if an extension has changed the LoRAs that the host applied, as LoRA Block Weight does.

        LoRAtorio reads them again from their files, which do not have such changes.
        """
        applied = self.p.sd_model.forge_objects_after_applying_lora.unet
        originals = {
            key: len(patches)
            for key, patches in self._variant.patches(self.p.sd_model.forge_objects_original.unet)
        }
        asked = {lora.strength for lora in loras}
        for key, patches in self._variant.patches(applied):
            for patch in list(patches)[originals.get(key, 0) :]:
                if not any(math.isclose(float(patch[0]), strength, abs_tol=1e-9) for strength in asked):
                    return merged_because("another extension has changed the LoRAs' strengths layer by layer")
        return None

    def remarks(self) -> Iterator[str]:
        if self._variant.text_sees_pictures() and any(lora.text is not None for lora in self.loras):
            yield MERGED_TEXT

    def model_identity(self) -> Hashable:
        # A refiner, and the checkpoint that comes back after it, are other models.
        return weakref.ref(self.p.sd_model.forge_objects_original.unet.model)

    def read(self, lora: ActiveLora, skip_misfits: bool) -> ReadLora:
        try:
            return read(lora, self.p.sd_model, self._variant)
        except LoratorioError:
            if not skip_misfits:
                raise
            return ReadLora(lora, Adapter(lora.tagged.name, {}))

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        with text_encoder(self.p, self.p.sd_model.forge_objects_original.clip):
            return encoded(self.p.sd_model, texts)

    # -- what lasts for a model: once, and again when the refiner comes in --------------------------------------------

    def _make_texts(self) -> None:
        """Text conditioning under every mix. Made before the UNet is loaded: on a small GPU the text encoder would evict it."""
        merged_text = self._variant.text_sees_pictures()
        changes_text = [lora.text is not None and not merged_text for lora in self.loras]
        self._texts = TextConditioning(
            changes_text,
            partial(conditioning_under, self.p, self.loras, self._variant),
            host_has_merged=(self.all_take_part and not self._replaced) or merged_text,
        )
        self._texts.prepare(self.engine.participants.every_mix(self.job.settings.share), self.engine.words)

    def _replace_unet(self) -> None:
        """Give the model a clone of its UNet patcher without LoRAs, until `_give_back_unet`."""
        objects = self.p.sd_model.forge_objects
        before = objects.unet
        unet = self._variant.without_loras(before, self.p.sd_model)
        option = self._variant.hook_option
        hooks = unet.model_options.get(option, [])
        self._hook = Hook(self._variant.hook(self._before_evaluation))
        # A host may call us twice for one pass, our clone of the first time being in place.
        kept = [hook for hook in hooks if not isinstance(hook, Hook)]
        unet.model_options[option] = [*kept, self._hook]
        dtype = self._variant.computation_dtype(unet)
        unet.add_extra_preserved_memory_during_sampling(self.engine.bank.numbers * dtype.itemsize)
        self._unet = objects.unet = unet
        self._unet_before = before

    def _give_back_unet(self, objects: Any) -> None:
        self._hook.function = None
        self._end_evaluation()
        if objects.unet is self._unet:
            objects.unet = self._unet_before

    def _attach(self) -> None:
        bank = self.engine.bank
        self.attachment.enter_context(bank.attached(layers_of(bank.adapters, self._unet)))
        guard = self._unet.model.diffusion_model.register_forward_pre_hook(self._refuse_unrouted)
        self.attachment.callback(guard.remove)
        # What another extension's function does to the rows must be done before we look at them.
        options = self.p.sd_model.forge_objects.unet.model_options
        hooks = options.get(self._variant.hook_option, [])
        if self._hook in hooks:
            others = [hook for hook in hooks if hook is not self._hook]
            options[self._variant.hook_option] = [*others, self._hook]
        bank.prepare(self._unet.load_device, self._variant.computation_dtype(self._unet))

    def _refuse_unrouted(self, *args: Any) -> None:
        """Before each call of the model: a call that bypasses LoRAtorio would be the base's, without any LoRA."""
        if not self.engine.bank.is_routed:
            raise LoratorioError(BYPASSED)

    def _follow_refiner(self, objects: Any) -> None:
        """Compose on the host's present model. LoRAs that do not match it have no effect there, as without LoRAtorio."""
        self.attachment.close()
        self._give_back_unet(objects)  # the host may keep the first model in memory
        taking_part = {lora.active.source for lora in self.loras}
        active = [lora for lora in self.active_loras() if lora.source in taking_part]
        if self.obstacle() or len(active) != len(self.loras):
            return
        loras = self.loras_of_refiner(active)
        if not any(lora.adapter.deltas or lora.text is not None for lora in loras):
            self._refiner_note = REFINER_WITHOUT
            return
        self.loras = loras
        self.engine.rebind(self.bank())
        self._make_texts()
        self._replace_unet()
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
        came_in = self.p.sd_model.forge_objects.unet.model is not self._unet.model
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
        own = getattr(self.p, "hr_cfg", None) if self.is_hires else None
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
