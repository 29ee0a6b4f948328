"""What a whole request costs on a running WebUI: its own merging, and LoRAtorio's presets.

loratorio-lab request-time http://127.0.0.1:7860 --loras cat,night,robot
loratorio-lab request-time http://127.0.0.1:7860 --loras a,b,c --steps 4 20 --size 512x512 --rounds 5

All ways take turns within a round, so that other load on the machine affects all alike; times are medians over the rounds. The time of a
request is taken for a straight line over the steps: *fixed* is what is left at no step, so what reading, attaching, text, decoding and
putting back take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loratorio.settings import PRESET, PRESETS
from loratorio_lab.bench.webui import ask, sampling

MERGED = "the WebUI's own merging"
WAYS: Mapping[str, Mapping[str, Any]] = {
    MERGED: {"enabled": False},
    **{preset.label: {"enabled": True, PRESET: name} for name, preset in PRESETS.items()},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab request-time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="the WebUI's address; start it with --api")
    parser.add_argument("--loras", required=True, help="their names, with commas between")
    parser.add_argument("--prompt", default="a picture", help="text before the tags")
    parser.add_argument("--schedules", type=int, nargs=2, default=[4, 20], metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", help="such as 512x512; the WebUI's own if not given")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--sampler", default="Euler")
    options = parser.parse_args(arguments)
    options.steps = None
    tags = " ".join(f"<lora:{name.strip()}:1>" for name in options.loras.split(","))
    seconds: dict[tuple[str, int], list[float]] = {}
    # The first round loads what later ones find loaded.
    for number in range(options.rounds + 1):
        ways = list(WAYS)
        for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
            for steps in options.schedules:
                body = {
                    **sampling(options),
                    "prompt": f"{options.prompt} {tags}",
                    "seed": number,
                    "steps": steps,
                }
                body["alwayson_scripts"] = {"LoRAtorio": {"args": [WAYS[name]]}}
                since = time.perf_counter()
                ask(options.url, "txt2img", body)
                if number:
                    seconds.setdefault((name, steps), []).append(time.perf_counter() - since)
    few, many = options.schedules
    print(
        f"| seconds, medians of {options.rounds} | {few} steps | {many} steps | fixed | a step | to merging at {many} steps |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in WAYS:
        short, long = (statistics.median(seconds[name, steps]) for steps in options.schedules)
        each = (long - short) / (many - few)
        ratios = np.divide(seconds[name, many], seconds[MERGED, many])
        print(
            f"| {name} | {short:.2f} | {long:.2f} | {short - few * each:.2f} | {each:.3f} | {np.median(ratios):.2f} |"
        )
