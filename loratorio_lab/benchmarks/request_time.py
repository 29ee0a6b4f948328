"""What a whole request costs on a running WebUI: its own merging, and LoRAtorio's presets.

loratorio-lab request-time http://127.0.0.1:7860 --loras cat,night,robot
loratorio-lab request-time http://127.0.0.1:7860 --loras a,b,c --schedules 4 20 --size 512x512 --rounds 5 --pid 1234

All ways take turns within a round, so that other load on the machine affects all alike; times are medians over the rounds. *First* comes
after another prompt's request, so that LoRAs are read and merged, and text is encoded; *again* repeats it with nothing changed. Then more
steps: the WebUI's own caches of text go by the number of steps, so text is encoded again.
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

from loratorio.settings import PRESET, PRESETS
from loratorio_lab.bench.webui import ask, check_names, sampling

MERGED = "the WebUI's own merging"
WAYS: Mapping[str, Mapping[str, Any]] = {
    MERGED: {"enabled": False},
    **{preset.label: {"enabled": True, PRESET: name} for name, preset in PRESETS.items()},
}

KINDS = ("first", "again", "more")


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
    names = [name.strip() for name in options.loras.split(",")]
    check_names(options.url, names)
    tags = " ".join(f"<lora:{name}:1>" for name in names)
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
            for kind, steps in zip(KINDS, (few, few, many), strict=True):
                taken = _timed(
                    clock, options.url, {**body, "prompt": f"{options.prompt} {tags}", "steps": steps}
                )
                if number:
                    seconds.setdefault((name, kind), []).append(taken)
    unit = "processor seconds" if options.pid else "seconds"
    print(
        f"| {unit}, medians of {options.rounds} | first, {few} steps | again | {many} steps | to merging: first | again | {many} steps |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in WAYS:
        times = [statistics.median(seconds[name, kind]) for kind in KINDS]
        ratios = [
            own / statistics.median(seconds[MERGED, kind]) for own, kind in zip(times, KINDS, strict=True)
        ]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in (*times, *ratios))} |")


def _timed(clock: Callable[[], float], url: str, body: Mapping[str, Any]) -> float:
    since = clock()
    ask(url, "txt2img", body)
    return clock() - since


def _processor_time(pid: int) -> float:
    """Seconds that a process and its threads have computed. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
