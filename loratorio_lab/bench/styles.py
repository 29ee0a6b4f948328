"""A character in a style, alone and in front of a background: how often everything is found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from loratorio.settings import PRESETS

from . import measures
from .beside import BACKGROUND
from .plan import CHARACTER, SAMPLING, STYLE, STYLES_OFF, TRUTHS, Cell, Variant, cell
from .report import comparable, markdown, percent, ranged
from .store import Result

ROWS: tuple[Variant, ...] = (
    Variant("truth", "Rendered truth", made="truth"),
    Variant("merge", "Merge", {"method": "merge"}),
    Variant("composite", "Composite", {"method": "composite"}),
    Variant("cmlora", "CMLoRA", {"method": "cmlora"}),
    Variant("klora", "K-LoRA", {"method": "klora"}),
    *(Variant(preset.name, preset.label, preset.values) for preset in PRESETS.values()),
    STYLES_OFF,
    Variant("styles_said", "Balanced, `role=style` in the tag", PRESETS["balanced"].values, role="style"),
)

NOTE = (
    f"Pictures in which everything that was asked for is found, in per cent; {SAMPLING['steps']} steps, CFG {SAMPLING['cfg']:g}. Each "
    "character in each style, and the same in front of a background."
)


def cells(categories: Mapping[str, Sequence[str]], seeds: int, truth: bool) -> list[Cell]:
    """Every character in every style, alone and in front of one of the backgrounds, which take turns."""
    pairs = list(itertools.product(categories.get(CHARACTER, ()), categories.get(STYLE, ())))
    turns = itertools.cycle(categories.get(BACKGROUND, ()))
    behind = [
        (character, background, style) for (character, style), background in zip(pairs, turns, strict=False)
    ]
    return [
        cell(variant, elements, TRUTHS if variant.made == "truth" else seeds, SAMPLING)
        for elements in (*pairs, *behind)
        for variant in ROWS
        if truth or variant.made != "truth"
    ]


def section(results: Sequence[Result], categories: Mapping[str, Sequence[str]]) -> list[str]:
    """The part of docs/lab/RESULTS.md; empty where there is nothing to show."""
    styles = categories.get(STYLE, ())
    own = [
        each
        for each in results
        if each.cell.elements[-1] in styles
        and each.cell.elements[0] in categories.get(CHARACTER, ())
        and not each.cell.beside
    ]
    head = ["", "character and style (95 %)", *styles, "with a background (95 %)"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    parts = [
        [each for each in own if len(each.cell.elements) == count and _is_asked(each, categories)]
        for count in (2, 3)
    ]
    pairs, behind = (comparable(ROWS[1:], part) for part in parts)
    for variant in ROWS:
        of_pairs, of_behind = ([r for r in part if r.cell.is_of(variant)] for part in (pairs, behind))
        if not of_pairs:
            continue
        by_style = [_all_found([r for r in of_pairs if r.cell.elements[-1] == style]) for style in styles]
        lines.append([variant.label, _with_interval(of_pairs), *by_style, _with_interval(of_behind)])
    return ["## A character in a style", NOTE, markdown(lines)] if len(lines) > 2 else []


def _is_asked(result: Result, categories: Mapping[str, Sequence[str]]) -> bool:
    further = result.cell.elements[1:-1]
    return not further or further[0] in categories.get(BACKGROUND, ())


def _complete(result: Result) -> measures.Floats:
    return np.array([float(set(result.cell.elements) <= set(image.found)) for image in result.images])


def _share(results: Sequence[Result]) -> float:
    return float(np.concatenate([_complete(each) for each in results]).mean())


def _all_found(results: Sequence[Result]) -> str:
    return percent(_share(results)) if results else "–"


def _with_interval(results: Sequence[Result]) -> str:
    return (
        ranged(_share(results), measures.bootstrap([_complete(each) for each in results])) if results else "–"
    )
