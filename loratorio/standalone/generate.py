"""From a prompt with LoRA tags to pictures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..adapters.bank import Bank
from ..compose.methods import Composition
from ..compose.mixes import NO_WORDS, Mix, Words
from ..compose.regions import Place
from ..errors import LoratorioError
from ..pictures.infotext import LoraUse
from ..prompt.admission import ActiveLora
from ..prompt.own_words import with_words
from ..prompt.places import OPTION as PLACE
from ..prompt.roles import not_found_note, reactions_note, style_note
from ..sampling.calls import Row, by_kind, is_out_of_memory, predicted_by
from ..sampling.engine import Engine, Predict
from ..sampling.history import WeightHistory
from ..sampling.memory import measured_rows
from ..sampling.step import Step
from .checkpoint import Checkpoint
from .lora_files import load_lora
from .lora_set import Load, conditioner, load_loras
from .progress import Progress, bar
from .prompt import plain_text_notes, split_loras
from .request import Request, WholeRequest, whole
from .samplers import find_sampler
from .schedule import SamplingSchedule, denoise
from .text import TextConditioner

__all__ = ["Outcome", "Request", "generate"]


@dataclass(frozen=True)
class Outcome:
    """Pictures, and what they were made of.

    Attributes:
        request: with the model's own values where it left them out.
        images: one per image of the batch; `seeds` theirs, and `latents` what they were decoded from, (B, C, H/8, W/8) float32.
        loras: of the prompt, in order.
        history: Ω over the sampling if the weight maps were asked for; N of it are `composed`.
        composed: names of the composed LoRAs, a pool's candidates among them.
        notes: sentences for the user, on LoRAs that were left out or recognised.
        found: for each image the names and places of the LoRAs with at=auto; none where they were not found.
        reactions: by name of a pool's candidate, how much the prompt moves it (`compose.candidates.reactions`), where that was looked at.
    """

    request: WholeRequest
    images: list[Image.Image]
    seeds: list[int]
    latents: Tensor
    loras: list[LoraUse]
    composed: list[str]
    history: WeightHistory
    notes: tuple[str, ...] = ()
    reactions: Mapping[str, float] = field(default_factory=dict)
    found: tuple[tuple[tuple[str, Place], ...], ...] = ()


def generate(
    checkpoint: Checkpoint,
    lora_dir: str | Path | None,
    request: Request,
    progress: Progress | bool = True,
    load: Load = load_lora,
) -> Outcome:
    """Make the pictures; of several threads with one checkpoint, one after another.

    Args:
        progress: True: a bar in a terminal, and nothing elsewhere. False: nothing.
        load: reads a LoRA file; one that remembers saves time where many pictures share LoRAs.

    Raises:
        LoratorioError: anything in the request, the prompt or the LoRA files that cannot be used, or not enough memory.
    """
    shown: AbstractContextManager[Progress | None] = nullcontext(None)
    if not isinstance(progress, bool):
        shown = nullcontext(progress)
    elif progress and sys.stderr.isatty():
        shown = bar()
    own = whole(request, checkpoint)
    folder = None if lora_dir is None else Path(lora_dir)
    try:
        with checkpoint.lock, shown as told:
            return _generate(checkpoint, folder, own, told, load)
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise LoratorioError(
            f"{own.batch} × {own.width}×{own.height} pixels do not fit into memory. Make the picture smaller, or fewer at once."
        ) from problem


def _generate(
    checkpoint: Checkpoint,
    lora_dir: Path | None,
    request: WholeRequest,
    progress: Progress | None,
    load: Load,
) -> Outcome:
    text, _ = split_loras(request.prompt)
    admitted = load_loras(request, lora_dir, checkpoint, load)
    settings, names = request.engine_settings, [lora.tagged.name for lora in admitted.active]
    bank = Bank([lora.unet for lora in admitted.loras])
    engine = Engine(settings, bank, admitted.participants) if admitted.loras else None
    schedule = _schedule(checkpoint, request)
    history, reactions, of_engine = WeightHistory(), dict[int, float](), list[str]()
    found: tuple[tuple[tuple[str, Place], ...], ...] = ()
    styles: frozenset[int] = frozenset()
    with torch.inference_mode():
        texts = conditioner(checkpoint, admitted.loras, _prompts(request, text))
        latents = _sample(checkpoint, request, schedule, text, bank, engine, texts, progress)
        if engine is not None:
            history, reactions = engine.history, engine.pool.reactions or {}
            history.settle()
            of_engine += engine.without_effect(schedule.steps)
            of_engine += [reactions_note(names, reactions, engine.pool.left_out)] if reactions else []
            found = engine.places.named(names)
            sought = [names[number] for number in engine.places.numbers]
            styles = engine.styles.numbers
            notes = [
                not_found_note(sought, found, request.batch),
                style_note([names[i] for i in sorted(styles)]),
            ]
            of_engine += filter(None, notes)
        images = _decode(checkpoint, latents)
    return Outcome(
        request,
        images,
        [request.seed + i for i in range(request.batch)],
        latents,
        [
            _use(number, lora, history.shares, admitted.participants.words, number in styles)
            for number, lora in enumerate(admitted.active)
        ],
        [names[number] for number in admitted.participants.numbers],
        history,
        (*plain_text_notes(text, request.negative), *admitted.notes, *of_engine),
        {names[number]: score for number, score in reactions.items()},
        found,
    )


def _use(
    number: int, lora: ActiveLora, shares: Mapping[int, float], words: Mapping[int, Words], is_style: bool
) -> LoraUse:
    tagged = lora.tagged
    share = shares.get(number, 0.0) if tagged.is_candidate and shares else None
    without = words.get(number, NO_WORDS).without
    return LoraUse(
        tagged.name,
        lora.strength,
        tagged.options.get(PLACE, ""),
        share=share,
        text=lora.text,
        without=without,
        style=is_style,
    )


def _schedule(checkpoint: Checkpoint, request: WholeRequest) -> SamplingSchedule:
    return SamplingSchedule.of(
        find_sampler(request.sampler),
        checkpoint.schedule,
        request.steps,
        1.0 if request.init_image is None else request.strength,
        checkpoint.device,
    )


def _sample(
    checkpoint: Checkpoint,
    request: WholeRequest,
    schedule: SamplingSchedule,
    text: str,
    bank: Bank,
    engine: Engine | None,
    texts: TextConditioner,
    progress: Progress | None,
) -> Tensor:
    """Clean latents (B, C, H/8, W/8), float32."""
    device, scale = checkpoint.device, checkpoint.latent_scale
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.batch)]
    channels = int(checkpoint.unet.config.in_channels)  # type: ignore[union-attr, arg-type]
    shape = (1, channels, request.height // scale, request.width // scale)
    noise = torch.cat([torch.randn(shape, generator=each) for each in generators]).to(device)
    picture = None if request.init_image is None else _encode(checkpoint, request)
    if engine is not None:
        size = (id(checkpoint.unet), tuple(noise.shape[1:]), checkpoint.dtype)
        engine.calls.memory = measured_rows(device, size, 2 * request.batch)
    with bank.attached(dict(checkpoint.unet.named_modules())):
        bank.prepare(device, checkpoint.dtype)
        return denoise(
            schedule,
            schedule.start(noise, picture),
            generators,
            request.cfg,
            engine.step if engine else _plain_step,
            _model(checkpoint, request, text, texts, bank),
            progress,
        )


def _prompts(request: WholeRequest, text: str) -> list[str]:
    return [text] if request.cfg == 1 else [text, request.negative]


def _model(
    checkpoint: Checkpoint, request: WholeRequest, text: str, texts: TextConditioner, bank: Bank
) -> Any:
    """The UNet as `denoise` runs it."""
    sizes = torch.tensor([request.height, request.width, 0, 0, request.height, request.width])

    def run(scaled: Tensor, time: Any, rows: Sequence[Row]) -> Tensor:
        wanted = [(with_words(text, row.words) if row.cond else request.negative, row.mix) for row in rows]
        told = texts.of(wanted)

        def part(numbers: Sequence[int]) -> Tensor:
            options: dict[str, Any] = {}
            if checkpoint.is_sdxl:
                pooled = [told[number].pooled for number in numbers]
                options["added_cond_kwargs"] = {
                    "text_embeds": torch.stack([each for each in pooled if each is not None]),
                    "time_ids": sizes.to(checkpoint.device, checkpoint.dtype).expand(len(numbers), -1),
                }
            noisy = scaled[[rows[number].slot for number in numbers]].to(checkpoint.dtype)
            tokens = torch.stack([told[number].tokens for number in numbers])
            predicted: Tensor = checkpoint.unet(noisy, time, tokens, **options).sample
            return predicted.to(torch.float32)

        # A LoRA's own words may make its text longer: rows of one length share a call.
        return predicted_by(by_kind([len(each.tokens) for each in told], part), bank)

    return run


def _plain_step(step: Step, predict: Predict) -> Composition:
    """A step without any LoRA."""
    none: Mix = ()
    rows = [Row(none, True, slot) for slot in range(len(step.latents))]
    rows += [Row(none, False, slot) for slot in range(step.uncond_count)]
    predicted = predict(rows)
    count = len(step.latents)
    return Composition(predicted[:count], predicted[count:] if step.uncond_count else None)


def _encode(checkpoint: Checkpoint, request: WholeRequest) -> Tensor:
    """The initial picture's latents, once per image of the batch."""
    assert request.init_image is not None
    picture = request.init_image.convert("RGB").resize(
        (request.width, request.height), Image.Resampling.LANCZOS
    )
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
    with _VaeDtype(checkpoint) as dtype:
        latents = checkpoint.vae.encode(pixels.to(checkpoint.device, dtype)).latent_dist.mode()  # type: ignore[operator]
    config = checkpoint.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    return ((latents.float() - shift) * config.scaling_factor).repeat(request.batch, 1, 1, 1)  # type: ignore[no-any-return, union-attr]


def _decode(checkpoint: Checkpoint, latents: Tensor) -> list[Image.Image]:
    if not bool(torch.isfinite(latents).all()):
        raise LoratorioError(
            "The model gave NaN or infinite numbers. Use dtype fp32, a lower CFG scale or lower LoRA strengths."
        )
    config = checkpoint.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    latents = latents / config.scaling_factor + shift  # type: ignore[union-attr, operator]
    images = []
    with _VaeDtype(checkpoint) as dtype:
        for row in latents.to(dtype).split(1):  # one at a time: the decoder is what needs most memory
            pixels = checkpoint.vae.decode(row).sample[0].float()  # type: ignore[operator]
            if not bool(torch.isfinite(pixels).all()):
                raise LoratorioError("The VAE gave NaN: this one needs dtype fp32 or bf16.")
            array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            images.append(Image.fromarray(array.permute(1, 2, 0).cpu().numpy()))
    return images


class _VaeDtype:
    """While inside, a VAE that overflows in half precision (SDXL's) is in float32; gives the dtype it computes in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._vae, self._dtype = checkpoint.vae, checkpoint.dtype
        self._upcast = checkpoint.dtype == torch.float16 and bool(
            getattr(checkpoint.vae.config, "force_upcast", False)
        )

    def __enter__(self) -> torch.dtype:
        if self._upcast:
            self._vae.to(torch.float32)
            return torch.float32
        return self._dtype

    def __exit__(self, *_: object) -> None:
        if self._upcast:
            self._vae.to(self._dtype)
