"""`loratorio-lab train PART`: train a part of the toybox, or all of it, and write the files that ship.

A killed run goes on where it was when the same command is given again; `--work` holds the state. Order: vae (coarse, then fine),
classifier, base, export, unregularised, loras.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch

from loratorio import toybox
from loratorio.toybox.elements import BY_NAME, ELEMENTS
from loratorio_lab.toybox import UNREGULARISED
from loratorio_lab.toybox.classifier import classifier_file
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.train.base import load_vae, train_base
from loratorio_lab.train.classifier import train_classifier
from loratorio_lab.train.common import Run
from loratorio_lab.train.export import export_checkpoint
from loratorio_lab.train.loras import train_lora
from loratorio_lab.train.vae import train_vae

# steps, batch, learning rate: what the shipped files were trained with (docs/TOYBOX.md says where it differed).
PLAN = {
    "vae_coarse": (650, 8, 4e-3),
    "vae_fine": (900, 8, 3e-3),
    "classifier": (1000, 32, 2e-3),
    "base": (1200, 32, 2e-3),
    "unregularised": (420, 16, 2e-3),
    "loras": (1200, 16, 2e-3),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loratorio-lab train", description=__doc__)
    parser.add_argument("part", choices=[*PLAN, "vae", "export", "all"])
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
        "--unregularised",
        type=Path,
        default=UNREGULARISED,
        help="folder of the LoRAs trained without regularisation, from which those that ship are taught",
    )
    parser.add_argument(
        "--only", nargs="*", choices=list(BY_NAME), help="for unregularised and loras: these elements"
    )
    return parser.parse_args(arguments)


def new_run(options: argparse.Namespace, part: str, seed: int = 0) -> tuple[Run, float]:
    """The run of a part and its learning rate: the plan's values, or those asked for."""
    steps: float
    steps, batch, rate = PLAN[part]
    if options.minutes is not None:
        steps = math.inf
    run = Run(
        part,
        options.work,
        options.out / "model" / "train.log",
        options.device,
        math.inf if options.minutes is None else options.minutes,
        options.steps or steps,
        options.seed + seed,
        options.batch or batch,
    )
    return run, options.rate or rate


def best_vae(options: argparse.Namespace) -> str:
    """The finest state there is. Its encoder is the coarse one's."""
    return "vae_fine" if (options.work / "vae_fine.pt").exists() else "vae_coarse"


def do_vae(options: argparse.Namespace, part: str) -> None:
    run, rate = new_run(options, part)
    train_vae(run, rate, fine=part == "vae_fine")


def do_classifier(options: argparse.Namespace) -> None:
    run, rate = new_run(options, "classifier")
    vae = load_vae(options.work, best_vae(options), options.device)
    train_classifier(run, rate, vae, classifier_file(options.out))


def do_base(options: argparse.Namespace) -> None:
    run, rate = new_run(options, "base")
    train_base(run, rate, options.out / "model" / "toybox_text")


def do_loras(options: argparse.Namespace, part: str) -> None:
    model = options.out / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    vae = pipeline.vae.to(options.device).eval().requires_grad_(False)
    unet, text = pipeline.unet.to(options.device), pipeline.text_encoder.to(options.device)
    for i, element in enumerate(ELEMENTS):
        if options.only and element.name not in options.only:
            continue
        run, rate = new_run(options, part, seed=100 + i)
        train_lora(
            run,
            rate,
            element,
            (vae, vae.config.scaling_factor, deepcopy(unet), deepcopy(text), pipeline.tokenizer),
            options.out / "lora" if part == "loras" else options.unregularised,
            (model, options.unregularised) if part == "loras" else None,
        )


def do_export(options: argparse.Namespace) -> None:
    export_checkpoint(options.work, best_vae(options), options.out / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    parts: dict[str, Callable[[], None]] = {
        "vae_coarse": lambda: do_vae(options, "vae_coarse"),
        "vae_fine": lambda: do_vae(options, "vae_fine"),
        "classifier": lambda: do_classifier(options),
        "base": lambda: do_base(options),
        "export": lambda: do_export(options),
        "unregularised": lambda: do_loras(options, "unregularised"),
        "loras": lambda: do_loras(options, "loras"),
    }
    chosen = {"all": list(parts), "vae": ["vae_coarse", "vae_fine"]}.get(options.part, [options.part])
    for part in chosen:
        parts[part]()
