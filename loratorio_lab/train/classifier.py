"""Trains the classifier on renders of the whole world, degraded like generated pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from loratorio_lab.toybox.classifier import Classifier, save_classifier
from loratorio_lab.toybox.world import World
from loratorio_lab.train.common import Average, Optimisers, Run, pictures, run_steps, seed_everything

POOL = 40_000
REBUILT = 12_000
"""Of these, how many are also shown through the autoencoder."""
HELD_OUT = 800
CHUNK = 64


@dataclass
class Truth:
    """Pictures of one size (N, 3, H, W) uint8, what they show (N, names), and whether that is decided (N, names)."""

    images: Tensor
    shown: Tensor
    decided: Tensor


def truth(world: World, scenes: Sequence[Any]) -> Truth:
    shown = [[float(name in names) for name in world.judged] for names in map(world.shows, scenes)]
    decided = [[float(name not in names) for name in world.judged] for names in map(world.undecided, scenes)]
    drawn = torch.cat(
        [as_bytes(pictures(world, scenes[i : i + CHUNK])) for i in range(0, len(scenes), CHUNK)]
    )
    return Truth(drawn, torch.tensor(shown), torch.tensor(decided))


def as_bytes(images: Tensor) -> Tensor:
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def as_floats(images: Tensor) -> Tensor:
    return images.float().div(127.5).sub(1)


@torch.no_grad()
def rebuilt(vae: AutoencoderKL, images: Tensor, spread: float) -> Tensor:
    """The images (uint8) through the autoencoder, with noise of `spread` times their own spread on the latents."""
    made = []
    for part in torch.split(images, CHUNK):
        latents = vae.encode(as_floats(part).to(vae.device)).latent_dist.mean
        made.append(
            as_bytes(vae.decode(latents + spread * latents.std() * torch.randn_like(latents)).sample).cpu()
        )
    return torch.cat(made)


def with_rebuilt(vae: AutoencoderKL, clean: Truth, count: int) -> Truth:
    """The pictures, and `count` of them through the autoencoder, half of these with more noise."""
    some = slice(0, count)
    parts = zip(clean.images[some].chunk(2), (0.1, 0.25), strict=True)
    images = torch.cat([clean.images, *(rebuilt(vae, part, spread) for part, spread in parts)])
    shown, decided = (torch.cat([each, each[some]]) for each in (clean.shown, clean.decided))
    return Truth(images, shown, decided)


def worn(images: Tensor, rng: random.Random) -> Tensor:
    """Noise, blur, contrast and a shift of up to four pixels: what must not change the answer."""
    height, width = images.shape[-2:]
    if rng.random() < 0.5:
        images = images + rng.uniform(0, 0.25) * torch.randn_like(images)
    if rng.random() < 0.4:
        images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    if rng.random() < 0.5:
        images = images * rng.uniform(0.8, 1.15) + rng.uniform(-0.1, 0.1)
    down, right = (rng.randint(0, 8), rng.randint(0, 8))
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return padded[..., down : down + height, right : right + width]


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, of: Truth, names: int, device: str) -> tuple[float, ...]:
    """Of the first `names`: (all right, found where present, claimed where absent), each a share."""
    said = torch.cat([model(as_floats(part).to(device)).cpu() for part in torch.split(images, CHUNK)]) > 0
    there, decided = (each[:, :names] > 0.5 for each in (of.shown, of.decided))
    right = (said[:, :names] == there) | ~decided
    found, wrong = (said[:, :names][each & decided].float().mean() for each in (there, ~there))
    return float(right.all(dim=1).float().mean()), float(found), float(wrong)


def train_classifier(run: Run, lr: float, world: World, vae: AutoencoderKL, out: Path) -> None:
    rng = seed_everything(run.seed)
    sources = []
    for width, share in zip(world.widths, world.shares, strict=True):
        scenes = [world.any_scene(rng, width) for _ in range(round(share * POOL))]
        sources.append(
            with_rebuilt(vae, truth(world, scenes), min(round(share * REBUILT), len(scenes)) // 2 * 2)
        )
    model = Classifier(world.judged, world.pixels).to(run.device)
    average = Average(model, 0.99)
    optimisers = Optimisers(list(model.named_parameters()), lr, muon=False)
    run.resume(model=model, average=average, optimisers=optimisers)
    rng = run.rng()

    def losses() -> dict[str, Tensor]:
        source = rng.choices(sources, world.shares)[0]
        chosen = torch.tensor([rng.randrange(len(source.images)) for _ in range(run.batch)])
        images = worn(as_floats(source.images[chosen]).to(run.device), rng)
        shown, decided = (each[chosen].to(run.device) for each in (source.shown, source.decided))
        return {"loss": F.binary_cross_entropy_with_logits(model(images), shown, decided)}

    run_steps(run, model, average, optimisers, losses, every=200)
    report(run, average.model, world, vae)
    save_classifier(average.model, out)


def report(run: Run, model: Classifier, world: World, vae: AutoencoderKL) -> None:
    """Log its accuracy on held-out scenes, as rendered and through the autoencoder: first of the elements, then of all names."""
    rng = random.Random(run.seed + 999_983)
    for width in world.widths:
        held = truth(world, [world.any_scene(rng, width) for _ in range(HELD_OUT // len(world.widths))])
        through = rebuilt(vae, held.images, 0.06)
        for kind, images in (("rendered", held.images), ("through the autoencoder", through)):
            for names in dict.fromkeys((len(world.elements), len(world.judged))):
                exact, found, wrong = accuracy(model, images, held, names, run.device)
                run.say(
                    f"held out, {width} wide, {kind}, {names} names: all right {exact:.1%}, found {found:.1%}, "
                    f"claimed in vain {wrong:.2%}"
                )
