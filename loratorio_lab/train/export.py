"""Trained parts in, the shipped checkpoint out."""

from __future__ import annotations

from pathlib import Path

import torch

from loratorio_lab.toybox.ldm import TEXT_NAME, save_checkpoint, to_ldm
from loratorio_lab.train.base import load_vae, new_base
from loratorio_lab.train.diffusion import new_schedule


def export_checkpoint(work: Path, vae_state: str, out: Path) -> None:
    """Write toybox.safetensors, toybox.yaml and the text folder from the averaged weights in `work`."""
    vae = load_vae(work, vae_state, "cpu")
    unet, text, _ = new_base(out / TEXT_NAME, "cpu")
    state = torch.load(work / "base.pt", map_location="cpu", weights_only=True)
    torch.nn.ModuleDict({"unet": unet, "text": text}).load_state_dict(state["average"])
    weights = to_ldm(unet.state_dict(), vae.state_dict(), text.state_dict(), new_schedule().alphas_cumprod)
    save_checkpoint(weights, state["scale"], out / "toybox.safetensors")
