"""What reuse saves and what it changes, on the toybox: rows in plain steps, and PSNR against the same with every row run at every step.

loratorio-lab reuse-cost                                 the presets, Euler, 20 steps
loratorio-lab reuse-cost --samplers euler,dpmpp-2m-karras,euler-a,ddim --steps 12,24,40 --cfg 2,7,12
loratorio-lab reuse-cost --reuse 2,3,4,6 --counts 3      by the number of steps between, for three LoRAs
loratorio-lab reuse-cost --counts 8 --presets fast       the prompt calls five of the eight

With more LoRAs than the toybox has categories, the prompt calls one of each; the others are loaded and have no word in it.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from loratorio.settings import PRESETS
from loratorio_lab.bench.backend import Pixels, ToyboxBackend
from loratorio_lab.bench.plan import Cell, combinations, sample
from loratorio_lab.benchmarks.pool_cost import psnr
from loratorio_lab.chosen_toybox import ChosenToybox, add_toybox, toybox_of
from loratorio_lab.knobs import OTHERS, measured, said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab reuse-cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--combinations", type=int, default=6, help="how many of each N")
    parser.add_argument("--counts", default="2,3,4", help="numbers of LoRAs, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", default="20", help="with commas between")
    parser.add_argument("--cfg", default="3", help="with commas between")
    parser.add_argument("--samplers", default="euler", help="with commas between")
    parser.add_argument("--presets", default=",".join(PRESETS), help="with commas between")
    parser.add_argument(
        "--reuse", help="these values of the knob instead of the presets, with commas between"
    )
    add_toybox(parser)
    options = parser.parse_args(arguments)
    # Models as small as the toybox's are no faster with two threads, and much slower where another program wants one.
    torch.set_num_threads(1)
    settings: dict[str, Mapping[str, Any]]
    if options.reuse:
        balanced = {**OTHERS, **PRESETS["balanced"].values}
        settings = {f"reuse {n}": {**balanced, "reuse": int(n)} for n in options.reuse.split(",")}
    else:
        chosen = [PRESETS[name] for name in options.presets.split(",")]
        settings = {preset.label: {**OTHERS, **preset.values} for preset in chosen}
    for name, knobs in settings.items():
        print(f"{name}: {said(measured(knobs))}")
    toybox = toybox_of(options)
    backend = _Backend(toybox)
    combos = [
        combo
        for count in options.counts.split(",")
        for combo in _combinations(toybox, int(count), options.combinations)
    ]
    print(f"{len(combos)} combinations of N = {options.counts}, {options.seeds} seeds each")
    print("| sampler | steps | CFG | | plain steps a step | PSNR, mean | least | elements found |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    ways = itertools.product(
        options.samplers.split(","), options.steps.split(","), options.cfg.split(","), settings.items()
    )
    for sampler, steps, cfg, (name, knobs) in ways:
        sampling = {"steps": int(steps), "cfg": float(cfg), "sampler": sampler}
        row = _row(backend, combos, options.seeds, sampling, knobs)
        print(f"| {sampler} | {steps} | {cfg} | {name} {row}", flush=True)


def _combinations(toybox: ChosenToybox, count: int, most: int) -> list[tuple[str, ...]]:
    """Elements of different categories, and behind them others where there are no more categories."""
    categories = toybox.categories()
    every = [name for names in categories.values() for name in names]
    found = []
    for number, called in enumerate(sample(combinations(categories, min(count, len(categories))), most)):
        others = [name for name in every if name not in called]
        random.Random(number).shuffle(others)
        found.append((*called, *others[: count - len(called)]))
    return found


class _Backend(ToyboxBackend):
    """The toybox with LoRAs that the prompt does not call."""

    def called(self, elements: Sequence[str]) -> list[str]:
        """The elements whose words are in the prompt: the first of each category."""
        return list({self._of[name].category: name for name in reversed(elements)}.values())[::-1]

    def prompt(self, cell: Cell) -> str:
        called = self.called(cell.elements)
        scene = self._world.random_scene(random.Random("+".join(called)), *called, width=self._size)
        return f"{self._world.caption(scene)} {' '.join(f'<lora:{name}>' for name in cell.elements)}"


def _row(
    backend: _Backend,
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
        found += [name in names for names, _ in backend.classify(pictures) for name in backend.called(combo)]
    plain_steps = rows / (2 if sampling["cfg"] != 1 else 1) / sampling["steps"] / seeds / len(combos)
    quality = "| |" if knobs["reuse"] == 1 else f"| {np.mean(values):.1f} dB | {min(values):.1f} dB"
    return f"| {plain_steps:.2f} {quality} | {100 * np.mean(found):.0f} % |"


def _made(
    backend: ToyboxBackend, combo: tuple[str, ...], seeds: int, knobs: Mapping[str, Any]
) -> tuple[list[Pixels], int]:
    return backend.generate(Cell("", combo, 0, seeds, knobs))
