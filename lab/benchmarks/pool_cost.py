"""What a pool costs and what it changes: rows and seconds against plain steps, and PSNR against scoring all candidates always.

loratorio-lab pool-cost --recentre 1    the toybox; its LoRAs over again at other strengths, up to a pool of 20
loratorio-lab pool-cost --pool 100 --seeds 1 --no-reference        does a pool of 100 run to the end, and at what cost?
loratorio-lab pool-cost --checkpoint model --lora-dir folder --prompt "a cat" --size 512
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from lab.bench.backend import RowCount
from loratorio.settings import Settings
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.generate import Request, generate

PROMPTS = (
    "zorbo wearing strypo, lunara background",
    "mimsy, kakto on the right, chekko background",
    "glorp wearing wizzo, blue background, embra style",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab pool-cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--lora-dir", type=Path)
    parser.add_argument(
        "--prompt", action="append", help="several times for several; by default three for the toybox"
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=20,
        help="candidates; LoRA files are copied under new names, with their weights times 0.6 to 0.9, up to it",
    )
    parser.add_argument("--no-reference", action="store_true", help="do not score all at every step: no PSNR")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="4,5,6,8", help="pool_size")
    parser.add_argument("--intervals", default="7,20", help="pool_interval")
    parser.add_argument(
        "--recentre",
        type=float,
        default=Settings().recentre,
        help="at 1 candidates have no unconditional rows",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        from loratorio import toybox

        options.checkpoint, options.lora_dir = toybox.CHECKPOINT, toybox.LORA_DIR
    options.prompt = options.prompt or list(PROMPTS)
    checkpoint = load_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.lora_dir, options.pool)
        rows = measure(checkpoint, Path(folder), options)
    print(
        f"pool of {options.pool}, {options.steps} steps, {options.seeds} seeds of {len(options.prompt)} prompts"
    )
    for row in rows:
        psnr = (
            "" if math.isnan(row["psnr"]) else f", PSNR {row['psnr']:.1f} dB (least {row['least_psnr']:.1f})"
        )
        print(
            f"{row['name']:34s} {row['rows'] / 2:6.2f} plain steps a step by rows, {row['plain_steps']:6.2f} by time{psnr}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def fill(folder: Path, source: Path, count: int) -> None:
    """`count` LoRA files out of those in `source`, over again under other names and weaker, each time by another factor.

    Without metadata: a prompt that called them by their trigger words would choose before the first step.
    """
    files = sorted(source.rglob("*.safetensors"))
    for i in range(count):
        again, file = i // len(files), files[i % len(files)]
        factor = (0.6, 0.8, 0.7, 0.9)[(again - 1) % 4] if again else 1.0
        weights = {
            name: value * factor if name.endswith(("lora_up.weight", "lora_B.weight")) else value
            for name, value in load_file(file).items()
        }
        save_file(weights, folder / f"{file.stem}{again or ''}.safetensors")


def measure(checkpoint: Checkpoint, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    def make(prompt: str, **knobs: Any) -> tuple[list[Any], float, float]:
        """Pictures, rows a step and image, and seconds of processor time."""
        request = Request(
            prompt,
            settings=Settings(enabled=True, recentre=options.recentre).with_values(knobs),
            steps=options.steps,
            cfg=options.cfg,
            batch=options.seeds,
            width=options.size,
            height=options.size,
        )
        counter = RowCount(checkpoint.unet)
        since = time.process_time()
        with counter:
            outcome = generate(checkpoint, folder, request)
        seconds = time.process_time() - since
        pictures = [np.asarray(image).astype(np.float64) for image in outcome.images]
        return pictures, counter.count / options.steps / options.seeds, seconds

    def all_prompts(pool: str, **knobs: Any) -> tuple[list[Any], float, float]:
        made = [make(f"{prompt}{pool}", **knobs) for prompt in options.prompt]
        pictures = [picture for own, _, _ in made for picture in own]
        return pictures, float(np.mean([rows for _, rows, _ in made])), sum(seconds for _, _, seconds in made)

    def found(name: str, made: tuple[list[Any], float, float], values: list[float]) -> dict[str, Any]:
        return {
            "name": name,
            "rows": made[1],
            "plain_steps": made[2] / plain_seconds,
            "psnr": float(np.mean(values)) if values else math.nan,
            "least_psnr": min(values, default=math.nan),
        }

    make(options.prompt[0])
    _, _, plain_seconds = all_prompts("")
    rows = []
    reference: list[Any] = []
    if not options.no_reference:
        everything = all_prompts(" <pool:*>", pool_size=min(100, options.pool), pool_interval=1)
        reference = everything[0]
        rows.append(found("all scored at every step", everything, []))
    for size in (int(each) for each in options.sizes.split(",")):
        for interval in (int(each) for each in options.intervals.split(",")):
            made = all_prompts(" <pool:*>", pool_size=size, pool_interval=interval)
            values = [psnr(a, b) for a, b in zip(made[0], reference, strict=False)]
            rows.append(found(f"pool_size {size}, pool_interval {interval}", made, values))
    return rows


def psnr(first: Any, second: Any) -> float:
    error = float(((first - second) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0
