"""Trained parts in, the shipped checkpoint out."""

from __future__ import annotations

from pathlib import Path

import torch

from loratorio_lab.toybox.ldm import TEXT_NAME, save_checkpoint, to_ldm
from loratorio_lab.toybox.world import World
from loratorio_lab.train.base import load_vae, new_base
from loratorio_lab.train.common import Run, averaged
from loratorio_lab.train.diffusion import new_schedule


def export_checkpoint(run: Run, world: World, out: Path) -> None:
    """Write toybox.safetensors, toybox.yaml and the text folder from the averaged weights of the run's folders."""
    vae = load_vae(run)
    unet, text, _ = new_base(world, out / TEXT_NAME, "cpu")
    weights, numbers = averaged("base", run.work)
    torch.nn.ModuleDict({"unet": unet, "text": text}).load_state_dict(weights)
    made = to_ldm(unet.state_dict(), vae.state_dict(), text.state_dict(), new_schedule().alphas_cumprod)
    save_checkpoint(made, numbers["scale"], world.pixels, out / "toybox.safetensors")
