"""What a pool costs and what it changes: rows and seconds against plain steps, and PSNR against scoring all candidates always.

python benchmarks/pool_cost.py                 the toybox, its LoRAs doubled up to a pool of 20
python benchmarks/pool_cost.py --checkpoint model --lora-dir folder --prompt "a cat" --size 512
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from loratorio.bench.studio import RowCount
from loratorio.hosts.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.hosts.standalone.generate import Request, generate
from loratorio.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--lora-dir", type=Path)
    parser.add_argument("--prompt", default="zorbo wearing strypo, lunara background")
    parser.add_argument(
        "--pool", type=int, default=20, help="candidates; LoRA files are copied under new names up to it"
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", default="2,3,4,6", help="pool_size")
    parser.add_argument("--intervals", default="5,7,10", help="pool_interval")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.checkpoint is None:
        from loratorio import toybox

        options.checkpoint, options.lora_dir = toybox.CHECKPOINT, toybox.LORA_DIR
    checkpoint = load_checkpoint(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.lora_dir, options.pool)
        rows = measure(checkpoint, Path(folder), options)
    print(f"pool of {options.pool}, {options.steps} steps, {options.seeds} seeds; a plain step has 2 rows")
    for row in rows:
        print(
            f"{row['name']:32s} {row['rows'] / 2:6.2f} plain steps a step by rows, {row['plain_steps']:6.2f} by time, "
            f"PSNR {row['psnr']:6.2f} dB (least {row['least_psnr']:.2f})"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def fill(folder: Path, source: Path, count: int) -> None:
    """`count` LoRA files out of those in `source`, over again under other names."""
    files = sorted(source.rglob("*.safetensors"))
    for i in range(count):
        again = i // len(files)
        shutil.copy(files[i % len(files)], folder / f"{files[i % len(files)].stem}{again or ''}.safetensors")


def measure(checkpoint: Checkpoint, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    def make(prompt: str, **knobs: Any) -> tuple[list[Any], float, float]:
        """Pictures, rows a step and image, and seconds."""
        request = Request(
            prompt,
            settings=Settings(enabled=True).with_values(knobs),
            steps=options.steps,
            cfg=options.cfg,
            batch=options.seeds,
            width=options.size,
            height=options.size,
        )
        counter = RowCount(checkpoint.unet)
        since = time.perf_counter()
        with counter:
            outcome = generate(checkpoint, folder, request)
        seconds = time.perf_counter() - since
        pictures = [np.asarray(image).astype(np.float64) for image in outcome.images]
        return pictures, counter.count / options.steps / options.seeds, seconds

    make(options.prompt)
    _, _, plain_seconds = make(options.prompt)
    everything = {"pool_size": options.pool, "pool_interval": 1}
    reference, reference_rows, reference_seconds = make(f"{options.prompt} <pool:*>", **everything)
    found = [
        {
            "name": "all scored at every step",
            "rows": reference_rows,
            "plain_steps": reference_seconds / plain_seconds,
            "psnr": math.inf,
            "least_psnr": math.inf,
        }
    ]
    for size in (int(each) for each in options.sizes.split(",")):
        for interval in (int(each) for each in options.intervals.split(",")):
            pictures, rows, seconds = make(
                f"{options.prompt} <pool:*>", pool_size=size, pool_interval=interval
            )
            values = [psnr(a, b) for a, b in zip(pictures, reference, strict=True)]
            found.append(
                {
                    "name": f"pool_size {size}, pool_interval {interval}",
                    "rows": rows,
                    "plain_steps": seconds / plain_seconds,
                    "psnr": float(np.mean(values)),
                    "least_psnr": min(values),
                }
            )
    return found


def psnr(first: Any, second: Any) -> float:
    error = float(((first - second) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0


if __name__ == "__main__":
    main()
