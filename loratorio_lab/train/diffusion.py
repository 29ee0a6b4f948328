"""What training the base model and training a LoRA share: latents, noise, the loss, the steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from loratorio_lab.toybox.models import TOKENS
from loratorio_lab.toybox.world import World
from loratorio_lab.train.common import Run, pictures

CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0


def new_schedule() -> DDPMScheduler:
    """SD 1's thousand steps: the square roots of beta go linearly from 0.00085 to 0.012."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )


@dataclass
class Data:
    """Latents of one size (N, 4, h, w), already scaled to unit spread, and their captions."""

    latents: Tensor
    captions: list[str]


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL,
    scale: float,
    world: World,
    scenes: Sequence[Any],
    chunk: int = 64,
    captions: Sequence[str] | None = None,
) -> Data:
    """Render and encode scenes of one size once, so that training never touches the autoencoder again.

    Without captions, the scenes' own.
    """
    device = next(vae.parameters()).device
    parts = []
    for i in range(0, len(scenes), chunk):
        images = pictures(world, scenes[i : i + chunk]).to(device)
        parts.append(vae.encode(images).latent_dist.mean * scale)
    return Data(torch.cat(parts), list(captions or map(world.caption, scenes)))


def encode_domain(
    vae: AutoencoderKL, scale: float, world: World, rng: random.Random, count: int, *names: str
) -> list[Data]:
    """`count` random scenes with the named elements in the widths of the world, one `Data` for each width."""
    return [
        encode_scenes(
            vae,
            scale,
            world,
            [world.random_scene(rng, *names, width=width) for _ in range(round(share * count))],
        )
        for width, share in zip(world.widths, world.shares, strict=True)
    ]


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
    """Random latents and their captions, a part of the captions empty."""
    chosen = [rng.randrange(len(data.captions)) for _ in range(size)]
    texts = ["" if rng.random() < CAPTION_DROPOUT else data.captions[i] for i in chosen]
    return data.latents[chosen], texts


def snr_weight(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    """min(SNR, 5)/SNR at these timesteps, (B,) (Hang et al. 2023)."""
    snr = _snr(schedule, times)
    weight: Tensor = snr.clamp(max=SNR_CAP) / snr
    return weight


def level_weight(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    """`snr_weight` times SNR^−0.65, that within 0.1 and 40, (B,): all noise levels then have losses of about the same size.

    What is where is decided at high noise, where errors are small in the noise.
    """
    weight: Tensor = snr_weight(schedule, times) * _snr(schedule, times).pow(-0.65).clamp(0.1, 40)
    return weight


def _snr(schedule: DDPMScheduler, times: Tensor) -> Tensor:
    alphas = schedule.alphas_cumprod.to(times.device)[times]
    snr: Tensor = alphas / (1 - alphas)
    return snr


def random_times(latents: Tensor) -> Tensor:
    return torch.randint(0, 1000, (len(latents),), device=latents.device)


def noise_loss(
    unet: UNet2DConditionModel, schedule: DDPMScheduler, latents: Tensor, conditioning: Tensor
) -> Tensor:
    """Squared error of the predicted noise, weighted by `level_weight`."""
    noise, times = torch.randn_like(latents), random_times(latents)
    made = unet(schedule.add_noise(latents, noise, times), times, conditioning).sample
    error = (made.float() - noise).square().mean(dim=(1, 2, 3))
    loss: Tensor = (level_weight(schedule, times) * error).mean()
    return loss


def noise_losses(
    run: Run,
    model: nn.ModuleDict,
    kinds: Sequence[Sequence[Data]],
    tokenizer: CLIPTokenizer,
    rng: random.Random,
) -> Callable[[], dict[str, Tensor]]:
    """What `run_steps` trains `unet` and `text` of `model` with: kinds of pictures that have equal parts of each batch.

    kinds: of each, one `Data` for each width; a batch has one width.
    """
    schedule = new_schedule()
    # Fused attention's backward pass takes a third of a step on a processor.
    model["unet"].set_attn_processor(AttnProcessor())  # type: ignore[operator]
    shares = [len(data.captions) for data in kinds[0]]

    def losses() -> dict[str, Tensor]:
        width = rng.choices(range(len(shares)), shares)[0]
        parts = [batch_of(kind[width], rng, run.batch // len(kinds)) for kind in kinds]
        latents = torch.cat([part for part, _ in parts]).to(run.device)
        ids = tokenise(tokenizer, [text for _, texts in parts for text in texts]).to(run.device)
        with run.lower_precision():
            conditioning = encode_text(model["text"], ids)  # type: ignore[arg-type]
            return {"loss": noise_loss(model["unet"], schedule, latents, conditioning)}  # type: ignore[arg-type]

    return losses
