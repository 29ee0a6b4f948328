"""What training the base model and training a LoRA share: latents, noise, the loss, the steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from loratorio_lab.toybox.models import TOKENS
from loratorio_lab.toybox.world import Scene, caption
from loratorio_lab.train.common import Average, Optimisers, Run, learning_rate, pictures

CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0


def new_schedule() -> DDPMScheduler:
    """SD 1's thousand steps: the square roots of beta go linearly from 0.00085 to 0.012."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )


@dataclass
class Data:
    """Latents (N, 4, h, w), already scaled to unit spread, and their captions."""

    latents: Tensor
    captions: list[str]


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL,
    scale: float,
    scenes: Sequence[Scene],
    chunk: int = 64,
    captions: Sequence[str] | None = None,
) -> Data:
    """Render and encode scenes once, so that training never touches the autoencoder again. Without captions, the scenes' own."""
    device = next(vae.parameters()).device
    parts = []
    for i in range(0, len(scenes), chunk):
        images = pictures(scenes[i : i + chunk]).to(device)
        parts.append(vae.encode(images).latent_dist.mean * scale)
    return Data(torch.cat(parts), list(captions or map(caption, scenes)))


def tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, 77)."""
    ids = tokenizer(
        list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return torch.as_tensor(ids)


def encode_text(text: CLIPTextModel, ids: Tensor) -> Tensor:
    """Conditioning (B, 77, width): the last hidden state after the final norm, each distinct text computed once."""
    distinct, index = torch.unique(ids, dim=0, return_inverse=True)
    state: Tensor = text(distinct).last_hidden_state[index]
    return state


@dataclass
class Lesson:
    """Scenes on which a LoRA shall predict what another model does.

    Attributes:
        unet, text: that model, frozen.
        data: the scenes, with the captions that the LoRA reads.
        captions: the captions that the other model reads, one a scene.
        dropout: share of captions that are empty for both.
    """

    unet: UNet2DConditionModel
    text: CLIPTextModel
    data: Data
    captions: list[str]
    dropout: float = 0.0


def batch_of(data: Data, rng: random.Random, size: int) -> tuple[Tensor, list[str]]:
    """Random latents and their captions, a part of the captions empty."""
    chosen = [rng.randrange(len(data.captions)) for _ in range(size)]
    texts = ["" if rng.random() < CAPTION_DROPOUT else data.captions[i] for i in chosen]
    return data.latents[chosen], texts


def snr_weight(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    """min(SNR, 5)/SNR at these timesteps, (B,) (Hang et al. 2023)."""
    alphas = schedule.alphas_cumprod.to(times.device)[times]
    snr = alphas / (1 - alphas)
    weight: Tensor = snr.clamp(max=SNR_CAP) / snr
    return weight


def random_times(latents: Tensor) -> Tensor:
    return torch.randint(0, 1000, (len(latents),), device=latents.device)


def noise_loss(
    unet: UNet2DConditionModel, schedule: DDPMScheduler, latents: Tensor, conditioning: Tensor
) -> Tensor:
    """Squared error of the predicted noise, weighted by `snr_weight`."""
    noise, times = torch.randn_like(latents), random_times(latents)
    made = unet(schedule.add_noise(latents, noise, times), times, conditioning).sample
    error = (made - noise).square().mean(dim=(1, 2, 3))
    loss: Tensor = (snr_weight(schedule, times) * error).mean()
    return loss


def imitation_weight(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    """`snr_weight` times 1/SNR, that within 0.5 and 20, (B,).

    The first steps, which decide where things go, have errors that are small in the noise and large in the denoised picture.
    """
    alphas = schedule.alphas_cumprod.to(times.device)[times]
    weight: Tensor = snr_weight(schedule, times) * ((1 - alphas) / alphas).clamp(0.5, 20)
    return weight


def imitation_loss(
    model: nn.ModuleDict,
    lesson: Lesson,
    schedule: DDPMScheduler,
    tokenizer: CLIPTokenizer,
    rng: random.Random,
    size: int,
) -> Tensor:
    """Squared distance of the predicted noise from the lesson's on `size` random scenes, weighted by `imitation_weight`."""
    chosen = [rng.randrange(len(lesson.captions)) for _ in range(size)]
    empty = [rng.random() < lesson.dropout for _ in chosen]
    latents = lesson.data.latents[chosen]
    times = random_times(latents)
    noisy = schedule.add_noise(latents, torch.randn_like(latents), times)

    def read(text: CLIPTextModel, captions: Sequence[str]) -> Tensor:
        texts = ["" if no_words else captions[i] for i, no_words in zip(chosen, empty, strict=True)]
        return encode_text(text, tokenise(tokenizer, texts).to(latents.device))

    with torch.no_grad():
        wanted = lesson.unet(noisy, times, read(lesson.text, lesson.captions)).sample
    made = model["unet"](noisy, times, read(model["text"], lesson.data.captions)).sample  # type: ignore[arg-type]
    error = (made - wanted).square().mean(dim=(1, 2, 3))
    loss: Tensor = (imitation_weight(schedule, times) * error).mean()
    return loss


def train(
    run: Run,
    model: nn.ModuleDict,
    average: Average,
    optimisers: Optimisers,
    data: Data,
    tokenizer: CLIPTokenizer,
    rng: random.Random,
) -> Iterator[float]:
    """Train `unet` and `text` of `model` to the run's end, and give each step's loss."""
    schedule = new_schedule()

    def loss() -> Tensor:
        latents, texts = batch_of(data, rng, run.batch)
        conditioning = encode_text(model["text"], tokenise(tokenizer, texts).to(run.device))  # type: ignore[arg-type]
        return noise_loss(model["unet"], schedule, latents, conditioning)  # type: ignore[arg-type]

    yield from _steps(run, model, average, optimisers, loss)


def imitate(
    run: Run,
    model: nn.ModuleDict,
    average: Average,
    optimisers: Optimisers,
    lessons: Sequence[Lesson],
    tokenizer: CLIPTokenizer,
    rng: random.Random,
) -> Iterator[float]:
    """As `train`, from lessons that have equal parts of each batch."""
    schedule = new_schedule()

    def loss() -> Tensor:
        size = run.batch // len(lessons)
        parts = [imitation_loss(model, lesson, schedule, tokenizer, rng, size) for lesson in lessons]
        return torch.stack(parts).sum()

    yield from _steps(run, model, average, optimisers, loss)


def _steps(
    run: Run, model: nn.ModuleDict, average: Average, optimisers: Optimisers, loss_of: Callable[[], Tensor]
) -> Iterator[float]:
    while (progress := run.progress) < 1:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(learning_rate(progress))
        average.update(model, run.step)
        run.tick()
        yield loss.item()
