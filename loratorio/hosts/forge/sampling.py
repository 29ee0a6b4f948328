"""One sampling pass of a Forge, composed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...adapters.bank import Bank
from ...adapters.delta import Adapter
from ...compose.importance import importance, without_words
from ...compose.methods import Composition, Mix
from ...engine import Engine, Row
from ...errors import LoratorioError
from ...pool import Candidates
from ...roles import Player, cast_of, parts_of, recognised_note, trigger_words
from ..base import ALL_ALWAYS, BYPASSED, NO_LORA, ComposedPass, Job, answerable
from .conditioning import TextConditioning, encoded
from .flavours import Flavour, LoraFile, Patcher
from .loras import Lora, layers_of, read, size_in_bytes
from .rows import MARK, StepRows

Result = TypeVar("Result")


class Hook:
    """The function that the clone carries among its model options. Hosts copy it with the patcher: it stays the same one."""

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        self.function: Callable[..., tuple[Any, ...]] | None = function

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return self.function(*args) if self.function else args

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self


class ComposedSampling:
    """Composes what `job.p.sampler` is about to sample. Make one per pass, `install` it, and the pass does the rest."""

    def __init__(self, job: Job, flavour: Flavour) -> None:
        self._job = job
        self._p = job.p
        self._flavour = flavour
        self._functions = flavour.sampling()
        self._evaluations = 0
        self._refiner_note = "The refiner's steps were not composed: it has the LoRAs merged."
        self._attachment = ExitStack()
        self._rows: StepRows | None = None
        self._composition: Composition | None = None

    def install(self) -> None:
        """Put a clone without LoRAs in the place of the pass's UNet, and enclose the sampling loop.

        Where the LoRAs cannot be composed, nothing is changed and the job is told why.
        """
        files = self._flavour.applied(self._p)
        players = [Player(file.name, file.options, file.metadata) for file in files]
        why_not = self._flavour.obstacle(self._p) if files else NO_LORA
        if why_not and any(player.is_candidate for player in players):
            raise LoratorioError(
                f"{why_not} With a pool that is no picture of use: take the pool out of the prompt."
            )
        if why_not:
            self._job.note(why_not)
            return
        self._loras, players = self._read(files, players)
        self._files = [lora.file for lora in self._loras]
        cast = cast_of(players, self._importance(players))
        remarks = [lora.remark for lora in self._loras]
        for remark in (*remarks, recognised_note(parts_of(players)), self._text_remark()):
            if remark:
                self._job.note(remark)
        if not cast.solos:
            self._job.note(ALL_ALWAYS)
            return
        bank = Bank([lora.adapter for lora in self._loras])
        self._engine = Engine(self._job.settings, bank, cast)
        self._texts = TextConditioning(self._p, self._loras, self._mixes(), self._flavour)
        self._replace_unet()
        self._enclose()

    def _read(self, files: Sequence[LoraFile], players: Sequence[Player]) -> tuple[list[Lora], list[Player]]:
        """The LoRAs, read by the host, without those candidates of a pool that cannot be used."""
        loras, playing, skipped = [], [], []
        for file, player in zip(files, players, strict=True):
            try:
                loras.append(self._lora(file))
                playing.append(player)
            except LoratorioError as problem:
                if not player.is_candidate:
                    raise
                skipped.append((file.name, str(problem)))
        note = Candidates(tuple(loras), tuple(skipped)).note
        if not loras:
            raise LoratorioError("No LoRA of the pool fits this model: choose another folder or pattern.")
        if note:
            self._job.note(note)
        return loras, playing

    def _lora(self, file: LoraFile) -> Lora:
        """The LoRA; kept for the job's other batches, since some kinds take seconds to read."""
        sd_model = self._p.sd_model
        model = sd_model.forge_objects_original.unet.model
        key = ("lora", file)
        known: tuple[Callable[[], Any], Lora] | None = self._job.scratch.get(key)
        # A refiner, and the checkpoint that comes back after it, are other models.
        if known is None or known[0]() is not model:
            known = weakref.ref(model), read(file, sd_model, self._flavour)
            self._job.scratch[key] = known
        return known[1]

    def _text_remark(self) -> str:
        speaking = any(lora.clip is not None for lora in self._loras)
        return MERGED_TEXT if speaking and self._flavour.text_sees_pictures() else ""

    def _importance(self, players: Sequence[Player]) -> dict[int, float] | None:
        """By LoRA, how much its trigger words matter in the prompt; only asked for by the method that uses it."""
        if self._job.settings.method != "w_composite":
            return None
        hires = getattr(self._p, "is_hr_pass", False)
        prompt = (self._p.hr_prompts if hires else self._p.prompts)[0]
        words = {i: trigger_words(player.metadata, prompt) for i, player in enumerate(players)}
        told = [i for i, own in words.items() if own]
        if not told:
            return None
        tokens = encoded(self._p, [prompt, *(without_words(prompt, words[i]) for i in told)])
        return dict(zip(told, importance(tokens[0], tokens[1:]), strict=True))

    def _mixes(self) -> list[Mix]:
        """Every mix that a method may ask the model for."""
        cast = self._engine.cast
        carrying = cast.carrying(self._job.settings.share)
        return list(
            dict.fromkeys(
                [
                    cast.base,
                    *cast.solos,
                    *carrying.solos,
                    carrying.compared,
                    cast.merged,
                    cast.chosen,
                ]
            )
        )

    def _replace_unet(self) -> None:
        """Give the model a clone of its UNet patcher without LoRAs, until `_give_back_unet`."""
        objects = self._p.sd_model.forge_objects
        before = objects.unet
        unet = self._flavour.without_loras(before, self._p.sd_model)
        option = self._flavour.hook_option
        hooks = unet.model_options.get(option, [])
        self._hook = Hook(self._flavour.hook(self._see))
        # A host may call us twice for one pass, our clone of the first time being in place.
        kept = [hook for hook in hooks if not isinstance(hook, Hook)]
        unet.model_options[option] = [*kept, self._hook]
        dtype = self._flavour.computation_dtype(unet)
        unet.add_extra_preserved_memory_during_sampling(
            sum(size_in_bytes(lora.adapter, dtype) for lora in self._loras)
        )
        self._unet = objects.unet = unet
        self._unet_before: Patcher = before

    def _give_back_unet(self, objects: Any) -> None:
        self._hook.function = self._rows = None
        if objects.unet is self._unet:
            objects.unet = self._unet_before

    def _enclose(self) -> None:
        sampler = self._p.sampler
        # When called twice for one pass, the second enclosure replaces the first.
        launch = getattr(sampler.launch_sampling, "enclosed", sampler.launch_sampling)

        def launch_composed(steps: int, func: Callable[[], Result]) -> Result:
            result: Result = launch(steps, lambda: self._run(func))
            return result

        launch_composed.enclosed = launch  # type: ignore[attr-defined]
        sampler.launch_sampling = launch_composed

    def _run(self, func: Callable[[], Result]) -> Result:
        from modules.sd_samplers_common import InterruptedException

        denoiser = self._p.sampler.model_wrap_cfg
        first = denoiser.step
        try:
            with self._attachment, self._following_the_refiner(denoiser):
                self._attach()
                result = func()
        except InterruptedException:  # the host makes a picture of what there is
            if self._composition is not None:
                self._job.passes.append(self._account())
            raise
        except LoratorioError as problem:
            raise answerable(problem) from problem.__cause__
        finally:
            self._give_back_unet(self._p.sd_model.forge_objects)
        if self._evaluations != denoiser.step - first:
            if not self._refined():
                raise answerable(LoratorioError(BYPASSED))
            self._job.note(self._refiner_note)
        self._job.passes.append(self._account())
        return result

    def _attach(self) -> None:
        layers = layers_of(self._engine.bank.adapters, self._unet)
        self._attachment.enter_context(self._engine.bank.attached(layers))

    # -- the refiner: another model in the middle of the pass ------------------------------------------------------

    @contextmanager
    def _following_the_refiner(self, denoiser: Any) -> Iterator[None]:
        """When the host has changed the model, and before it loads the new one's weights, take the LoRAs off that one too."""
        update, objects = denoiser.update_inner_model, self._p.sd_model.forge_objects
        is_own = "update_inner_model" in vars(denoiser)

        def update_and_follow() -> None:
            update()
            self._attachment.close()
            self._give_back_unet(objects)  # the host may keep the first model in memory
            self._take_over()

        denoiser.update_inner_model = update_and_follow
        try:
            yield
        finally:
            del denoiser.update_inner_model
            if is_own:
                denoiser.update_inner_model = update

    def _take_over(self) -> None:
        """Compose on the model that is the host's now. LoRAs that do not fit it do nothing there, as without us."""
        files = self._flavour.applied(self._p)
        why_not = self._flavour.obstacle(self._p)
        if why_not or len(files) != len(self._files):
            return
        loras = []
        for file, first in zip(files, self._loras, strict=True):
            try:
                loras.append(self._lora(file))
            except LoratorioError:
                loras.append(Lora(file, Adapter(first.file.name, {}), None))
        fitting = [lora.adapter.deltas or lora.clip is not None for lora in loras]
        if not any(fitting):
            self._refiner_note = "No LoRA of the prompt fits the refiner: its steps are without them."
            return
        limit = self._engine.bank.plan_limit
        self._loras = loras
        self._engine.bank = Bank([lora.adapter for lora in loras])
        self._engine.bank.plan_limit = limit
        self._texts = TextConditioning(self._p, self._loras, self._mixes(), self._flavour)
        self._replace_unet()
        self._attach()

    def _refined(self) -> bool:
        return self._p.sd_model.forge_objects.unet.model is not self._unet.model or bool(
            self._p.extra_generation_params.get("Refiner")
        )

    # -- what lasts for an evaluation of the model ----------------------------------------------------------------

    def _see(
        self,
        model: Any,
        cond: list[Any],
        uncond: list[Any] | None,
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> tuple[Any, ...]:
        """The host is about to run these conditions on `x`: mark them, and answer in the place of the model."""
        denoiser = self._p.sampler.model_wrap_cfg
        rows = StepRows(self._functions, self._texts, denoiser.step, cond, uncond, x, sigma)
        self._rows = rows
        self._composition = None
        self._evaluations += 1
        # Seen from here a second-order sampler evaluates twice a step.
        per_step = max(1, (denoiser.total_steps or 1) // (denoiser.steps or 1))
        self._step = rows.step(denoiser.step // per_step, max(denoiser.steps or 1, 1), self._guidance())
        inner = options.get("model_function_wrapper")
        answer = partial(self._answer, model, inner)
        return model, *rows.marked(), x, sigma, {**options, "model_function_wrapper": answer}

    def _guidance(self) -> float:
        """The CFG scale of this pass."""
        own = getattr(self._p, "hr_cfg", None) if getattr(self._p, "is_hr_pass", False) else None
        return float(self._p.cfg_scale if own is None else own)

    def _answer(self, model: Any, inner: Any, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """The composed rows of the blocks that the host asks for; all of the step's at its first call."""
        c = dict(args["c"])
        marks = c.pop(MARK, None)
        rows = self._rows
        if (
            rows is None
            or marks is None
            or args["input"].shape[0] != len(marks)
            or args["input"].shape[1:] != rows.x.shape[1:]
        ):
            raise LoratorioError(BYPASSED)
        if self._composition is None:
            self._limit_rows(model, rows)

            def run(batch: Tensor, sigma: Tensor, c: dict[str, Any], cond_or_uncond: list[int]) -> Tensor:
                if inner is None:
                    return apply_model(batch, sigma, **c)  # type: ignore[no-any-return]
                call = {"input": batch, "timestep": sigma, "c": c, "cond_or_uncond": cond_or_uncond}
                return inner(apply_model, call)  # type: ignore[no-any-return]

            predict = partial(self._predict, rows, c["transformer_options"], run)
            self._composition = self._engine.step(self._step, predict)
        return rows.pick(self._composition, marks).to(args["input"].dtype)

    def _predict(
        self, rows: StepRows, options: dict[str, Any], run: Callable[..., Tensor], wanted: Sequence[Row]
    ) -> Tensor:
        """The host's model on any rows of the step; conditions that cannot share a batch go in calls of their own."""
        calls = rows.calls(wanted, options)
        predicted: dict[int, Tensor] = {}
        for call in calls:
            with self._routed(wanted, call.numbers, len(calls) == 1):
                output = run(call.x, call.sigma, call.c, call.cond_or_uncond)
            predicted.update(zip(call.numbers, output, strict=True))
        return torch.stack([predicted[number] for number in range(len(wanted))])

    @contextmanager
    def _routed(self, wanted: Sequence[Row], numbers: Sequence[int], already: bool) -> Iterator[None]:
        if already:
            yield
            return
        with self._engine.bank.routed([wanted[number].mix for number in numbers]):
            yield

    def _limit_rows(self, model: Any, rows: StepRows) -> None:
        """As many rows a call as fit into what the host says is free, and no more than memory has allowed before."""
        images = len(rows.x)
        wanted = (len(self._engine.cast.solos) + 1) * rows.count
        free = self._flavour.free_memory(rows.x.device)
        fitting = wanted
        while fitting > 1 and self._flavour.needed_memory(model, [fitting, *rows.x.shape[1:]]) >= free:
            fitting = fitting // 2
        if fitting > images:
            fitting -= fitting % images
        limit = self._engine.row_limit
        self._engine.row_limit = min(limit, fitting) if limit else (fitting if fitting < wanted else 0)

    def _account(self) -> ComposedPass:
        composed = [self._files[number] for number in self._engine.cast.number_of_solo]
        return ComposedPass(
            loras=tuple(file.name for file in composed),
            strengths=tuple(file.unet for file in composed),
            batch=self._p.iteration,
            hires=bool(getattr(self._p, "is_hr_pass", False)),
            history=self._engine.history,
        )


MERGED_TEXT = "The LoRAs' text encoder parts are merged: this model reads the prompt together with a picture."
