"""What a pool costs and what it changes: rows and seconds against plain steps, and PSNR against the same with nothing reused.

Where the prompt calls none of the candidates, that is scoring all of them at every step.

loratorio-lab pool-cost                 the toybox; its LoRAs over again at other strengths, up to a pool of 20
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
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file, save_file

from loratorio.compose.candidates import called
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.generate import Request, generate
from loratorio_lab.bench.backend import RowCount
from loratorio_lab.knobs import measured, said

KNOBS = {"method": "relative", "top_k": 2, "share": 0.15, "reuse": 3}
"""The settings that are the same in all measurements, except for Re-centring and the pool's own."""

PROMPTS = (
    "oktavo on the left, shrumi on the right, lunara background",
    "boolio on the left, lantro on the right, dawnia background",
    "tortalo on the left, strumo on the right, blue background, embra style",
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
    parser.add_argument(
        "--no-reference", action="store_true", help="make no pictures with nothing reused: no PSNR"
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="4,5,6,8", help="pool_size")
    parser.add_argument("--intervals", default="7,20", help="pool_interval")
    parser.add_argument(
        "--recentre",
        type=float,
        default=0.5,
        help="at 1 candidates have no unconditional rows",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        from loratorio import toybox

        options.checkpoint = toybox.CHECKPOINT
        options.lora_dir = options.lora_dir or toybox.LORA_DIR
    options.prompt = options.prompt or list(PROMPTS)
    checkpoint = load_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.lora_dir, options.pool)
        rows = measure(checkpoint, Path(folder), options)
    print(said(measured({**KNOBS, "recentre": options.recentre})))
    print(
        f"pool of {options.pool}, {options.steps} steps, {options.seeds} seeds of {len(options.prompt)} prompts"
    )
    for row in rows:
        psnr = (
            "" if math.isnan(row["psnr"]) else f", PSNR {row['psnr']:.1f} dB (least {row['least_psnr']:.1f})"
        )
        for prompt, names in row.get("called", {}).items():
            print(f"  {prompt} calls {', '.join(names)}")
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


class Made(NamedTuple):
    """Pictures of a prompt, the model rows a step and picture that they took, the seconds of processor time, and which candidates the
    prompt called."""

    pictures: list[Any]
    rows: float
    seconds: float
    called: list[str]


def measure(checkpoint: Checkpoint, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    def make(prompt: str, **knobs: Any) -> Made:
        settings = measured({**KNOBS, "recentre": options.recentre, **knobs})
        request = Request(
            prompt,
            settings=settings,
            steps=options.steps,
            cfg=options.cfg,
            batch=options.seeds,
            width=options.size,
            height=options.size,
        )
        counter = RowCount(checkpoint.unet)
        since = time.process_time()
        with counter:
            outcome = generate(checkpoint, folder, request, progress=False)
        seconds = time.process_time() - since
        pictures = [np.asarray(image).astype(np.float64) for image in outcome.images]
        names = list(outcome.reactions)
        chosen = called(list(outcome.reactions.values()), settings.pool_size)
        return Made(
            pictures, counter.count / options.steps / options.seeds, seconds, [names[i] for i in chosen]
        )

    def reference(prompt: str, size: int, names: Sequence[str]) -> Made:
        if names:
            return make(f"{prompt} <pool:*>", pool_size=size, reuse=1)
        return make(f"{prompt} <pool:*>", pool_size=min(100, options.pool), pool_interval=1)

    make(options.prompt[0])
    plain_seconds = sum(make(prompt).seconds for prompt in options.prompt)

    def found(name: str, made: Sequence[Made], values: Sequence[float]) -> dict[str, Any]:
        return {
            "name": name,
            "rows": float(np.mean([each.rows for each in made])),
            "plain_steps": sum(each.seconds for each in made) / plain_seconds,
            "psnr": float(np.mean(values)) if values else math.nan,
            "least_psnr": min(values, default=math.nan),
        }

    rows: list[dict[str, Any]] = []
    references: dict[tuple[str, ...], Made] = {}
    for size in (int(each) for each in options.sizes.split(",")):
        for interval in (int(each) for each in options.intervals.split(",")):
            made = [
                make(f"{prompt} <pool:*>", pool_size=size, pool_interval=interval)
                for prompt in options.prompt
            ]
            values: list[float] = []
            if not options.no_reference:
                for prompt, own in zip(options.prompt, made, strict=True):
                    key = (prompt, *own.called)
                    if key not in references:
                        references[key] = reference(prompt, size, own.called)
                    values += [
                        psnr(a, b) for a, b in zip(own.pictures, references[key].pictures, strict=True)
                    ]
            calls = {
                prompt: each.called for prompt, each in zip(options.prompt, made, strict=True) if each.called
            }
            name = f"pool_size {size}, pool_interval {interval}"
            rows.append({**found(name, made, values), "called": calls})
    if references:
        rows.append(found("with nothing reused", list(references.values()), []))
    return rows


def psnr(first: Any, second: Any) -> float:
    error = float(((first - second) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0
