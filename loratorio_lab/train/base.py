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
from loratorio_lab.toybox.world import World
from loratorio_lab.train.common import (
    Average,
    Optimisers,
    Run,
    averaged,
    is_trained,
    run_steps,
    seed_everything,
)
from loratorio_lab.train.diffusion import Data, encode_domain, encode_scenes, noise_losses


def start_quietly(unet: UNet2DConditionModel) -> None:
    """Zero each residual branch's last layer, as LDM does: the untrained net predicts no noise at all."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def load_vae(run: Run, fine: bool = True) -> AutoencoderKL:
    """The trained autoencoder, frozen. fine: with the decoder of the second stage, if there is one. The encoder is the first's."""
    vae = new_vae()
    stages = ("vae_fine", "vae_coarse") if fine else ("vae_coarse",)
    stage = next((stage for stage in stages if is_trained(stage, run.work)), "vae_coarse")
    vae.load_state_dict(averaged(stage, run.work)[0])
    return vae.to(run.device).eval().requires_grad_(False)


def new_base(
    world: World, text_folder: Path, device: str
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Untrained networks and the tokenizer, whose files are written anew."""
    config = text_config(*write_tokenizer(text_folder, world.words()))
    config.save_pretrained(text_folder)
    tokenizer = CLIPTokenizer.from_pretrained(str(text_folder))
    unet = new_unet().to(device)
    start_quietly(unet)
    return unet, new_text_encoder(config).to(device), tokenizer


def latent_scale(vae: AutoencoderKL, world: World, rng: random.Random) -> float:
    """SD's scale factor: one over the spread of the base domain's latents."""
    scenes = [world.random_scene(rng, width=world.widths[0]) for _ in range(256)]
    return round(1 / float(encode_scenes(vae, 1.0, world, scenes).latents.std()), 5)


def base_domain(run: Run, world: World, vae: AutoencoderKL) -> tuple[float, list[Data]]:
    """The latents' scale, and `world.scenes` scenes of the base domain, encoded; made once and kept in the run's folder."""
    file = run.work / "base_latents.pt"
    key = {"scenes": world.scenes, "seed": run.seed, "encoder": float(vae.encoder.conv_out.weight.sum())}
    if file.exists():
        found = torch.load(file, weights_only=True)
        if found["key"] == key:
            return found["scale"], [Data(latents.float(), captions) for latents, captions in found["data"]]
    scale = latent_scale(vae, world, random.Random(run.seed))
    data = encode_domain(vae, scale, world, random.Random(run.seed + 1), world.scenes)
    torch.save(
        {"key": key, "scale": scale, "data": [(each.latents.half(), each.captions) for each in data]}, file
    )
    return scale, data


def train_base(run: Run, lr: float, world: World, text_folder: Path) -> None:
    seed_everything(run.seed)
    scale, data = base_domain(run, world, load_vae(run, fine=False))
    unet, text, tokenizer = new_base(world, text_folder, run.device)
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = Average(model)
    optimisers = Optimisers(list(model.named_parameters()), lr)
    run.resume(model=model, average=average, optimisers=optimisers)
    rng = run.rng()
    run.say(f"latent scale {scale}, {world.scenes} scenes")
    losses = noise_losses(run, model, [data], tokenizer, rng)
    run_steps(run, model, average, optimisers, losses, every=100, scale=scale)
