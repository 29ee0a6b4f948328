"""What a whole request costs on a running WebUI: its own merging, and LoRAtorio's presets.

loratorio-lab request-time http://127.0.0.1:7860 --loras cat,night,robot
loratorio-lab request-time http://127.0.0.1:7860 --loras a,b,c --schedules 4 20 --size 512x512 --rounds 5 --pid 1234

All ways take turns within a round, so that other load on the machine affects all alike; times are medians over the rounds. *First* is the
request with the fewest steps that comes after another prompt's, so that LoRAs are read and merged; the others repeat it. The time of a
request is taken for a straight line over the steps: *fixed* is what is left at no step, so what attaching, text, decoding and putting back
take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
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
    parser.add_argument(
        "--pid", type=int, help="the WebUI's process on this machine: processor time instead of elapsed time"
    )
    options = parser.parse_args(arguments)
    options.steps = None
    clock = partial(_processor_time, options.pid) if options.pid else time.perf_counter
    tags = " ".join(f"<lora:{name.strip()}:1>" for name in options.loras.split(","))
    few, many = options.schedules
    seconds: dict[tuple[str, str], list[float]] = {}
    # The first round loads what later ones find loaded.
    for number in range(options.rounds + 1):
        ways = list(WAYS)
        for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
            body = {**sampling(options), "seed": number}
            body["alwayson_scripts"] = {"LoRAtorio": {"args": [WAYS[name]]}}
            without = {**body, "prompt": options.prompt, "steps": 1, "alwayson_scripts": {}}
            _timed(clock, options.url, without)
            for kind, steps in (("first", few), ("few", few), ("many", many)):
                taken = _timed(
                    clock, options.url, {**body, "prompt": f"{options.prompt} {tags}", "steps": steps}
                )
                if number:
                    seconds.setdefault((name, kind), []).append(taken)
    seconds_of = "processor seconds" if options.pid else "seconds"
    steps_of = f"first, {few} steps | {few} steps | {many} steps"
    print(
        f"| {seconds_of}, medians of {options.rounds} | {steps_of} | fixed | a step | to merging at {many} steps |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in WAYS:
        first, short, long = (statistics.median(seconds[name, kind]) for kind in ("first", "few", "many"))
        each = (long - short) / (many - few)
        ratio = statistics.median(np.divide(seconds[name, "many"], seconds[MERGED, "many"]))
        print(
            f"| {name} | {first:.2f} | {short:.2f} | {long:.2f} | {short - few * each:.2f} | {each:.3f} | {ratio:.2f} |"
        )


def _timed(clock: Callable[[], float], url: str, body: Mapping[str, Any]) -> float:
    since = clock()
    ask(url, "txt2img", body)
    return clock() - since


def _processor_time(pid: int) -> float:
    """Seconds that a process and its threads have computed. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
