"""The autoencoder, in two stages.

`coarse` trains encoder and decoder together, with the decoder's output taken one level early, at half the size: a third of the cost.
Then the encoder, and with it the latents, stand still, so that the base model can train on them meanwhile, and `fine` trains the
whole decoder at full size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from loratorio_lab.toybox.models import new_vae
from loratorio_lab.toybox.subjects import BASE_ARTIST
from loratorio_lab.toybox.world import Scene, World
from loratorio_lab.train.common import (
    Average,
    Optimisers,
    Run,
    averaged,
    pictures,
    run_steps,
    seed_everything,
)

LATENT_NOISE, FINE_LATENT_NOISE = 0.06, 0.12
"""Spread of the noise on a latent, in units of the latents' own: the decoder must tolerate a sampler's small errors."""


def reconstruction_loss(made: Tensor, truth: Tensor) -> Tensor:
    """L1, and L1 of the differences of neighbouring pixels, which sharpens edges."""
    loss = F.l1_loss(made, truth)
    for axis in (-1, -2):
        loss = loss + 0.5 * F.l1_loss(made.diff(dim=axis), truth.diff(dim=axis))
    return loss


def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The mean latents (B, 4, H/8, W/8) of images (B, 3, H, W), not scaled."""
    mean: Tensor = vae.encode(images).latent_dist.mean
    return mean


def decode_coarse(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The decoder without its last level: images (B, 3, 4h, 4w) of latents (B, 4, h, w)."""
    decoder = vae.decoder
    h = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks[:-2]:
        h = block(h)
    for resnet in decoder.up_blocks[-2].resnets:
        h = resnet(h, None)
    made: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
    return made


@torch.no_grad()
def start_as_scaling(vae: AutoencoderKL) -> None:
    """Let every residual branch begin at zero and every change of size pass its input on, so that colours are there from the start."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d) and "samplers" in name:
            for c in range(module.in_channels):
                if module.stride == (2, 2):
                    module.weight[c, c, :2, :2] += 0.25
                else:
                    module.weight[c, c, 1, 1] += 1


def train_vae(run: Run, lr: float, world: World, fine: bool) -> None:
    seed_everything(run.seed)
    vae = new_vae().to(run.device)
    start_as_scaling(vae)
    if fine:
        vae.load_state_dict(averaged("vae_coarse", run.work)[0])
    average = Average(vae)
    halves = [vae.decoder] if fine else [vae.encoder, vae.decoder]
    named = [(name, p) for half in halves for name, p in half.named_parameters()]
    optimisers = Optimisers(named, lr)
    run.resume(model=vae, average=average, optimisers=optimisers)
    vae.to(memory_format=torch.channels_last)
    rng = run.rng()
    spread = FINE_LATENT_NOISE if fine else LATENT_NOISE

    def scene(width: int) -> Scene:
        """Anything for the encoder; for the fine decoder what base and LoRAs draw, as they draw it."""
        return world.any_scene(rng, width, BASE_ARTIST) if fine else world.varied_scene(rng, width)

    def losses() -> dict[str, Tensor]:
        width = rng.choices(world.widths, world.shares)[0]
        images = pictures(world, (scene(width) for _ in range(run.batch)))
        images = images.to(run.device, memory_format=torch.channels_last)
        with run.lower_precision():
            with torch.set_grad_enabled(not fine):
                latents = latents_of(vae, images)
            noisy = latents + spread * latents.detach().std() * torch.randn_like(latents)
            made = (vae.decode(noisy).sample if fine else decode_coarse(vae, noisy)).float()
        truth = images if fine else F.avg_pool2d(images, 2)
        loss = reconstruction_loss(made, truth) + 1e-3 * latents.float().square().mean()
        return {"loss": loss, "L1": F.l1_loss(made.detach(), truth)}

    run_steps(run, vae, average, optimisers, losses)
