"""The base model: UNet and text encoder, together, on latents of the base domain."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from loratorio_lab.toybox.models import new_text_encoder, new_unet, new_vae, text_config
from loratorio_lab.toybox.tokens import write_tokenizer
from loratorio_lab.toybox.world import random_scene
from loratorio_lab.train.common import Average, Optimisers, Run, seed_everything
from loratorio_lab.train.diffusion import encode_scenes, train

SCENES = 6000


def start_quietly(unet: UNet2DConditionModel) -> None:
    """Zero each residual branch's last layer, as LDM does: the untrained net predicts no noise at all."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def load_vae(work: Path, state: str, device: str) -> AutoencoderKL:
    vae = new_vae()
    vae.load_state_dict(torch.load(work / f"{state}.pt", map_location="cpu", weights_only=True)["average"])
    return vae.to(device).eval().requires_grad_(False)


def new_base(text_folder: Path, device: str) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Untrained networks and the tokenizer, whose files are written anew."""
    config = text_config(*write_tokenizer(text_folder))
    config.save_pretrained(text_folder)
    tokenizer = CLIPTokenizer.from_pretrained(str(text_folder))
    unet = new_unet().to(device)
    start_quietly(unet)
    return unet, new_text_encoder(config).to(device), tokenizer


def latent_scale(vae: AutoencoderKL, rng: random.Random) -> float:
    """SD's scale factor: one over the spread of the base domain's latents."""
    data = encode_scenes(vae, 1.0, [random_scene(rng) for _ in range(256)])
    return round(1 / float(data.latents.std()), 5)


def train_base(run: Run, lr: float, text_folder: Path, vae_state: str = "vae_coarse") -> None:
    seed_everything(run.seed)
    vae = load_vae(run.work, vae_state, run.device)
    scale = latent_scale(vae, random.Random(run.seed))
    rng = random.Random(run.seed + 1)
    data = encode_scenes(vae, scale, [random_scene(rng) for _ in range(SCENES)])
    unet, text, tokenizer = new_base(text_folder, run.device)
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = Average(model)
    optimisers = Optimisers(list(model.named_parameters()), lr)
    run.resume(model=model, average=average, optimisers=optimisers)
    rng = random.Random(run.seed + run.step)
    run.announce(model)
    run.say(f"latent scale {scale}, {SCENES} scenes")
    total = 0.0
    for loss in train(run, model, average, optimisers, data, tokenizer, rng):
        total += loss
        if run.step % 100 == 0:
            run.say(f"step {run.step} loss {total / 100:.4f} minutes {run.spent / 60:.1f}")
            total = 0.0
            run.save(model=model, average=average, optimisers=optimisers, scale=scale)
    run.save(model=model, average=average, optimisers=optimisers, scale=scale)
