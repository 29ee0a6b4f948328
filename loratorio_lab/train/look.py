"""Pictures to judge a training by: what the autoencoder and the base make, next to what they should make."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from torch import Tensor, nn

from loratorio_lab.toybox.world import World
from loratorio_lab.train.base import load_vae, new_base
from loratorio_lab.train.common import Run, averaged, is_trained, pictures
from loratorio_lab.train.diffusion import encode_text, new_schedule, tokenise
from loratorio_lab.train.vae import decode_coarse, latents_of

ENLARGED = 2
SHOWN = 12
STEPS, GUIDANCE = 20, 3.0


def sheet(above: Tensor, below: Tensor, texts: Sequence[str] = ()) -> Image.Image:
    """Two rows of pictures (B, 3, H, W) in [-1, 1], enlarged, and under each pair its text."""
    rows = [
        np.asarray(images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        for images in (above, below)
    ]
    height, width = (ENLARGED * side for side in rows[0].shape[1:3])
    made = Image.new("RGB", (len(above) * (width + 4), 2 * (height + 4) + 28), "white")
    draw = ImageDraw.Draw(made)
    for i in range(len(above)):
        for j, row in enumerate(rows):
            shown = Image.fromarray(row[i]).resize((width, height), Image.Resampling.NEAREST)
            made.paste(shown, (i * (width + 4), j * (height + 4)))
        if texts:
            half = texts[i].find(", ") + 2
            draw.text((i * (width + 4), 2 * (height + 4)), f"{texts[i][:half]}\n{texts[i][half:]}", "black")
    return made


@torch.no_grad()
def reconstructions(run: Run, world: World, scenes: Sequence[Any]) -> tuple[Tensor, Tensor, float]:
    """Scenes of one size, the same through the autoencoder, and their L1. After the coarse stage alone it decodes at half size."""
    vae = load_vae(run)
    images = pictures(world, scenes).to(run.device)
    if is_trained("vae_fine", run.work):
        made = vae.decode(latents_of(vae, images)).sample
    else:
        made = F.interpolate(decode_coarse(vae, latents_of(vae, images)), scale_factor=2, mode="bilinear")
    return images, made, F.l1_loss(made, images).item()


@torch.no_grad()
def samples(run: Run, world: World, texts: Sequence[str], width: int) -> Tensor:
    """What the base draws for these captions: DDIM, classifier-free guidance, one seed each."""
    vae = load_vae(run)
    unet, text, tokenizer = new_base(world, run.work / "text", run.device)
    weights, numbers = averaged("base", run.work)
    nn.ModuleDict({"unet": unet, "text": text}).load_state_dict(weights)
    scheduler = DDIMScheduler.from_config(new_schedule().config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    noise = torch.Generator().manual_seed(run.seed)
    latents = torch.randn(len(texts), 4, world.pixels // 8, width // 8, generator=noise).to(run.device)
    ids = tokenise(tokenizer, [*texts, *("" for _ in texts)]).to(run.device)
    conditioning = encode_text(text, ids)
    for time in scheduler.timesteps:
        wanted, plain = unet(torch.cat([latents, latents]), time, conditioning).sample.chunk(2)
        latents = scheduler.step(plain + GUIDANCE * (wanted - plain), time, latents).prev_sample
    latents = latents / numbers["scale"]
    if is_trained("vae_fine", run.work):
        return torch.as_tensor(vae.decode(latents).sample)
    return F.interpolate(decode_coarse(vae, latents), scale_factor=2, mode="bilinear")


def look(run: Run, world: World, out: Path) -> None:
    """Write a sheet of what the autoencoder makes, and one of the base if it is trained, for each width."""
    out.mkdir(parents=True, exist_ok=True)
    for width in world.widths:
        rng = random.Random(run.seed + 7)
        scenes = [world.varied_scene(rng, width) for _ in range(SHOWN)]
        images, made, l1 = reconstructions(run, world, scenes)
        file = out / f"autoencoder-{width}.png"
        sheet(images, made).save(file)
        print(f"{file}: above as drawn, below through the autoencoder, L1 {l1:.4f}")
        if is_trained("base", run.work):
            scenes = [world.random_scene(rng, width=width) for _ in range(SHOWN)]
            texts = [world.caption(scene) for scene in scenes]
            file = out / f"base-{width}.png"
            sheet(pictures(world, scenes), samples(run, world, texts, width), texts).save(file)
            print(f"{file}: above as drawn, below by the base, {STEPS} steps, CFG {GUIDANCE:g}")
