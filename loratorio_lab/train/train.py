"""`loratorio-lab train PART`: train a part of the toybox, or all of it, and write the files that ship.

A killed run goes on where it was when the same command is given again; `--work` holds the state. Order: vae (coarse, then fine),
classifier, base, export, unregularised, loras. `look` draws what autoencoder and base make, to judge by eye.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.toybox.classifier import classifier_file
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.toybox.world import World, add_art, open_world
from loratorio_lab.train.base import load_vae, train_base
from loratorio_lab.train.classifier import train_classifier
from loratorio_lab.train.common import Run
from loratorio_lab.train.export import export_checkpoint
from loratorio_lab.train.look import look
from loratorio_lab.train.loras import train_lora
from loratorio_lab.train.vae import train_vae

# steps, batch, learning rate: what the shipped files were trained with (docs/lab/TOYBOX.md says where it differed).
PLANS: dict[str, tuple[int, int, float]] = {
    "vae_coarse": (8000, 8, 4e-3),
    "vae_fine": (4700, 8, 3e-3),
    "classifier": (17000, 32, 2e-3),
    "base": (10000, 32, 2e-3),
    "unregularised": (600, 16, 3e-3),
    "loras": (600, 16, 3e-3),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loratorio-lab train", description=__doc__)
    parser.add_argument("part", choices=[*PLANS, "vae", "export", "look", "all"])
    add_art(parser)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="folder of the training state")
    parser.add_argument("--out", type=Path, default=toybox.FOLDER, help="folder of the trained files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps of the part (of each LoRA, for loras)")
    parser.add_argument("--minutes", type=float, help="time for it, instead of steps or as a further limit")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="forward in bfloat16, where the processor is faster so"
    )
    parser.add_argument("--only", nargs="*", help="for unregularised and loras: these elements")
    return parser.parse_args(arguments)


def new_run(options: argparse.Namespace, part: str, seed: int = 0, element: str = "") -> tuple[Run, float]:
    """The run of a part, or of one element's LoRA, and its learning rate: the plan's values, or the requested ones."""
    steps: float
    steps, batch, rate = PLANS[part]
    if options.minutes is not None:
        steps = math.inf
    run = Run(
        f"{part}_{element}" if element else part,
        options.work,
        options.out / "model" / "train.log",
        options.device,
        math.inf if options.minutes is None else options.minutes,
        options.steps or steps,
        options.seed + seed,
        options.batch or batch,
        options.bf16,
    )
    return run, options.rate or rate


def do_loras(options: argparse.Namespace, world: World, part: str) -> None:
    model = options.out / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    vae = pipeline.vae.to(options.device).eval().requires_grad_(False)
    unet, text = pipeline.unet.to(options.device), pipeline.text_encoder.to(options.device)
    unknown = set(options.only or ()) - {element.name for element in world.elements}
    if unknown:
        raise LoratorioError(f"--only: there is no element {', '.join(sorted(unknown))}.")
    for i, element in enumerate(world.elements):
        if options.only and element.name not in options.only:
            continue
        # People train styles without regularisation pictures.
        regularised = part == "loras" and element.category != "style"
        run, rate = new_run(options, part, seed=100 + i, element=element.name)
        train_lora(
            run,
            rate,
            world,
            element,
            (vae, vae.config.scaling_factor, deepcopy(unet), deepcopy(text), pipeline.tokenizer),
            options.out / ("lora" if part == "loras" else "unregularised"),
            regularised,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    world = open_world(options.art)

    def do_vae(part: str) -> None:
        run, rate = new_run(options, part)
        train_vae(run, rate, world, fine=part == "vae_fine")

    def do_classifier() -> None:
        run, rate = new_run(options, "classifier")
        train_classifier(run, rate, world, load_vae(run), classifier_file(options.out))

    def do_base() -> None:
        run, rate = new_run(options, "base")
        train_base(run, rate, world, options.out / "model" / "toybox_text")

    def do_export() -> None:
        export_checkpoint(new_run(options, "base")[0], world, options.out / "model")

    parts: dict[str, Callable[[], None]] = {
        "vae_coarse": lambda: do_vae("vae_coarse"),
        "vae_fine": lambda: do_vae("vae_fine"),
        "classifier": do_classifier,
        "base": do_base,
        "export": do_export,
        "look": lambda: look(new_run(options, "base")[0], world, options.out / "look"),
        "unregularised": lambda: do_loras(options, world, "unregularised"),
        "loras": lambda: do_loras(options, world, "loras"),
    }
    every = [part for part in parts if part != "look"]
    chosen = {"all": every, "vae": ["vae_coarse", "vae_fine"]}.get(options.part, [options.part])
    for part in chosen:
        parts[part]()
