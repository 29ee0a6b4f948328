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


def batch_of(data: Data, rng: random.Random, size: int) -> tuple[Tensor, list[str]]:
    """Random latents and their captions, a tenth of the captions empty."""
    chosen = [rng.randrange(len(data.captions)) for _ in range(size)]
    texts = ["" if rng.random() < CAPTION_DROPOUT else data.captions[i] for i in chosen]
    return data.latents[chosen], texts


def noise_loss(
    unet: UNet2DConditionModel, schedule: DDPMScheduler, latents: Tensor, conditioning: Tensor
) -> Tensor:
    """Squared error of the predicted noise, weighted min(SNR, 5)/SNR (Hang et al. 2023)."""
    noise = torch.randn_like(latents)
    times = torch.randint(0, 1000, (len(latents),), device=latents.device)
    made = unet(schedule.add_noise(latents, noise, times), times, conditioning).sample
    alphas = schedule.alphas_cumprod.to(latents.device)[times]
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=SNR_CAP) / snr
    loss: Tensor = (weight * (made - noise).square().mean(dim=(1, 2, 3))).mean()
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
    while (progress := run.progress) < 1:
        latents, texts = batch_of(data, rng, run.batch)
        conditioning = encode_text(model["text"], tokenise(tokenizer, texts).to(run.device))  # type: ignore[arg-type]
        loss = noise_loss(model["unet"], schedule, latents, conditioning)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(learning_rate(progress))
        average.update(model, run.step)
        run.tick()
        yield loss.item()
