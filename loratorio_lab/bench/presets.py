"""How much presets find and what they cost: the table and the plot that they are chosen by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import measures
from .plan import PRESET_ROWS, SPEED_ROWS, Variant
from .report import comparable, figure, markdown, percent, row, said_of, shares, with_interval
from .store import Result

NOTE = "*Plain steps* are model rows over the two of a step without LoRAs; differences to Paper are of the same combinations and seeds."


def plain_steps(rows: float, results: Sequence[Result]) -> float:
    """Rows of a picture of these results as steps of two rows, per step."""
    steps = next(each.cell.knobs["steps"] for each in results if each.cell.made != "truth")
    return rows / 2 / float(steps)


def table(variants: Sequence[Variant], results: Sequence[Result], against: str = "") -> str:
    """One row per variant; `against`: name of the one that the others are compared with."""
    results = comparable(variants, results)
    truth = [each for each in results if each.cell.made == "truth"]
    by_name = {
        variant.name: {each.cell.elements: shares(each) for each in results if each.cell.is_of(variant)}
        for variant in variants
    }
    head = [
        "",
        "elements found (95 %)",
        "all in one picture",
        "unasked",
        "Fréchet",
        "plain steps",
    ]
    if against:
        head.insert(2, "to Paper, points (95 %)")
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant in variants:
        own = row(variant, results, truth)
        if own is None:
            continue
        cells = [
            variant.label,
            with_interval(own),
            percent(own.every),
            f"{own.other:.2f}",
            figure(own.frechet, ".1f"),
            f"{plain_steps(own.rows, results):.2f}",
        ]
        if against:
            cells.insert(2, "" if variant.name == against else _difference(by_name, variant.name, against))
        lines.append(cells)
    return markdown(lines)


def _difference(
    by_name: Mapping[str, Mapping[tuple[str, ...], measures.Floats]], name: str, against: str
) -> str:
    groups = [100 * (own - by_name[against][elements]) for elements, own in by_name[name].items()]
    low, high = measures.bootstrap(groups)
    return f"{float(np.concatenate(groups).mean()):+.1f} ({low:.1f} to {high:.1f})"


def plot(results: Sequence[Result], folder: Path) -> Path | None:
    """Found against plain steps, each variant a point with its interval; None without results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure = pyplot.figure(figsize=(7, 4.6))
    count = 0
    results = [each for each in results if not each.cell.beside]
    shown: list[dict[str, Any]] = []
    for variants, marker in ((PRESET_ROWS, "o"), (SPEED_ROWS, "s")):
        own = comparable(variants, results)
        truth = [each for each in own if each.cell.made == "truth"]
        for variant in variants:
            each = row(variant, own, truth)
            if each is None or (marker == "s" and variant.resolved() in shown):
                continue
            shown.append(variant.resolved())
            low, high = (abs(100 * (end - each.found)) for end in each.interval)
            pyplot.errorbar(
                plain_steps(each.rows, own), 100 * each.found, yerr=[[low], [high]], marker=marker, capsize=3, linestyle="",
                markersize=8 if marker == "o" else 4, alpha=1 if marker == "o" else 0.45, label=variant.label,
            )  # fmt: skip
            count += 1
    pyplot.xlabel("plain steps per step, by model rows")
    pyplot.ylabel("elements found, % (95 %)")
    pyplot.xlim(left=0.8)
    pyplot.legend(fontsize=6, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    pyplot.tight_layout()
    file = folder / "presets.png"
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file if count else None


def section(results: Sequence[Result], pictures: Mapping[str, str]) -> list[str]:
    """The part of docs/lab/RESULTS.md; empty where there is nothing to show."""
    own = [each for each in results if not each.cell.beside]
    parts = []
    for variants, heading, against in (
        (PRESET_ROWS, "## Presets", "paper"),
        (SPEED_ROWS, "### What the presets are chosen from", ""),
    ):
        if all(math.isfinite(_found(variant, own)) for variant in variants):
            parts += [heading, NOTE, said_of(variants, own), table(variants, own, against)]
    if parts and "presets" in pictures:
        parts.append(f"![Elements found against plain steps]({pictures['presets']})")
    return parts


def _found(variant: Variant, results: Sequence[Result]) -> float:
    return float(np.mean([shares(each).mean() for each in results if each.cell.is_of(variant)] or [math.nan]))
