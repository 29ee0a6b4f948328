"""The classifier: renders of the whole world, worn down the way a generated picture is."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from loratorio_lab.toybox.classifier import NAMES, Classifier
from loratorio_lab.toybox.world import Scene
from loratorio_lab.train.common import (
    Average,
    Optimisers,
    Run,
    any_scene,
    learning_rate,
    pictures,
    seed_everything,
)

POOL = 5000
REBUILT = 2000
HELD_OUT = 800


def labels(scenes: list[Scene]) -> Tensor:
    """(B, elements), 1 where the scene holds the element."""
    return torch.tensor([[float(name in scene.elements()) for name in NAMES] for scene in scenes])


@torch.no_grad()
def rebuilt(vae: AutoencoderKL, images: Tensor, spread: float) -> Tensor:
    """The images through the autoencoder, their latents shaken by noise of `spread` times their own."""
    made = []
    for part in torch.split(images, 64):
        latents = vae.encode(part).latent_dist.mean
        made.append(
            vae.decode(latents + spread * latents.std() * torch.randn_like(latents)).sample.clamp(-1, 1)
        )
    return torch.cat(made)


def worn(images: Tensor, rng: random.Random) -> Tensor:
    """Noise, blur, contrast and a shift of up to four pixels: what must not change the answer."""
    if rng.random() < 0.5:
        images = images + rng.uniform(0, 0.25) * torch.randn_like(images)
    if rng.random() < 0.4:
        images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    if rng.random() < 0.5:
        images = images * rng.uniform(0.8, 1.15) + rng.uniform(-0.1, 0.1)
    shift = (rng.randint(-4, 4), rng.randint(-4, 4))
    return F.pad(images, (4, 4, 4, 4), mode="replicate")[
        ..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]
    ]


def accuracy(model: Classifier, images: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """(all elements right, found where present, claimed where absent), each a share."""
    with torch.no_grad():
        said = torch.cat([model(part) for part in torch.split(images, 128)]) > 0
    there = truth > 0.5
    exact = (said == there).all(dim=1).float().mean()
    return float(exact), float(said[there].float().mean()), float(said[~there].float().mean())


def train_classifier(run: Run, lr: float, vae: AutoencoderKL, out: Path) -> None:
    rng = seed_everything(run.seed)
    scenes = [any_scene(rng) for _ in range(POOL)]
    clean, truth = pictures(scenes), labels(scenes)
    some = slice(0, min(REBUILT, POOL))
    through = torch.cat(
        [rebuilt(vae, part, spread) for part, spread in zip(clean[some].chunk(2), (0.1, 0.25), strict=True)]
    )
    sources = torch.cat([clean, through]).to(run.device)
    truth = torch.cat([truth, truth[some]]).to(run.device)
    model = Classifier().to(run.device)
    average = Average(model, 0.99)
    optimisers = Optimisers(list(model.named_parameters()), lr, muon=False)
    run.resume(model=model, average=average, optimisers=optimisers)
    rng = random.Random(run.seed + run.step)
    run.announce(model)
    while (progress := run.progress) < 1:
        chosen = torch.tensor([rng.randrange(len(sources)) for _ in range(run.batch)], device=run.device)
        loss = F.binary_cross_entropy_with_logits(model(worn(sources[chosen], rng)), truth[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimisers.step(learning_rate(progress))
        average.update(model, run.step)
        run.tick()
        if run.step % 200 == 0:
            run.say(f"step {run.step} loss {loss.item():.4f} minutes {run.spent / 60:.1f}")
            run.save(model=model, average=average, optimisers=optimisers)
    run.save(model=model, average=average, optimisers=optimisers)
    report(run, average.model, vae)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.half().contiguous().cpu() for name, value in average.model.state_dict().items()}, out
    )


def report(run: Run, model: torch.nn.Module, vae: AutoencoderKL) -> None:
    """Say how it does on scenes it never saw: as rendered, and through the autoencoder."""
    assert isinstance(model, Classifier)
    rng = random.Random(run.seed + 999_983)
    scenes = [any_scene(rng) for _ in range(HELD_OUT)]
    images, truth = pictures(scenes).to(run.device), labels(scenes).to(run.device)
    for kind, shown in (("rendered", images), ("through the autoencoder", rebuilt(vae, images, 0.06))):
        exact, found, wrong = accuracy(model, shown, truth)
        run.say(f"held out, {kind}: all right {exact:.1%}, found {found:.1%}, claimed in vain {wrong:.2%}")
