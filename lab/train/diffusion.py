"""What training the base model and training a LoRA share: latents, noise, the loss, the steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lab.toybox.models import TOKENS
from lab.toybox.world import Scene, caption
from lab.train.common import Average, Optimisers, Run, learning_rate, pictures

CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0
PRIOR_DROPOUT = 0.2
PRIOR_WEIGHT = 1.0


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
def encode_scenes(vae: AutoencoderKL, scale: float, scenes: Sequence[Scene], chunk: int = 64) -> Data:
    """Render and encode scenes once, so that training never touches the autoencoder again."""
    device = next(vae.parameters()).device
    parts = []
    for i in range(0, len(scenes), chunk):
        images = pictures(scenes[i : i + chunk]).to(device)
        parts.append(vae.encode(images).latent_dist.mean * scale)
    return Data(torch.cat(parts), [caption(scene) for scene in scenes])


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
class Prior:
    """Prior preservation (DreamBooth's, arXiv 2208.12242, section 3.3): on these scenes the model shall predict what the base does.

    Attributes:
        unet, text: the base's, frozen.
        data: scenes of what the base knows, without the new thing.
    """

    unet: UNet2DConditionModel
    text: CLIPTextModel
    data: Data


def batch_of(
    data: Data, rng: random.Random, size: int, dropout: float = CAPTION_DROPOUT
) -> tuple[Tensor, list[str]]:
    """Random latents and their captions, a part of the captions empty."""
    chosen = [rng.randrange(len(data.captions)) for _ in range(size)]
    texts = ["" if rng.random() < dropout else data.captions[i] for i in chosen]
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


def prior_loss(
    model: nn.ModuleDict, prior: Prior, schedule: DDPMScheduler, latents: Tensor, ids: Tensor
) -> Tensor:
    """Squared distance of the predicted noise from the base's, weighted by `snr_weight`."""
    times = random_times(latents)
    noisy = schedule.add_noise(latents, torch.randn_like(latents), times)
    with torch.no_grad():
        wanted = prior.unet(noisy, times, encode_text(prior.text, ids)).sample
    made = model["unet"](noisy, times, encode_text(model["text"], ids)).sample  # type: ignore[arg-type]
    error = (made - wanted).square().mean(dim=(1, 2, 3))
    loss: Tensor = (snr_weight(schedule, times) * error).mean()
    return loss


def train(
    run: Run,
    model: nn.ModuleDict,
    average: Average,
    optimisers: Optimisers,
    data: Data,
    tokenizer: CLIPTokenizer,
    rng: random.Random,
    prior: Prior | None = None,
) -> Iterator[float]:
    """Train `unet` and `text` of `model` to the run's end, and give each step's loss.

    With a prior half of each batch is the prior's, and the empty captions are all there: what has no words stays the base's.
    """
    schedule = new_schedule()
    share = 1 if prior is None else 2
    dropout = CAPTION_DROPOUT if prior is None else 0.0
    while (progress := run.progress) < 1:
        latents, texts = batch_of(data, rng, run.batch // share, dropout)
        conditioning = encode_text(model["text"], tokenise(tokenizer, texts).to(run.device))  # type: ignore[arg-type]
        loss = noise_loss(model["unet"], schedule, latents, conditioning)  # type: ignore[arg-type]
        if prior is not None:
            latents, texts = batch_of(prior.data, rng, run.batch // share, PRIOR_DROPOUT)
            ids = tokenise(tokenizer, texts).to(run.device)
            loss = loss + PRIOR_WEIGHT * prior_loss(model, prior, schedule, latents, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(learning_rate(progress))
        average.update(model, run.step)
        run.tick()
        yield loss.item()
