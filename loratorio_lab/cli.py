"""``loratorio-lab COMMAND``: training, checks, tables and benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from loratorio.errors import LoratorioError

COMMANDS = {
    "bench": ("loratorio_lab.bench.cli", "combinations × methods × seeds on the toybox, measured"),
    "step-time": ("loratorio_lab.benchmarks.step_time", "what one denoising step costs"),
    "request-time": (
        "loratorio_lab.benchmarks.request_time",
        "what a whole request costs on a running WebUI",
    ),
    "reuse-cost": ("loratorio_lab.benchmarks.reuse_cost", "what reuse saves and what it changes"),
    "pool-cost": ("loratorio_lab.benchmarks.pool_cost", "what a pool costs and what it changes"),
    "premise": ("loratorio_lab.benchmarks.premise", "does divergence tell the LoRAs that a prompt asks for?"),
    "train": ("loratorio_lab.train.train", "train the toybox, or a part of it"),
    "check": ("loratorio_lab.train.check", "does each LoRA of the toybox draw what it was trained on?"),
    "widen": ("loratorio_lab.toybox.widen", "the toybox in the widths of Stable Diffusion 1.5"),
    "knob-table": ("loratorio_lab.knob_table", "renew README's table of knobs"),
}
"""Module, whose `main` takes the arguments and gives an exit code or None, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 2: wrong input, explained by a sentence on stderr; 130: stopped by Ctrl-C."""
    name, *rest = sys.argv[1:] if arguments is None else arguments or [""]
    if name not in COMMANDS:
        asked = name in ("", "-h", "--help")
        print("usage: loratorio-lab COMMAND [OPTIONS]; loratorio-lab COMMAND --help\n")
        for command, (_, about) in COMMANDS.items():
            print(f"  {command:13s}{about}")
        return 0 if asked else 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except LoratorioError as problem:
        print(f"loratorio-lab: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nloratorio-lab: stopped. What was finished is kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
