"""What reuse saves and what it changes, on the toybox: rows in plain steps, and PSNR against the same with every LoRA run at every step.

loratorio-lab reuse-cost                                 the presets, Euler, 20 steps
loratorio-lab reuse-cost --samplers euler,dpmpp-2m-karras,euler-a,ddim --steps 30
loratorio-lab reuse-cost --reuse 2,3,4,6 --counts 3      by the number of steps between, for three LoRAs
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from loratorio.settings import PRESETS
from loratorio_lab.bench.backend import Pixels, ToyboxBackend
from loratorio_lab.bench.cli import toybox_categories
from loratorio_lab.bench.plan import Cell, combinations, sample
from loratorio_lab.benchmarks.pool_cost import psnr


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab reuse-cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--combinations", type=int, default=6, help="how many of each N")
    parser.add_argument("--counts", default="2,3,4,5", help="numbers of LoRAs, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--samplers", default="euler", help="with commas between")
    parser.add_argument(
        "--reuse", help="these values of the knob instead of the presets, with commas between"
    )
    options = parser.parse_args(arguments)
    # Models as small as the toybox's are no faster with two threads, and much slower where another program wants one.
    torch.set_num_threads(1)
    if options.reuse:
        balanced = PRESETS["balanced"].values
        settings = {f"reuse {n}": {**balanced, "reuse": int(n)} for n in options.reuse.split(",")}
    else:
        settings = {preset.label: dict(preset.values) for preset in PRESETS.values()}
    categories = toybox_categories()
    combos = [
        combo
        for count in options.counts.split(",")
        for combo in sample(combinations(categories, int(count)), options.combinations)
    ]
    backend = ToyboxBackend()
    print(
        f"{len(combos)} combinations of N = {options.counts}, {options.seeds} seeds each, {options.steps} steps, cfg {options.cfg:g}"
    )
    print("| sampler | | plain steps a step | PSNR, mean | least | elements found |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for sampler, (name, knobs) in itertools.product(options.samplers.split(","), settings.items()):
        sampling = {"steps": options.steps, "cfg": options.cfg, "sampler": sampler}
        print(f"| {sampler} | {name} {_row(backend, combos, options.seeds, sampling, knobs)}", flush=True)


def _row(
    backend: ToyboxBackend,
    combos: Sequence[tuple[str, ...]],
    seeds: int,
    sampling: Mapping[str, Any],
    knobs: Mapping[str, Any],
) -> str:
    rows, values, found = 0, [], []
    for combo in combos:
        pictures, own_rows = _made(backend, combo, seeds, {**sampling, **knobs})
        whole = (
            pictures
            if knobs["reuse"] == 1
            else _made(backend, combo, seeds, {**sampling, **knobs, "reuse": 1})[0]
        )
        rows += own_rows
        values += [
            psnr(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(pictures, whole, strict=True)
        ]
        found += [name in names for names, _ in backend.classify(pictures) for name in combo]
    plain_steps = rows / 2 / sampling["steps"] / seeds / len(combos)
    quality = "| |" if knobs["reuse"] == 1 else f"| {np.mean(values):.1f} dB | {min(values):.1f} dB"
    return f"| {plain_steps:.2f} {quality} | {100 * np.mean(found):.0f} % |"


def _made(
    backend: ToyboxBackend, combo: tuple[str, ...], seeds: int, knobs: Mapping[str, Any]
) -> tuple[list[Pixels], int]:
    return backend.generate(Cell("", combo, 0, seeds, knobs))
