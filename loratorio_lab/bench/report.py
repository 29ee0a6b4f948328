"""Tables and plots of the results, and docs/lab/RESULTS.md made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import beside, measures
from .plan import (
    ABLATIONS,
    BETTER_ROWS,
    DYNAMIC_ROWS,
    MAIN_ROWS,
    METHOD_ROWS,
    ROLE_ROWS,
    STYLE,
    TRUTH,
    Variant,
)
from .store import Result

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TableRow:
    """One variant's figures over the pictures of some combinations.

    Attributes:
        found: share of the wanted elements that the classifier finds, with its 95 % interval. every: of pictures with all of them.
        other: elements found that nobody asked for, per picture.
        frechet: distance of the features to rendered truth of the same combinations.
        edges, saturation, clipped: by rendered truth's, as a difference.
        seconds, rows: per picture.
    """

    variant: Variant
    pictures: int
    found: float
    interval: tuple[float, float]
    every: float
    other: float
    frechet: float
    edges: float
    saturation: float
    clipped: float
    seconds: float
    rows: float


def row(variant: Variant, results: Sequence[Result], truth: Sequence[Result]) -> TableRow | None:
    """The variant's figures, or None if it has no results. Truth is taken of the same combinations only."""
    own = [result for result in results if result.cell.is_of(variant)]
    if not own:
        return None
    combos = {result.cell.elements for result in own}
    true = [result for result in truth if result.cell.elements in combos]
    groups = [shares(result) for result in own]
    images = [image for result in own for image in result.images]
    true_shots = [image for result in true for image in result.images]

    def mean(of: str) -> float:
        own_mean = float(np.mean([getattr(image, of) for image in images]))
        return (
            own_mean - float(np.mean([getattr(image, of) for image in true_shots]))
            if true_shots
            else math.nan
        )

    return TableRow(
        variant,
        len(images),
        float(np.concatenate(groups).mean()),
        measures.bootstrap(groups),
        float((np.concatenate(groups) == 1).mean()),
        float(np.mean([len(set(image.found) - set(r.cell.elements)) for r in own for image in r.images])),
        _frechet(own, true),
        mean("edges"),
        mean("saturation"),
        mean("clipped"),
        sum(result.seconds for result in own) / len(images),
        sum(result.model_rows for result in own) / len(images),
    )


def comparable(variants: Sequence[Variant], results: Sequence[Result]) -> list[Result]:
    """Results of these variants for the combinations and the number of seeds that all of them have, and truth of those.

    Variants without any result do not count, so that a grid that was stopped still gives tables.
    """
    own = {v.name: [r for r in results if r.cell.is_of(v)] for v in variants}
    own = {name: found for name, found in own.items() if found}
    kept: dict[int, Result] = {}
    for elements in dict.fromkeys(r.cell.elements for found in own.values() for r in found):
        here = [{r.cell.count: r for r in found if r.cell.elements == elements} for found in own.values()]
        counts = set.intersection(*(set(each) for each in here))
        if counts:
            kept.update((id(each[max(counts)]), each[max(counts)]) for each in here)
    combos = {result.cell.elements for result in kept.values()}
    truth = [r for r in results if r.cell.made == "truth" and r.cell.elements in combos]
    return [*kept.values(), *truth]


def shares(result: Result) -> Floats:
    """Per picture, the share of the wanted elements that was found."""
    wanted = set(result.cell.elements)
    return np.array([len(wanted & set(image.found)) / len(wanted) for image in result.images])


def _frechet(own: Sequence[Result], truth: Sequence[Result]) -> float:
    features = [[image.features for result in part for image in result.images] for part in (own, truth)]
    if not features[0] or not features[1] or not features[0][0]:
        return math.nan
    return measures.frechet(np.array(features[0]), np.array(features[1]))


def win_rate(first: Sequence[Result], second: Sequence[Result]) -> tuple[float, float, float]:
    """How often `first` has more of the elements than `second` in the same cell and seed (ties are half), and the 95 % interval."""
    by_elements = {result.cell.elements: result for result in second}
    groups = []
    for result in first:
        other = by_elements.get(result.cell.elements)
        if other is not None:
            count = min(len(result.images), len(other.images))
            groups.append(measures.wins(shares(result)[:count].tolist(), shares(other)[:count].tolist()))
    if not groups:
        return math.nan, math.nan, math.nan
    low, high = measures.bootstrap(groups)
    return float(np.concatenate(groups).mean()), low, high


def of_size(results: Sequence[Result], count: int) -> list[Result]:
    return [result for result in results if len(result.cell.elements) == count]


def table(
    variants: Sequence[Variant], results: Sequence[Result], counts: Sequence[int] = (2, 3, 4, 5)
) -> str:
    """The main table: elements found per N, then all N together."""
    results = comparable(variants, results)
    present = [count for count in counts if of_size(results, count)]
    truth = [result for result in results if result.cell.made == "truth"]
    head = [
        "",
        *(f"N={count}" for count in present),
        "all N (95 %)",
        "all in one picture",
        "unasked",
        "Fréchet",
        "edges",
    ]
    head += ["saturation", "clipped", "rows", "s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant in (TRUTH, *variants):
        whole = row(variant, results, truth)
        if whole is None:
            continue
        by_count = [row(variant, of_size(results, count), truth) for count in present]
        low, high = whole.interval
        is_truth = variant.made == "truth"
        cells = [variant.label, *("" if each is None else percent(each.found) for each in by_count)]
        cells += [
            f"{percent(whole.found)} ({percent(low)} to {percent(high)})",
            percent(whole.every),
            f"{whole.other:.2f}",
        ]
        cells += ["" if is_truth else figure(whole.frechet, ".2f")]
        cells += [
            "" if is_truth else figure(value, "+.3f")
            for value in (whole.edges, whole.saturation, whole.clipped)
        ]
        cells += ["", ""] if is_truth else [f"{whole.rows:.0f}", f"{whole.seconds:.2f}"]
        lines.append(cells)
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def figure(value: float, form: str) -> str:
    """A number in this form, or nothing where there is none: a Fréchet distance takes two pictures."""
    return "" if math.isnan(value) else f"{value:{form}}"


def win_table(variants: Sequence[Variant], results: Sequence[Result], of: str = "loratorio") -> str:
    """How often one variant has more of the elements than each of the others."""
    results = comparable(variants, results)
    chosen = next(variant for variant in variants if variant.name == of)
    own = [result for result in results if result.cell.is_of(chosen)]
    lines = ["| against | wins (ties half) | 95 % |", "| --- | ---: | ---: |"]
    for variant in variants:
        rate, low, high = win_rate(own, [result for result in results if result.cell.is_of(variant)])
        if variant.name != of and not math.isnan(rate):
            lines.append(f"| {variant.label} | {percent(rate)} | {percent(low)} to {percent(high)} |")
    return "\n".join(lines)


def category_table(
    variants: Sequence[Variant],
    results: Sequence[Result],
    categories: Mapping[str, Sequence[str]],
    counts: Sequence[int] = (2, 3, 4, 5),
) -> str:
    """Share of each category's wanted elements that is found, over all N, and for each N in brackets.

    Args:
        categories: names of the elements by category.
    """
    results = comparable(variants, results)
    lines = [
        ["", *(f"{category} ({', '.join(map(str, counts))})" for category in categories)],
        ["---", *["---"] * len(categories)],
    ]
    for variant in variants:
        own = [result for result in results if result.cell.is_of(variant)]
        if not own:
            continue
        cells = [variant.label]
        for names in categories.values():
            whole = percent(_share_of(names, own))
            by_count = [_share_of(names, of_size(own, count)) for count in counts]
            each = ", ".join("–" if math.isnan(share) else f"{100 * share:.0f}" for share in by_count)
            cells.append(f"{whole} ({each})" if whole else "–")
        lines.append(cells)
    return _markdown(lines)


def _share_of(names: Sequence[str], results: Sequence[Result]) -> float:
    """How often these elements are found where they are wanted; NaN where they never are."""
    found = [
        name in image.found
        for result in results
        for name in result.cell.elements
        if name in names
        for image in result.images
    ]
    return sum(found) / len(found) if found else math.nan


def without(names: Sequence[str], results: Sequence[Result]) -> list[Result]:
    """Results of the combinations that have none of these elements."""
    return [result for result in results if not set(names) & set(result.cell.elements)]


def order(results: Sequence[Result]) -> str:
    """The main methods by elements found, most first: ``A > B ≈ C``, > where the 95 % interval of the paired difference leaves out 0.

    Empty where not all of them have results.
    """
    results = comparable(MAIN_ROWS, results)
    by_label = {
        variant.label: {r.cell.elements: shares(r) for r in results if r.cell.is_of(variant)}
        for variant in MAIN_ROWS
    }
    if not all(by_label.values()):
        return ""
    ranked = sorted(by_label, key=lambda label: -float(np.concatenate([*by_label[label].values()]).mean()))
    text = ranked[0]
    for first, second in itertools.pairwise(ranked):
        differences = [own - by_label[second][elements] for elements, own in by_label[first].items()]
        text += f" {'>' if measures.bootstrap(differences)[0] > 0 else '≈'} {second}"
    return text


_ORDER = "By elements found: "


def published_order(file: Path) -> str:
    """The order that a page of results states; empty if it states none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(_ORDER).rstrip(".") for line in lines if line.startswith(_ORDER)), "")


def agrees(own: str, published: str) -> bool:
    """Whether an order puts no two methods the other way round that are clearly apart in the published one, and has all of those."""
    place = {
        label: number for number, tier in enumerate(published.split(" > ")) for label in tier.split(" ≈ ")
    }
    labels = own.replace(" ≈ ", " > ").split(" > ")
    ranked = [place[label] for label in labels if label in place]
    return place.keys() <= set(labels) and ranked == sorted(ranked)


def plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """One plot of found elements by N, and one for each ablation that has results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []

    def save(name: str, draw: Callable[[], None]) -> None:
        figure = pyplot.figure(figsize=(7, 4.2))
        draw()
        pyplot.tight_layout()
        file = folder / f"{name}.png"
        figure.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        files.append(file)

    def by_count(variants: Sequence[Variant]) -> None:
        own = comparable(variants, results)
        truth = [result for result in own if result.cell.made == "truth"]
        counts = [count for count in (2, 3, 4, 5) if of_size(own, count)]
        for place, variant in enumerate(variants):
            rows = [row(variant, of_size(own, count), truth) for count in counts]
            points = [(count, each) for count, each in zip(counts, rows, strict=True) if each]
            if points:
                # A little apart, so that the intervals do not hide one another.
                at = [count + 0.03 * (place - len(variants) / 2) for count, _ in points]
                found = np.array([each.found for _, each in points])
                low, high = np.array([each.interval for _, each in points]).T
                error = 100 * np.array([found - low, high - found])
                # There are ten colours.
                again = place >= 10
                style = {"marker": "s" if again else "o", "linestyle": "--" if again else "-"}
                pyplot.errorbar(at, 100 * found, yerr=error, capsize=2, label=variant.label, **style)
        pyplot.xticks(counts)
        pyplot.xlabel("LoRAs in the picture")
        pyplot.ylabel("elements found, % (95 %)")
        pyplot.ylim(0, 102)
        pyplot.legend(fontsize=7, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))

    for name, variants in (("methods", MAIN_ROWS), ("all_methods", METHOD_ROWS)):
        if any(not result.cell.pool and result.cell.is_of(variants[0]) for result in results):
            save(name, partial(by_count, variants))
    for knob, variants in ABLATIONS.items():
        own = comparable(variants, results)
        true = [result for result in own if result.cell.made == "truth"]
        points = [(variant, row(variant, own, true)) for variant in variants]
        present = [(variant, each) for variant, each in points if each is not None]
        if len(present) < 2:
            continue

        def curve(knob: str = knob, present: list[tuple[Variant, TableRow]] = present) -> None:
            values = [str(variant.knobs[knob]) for variant, _ in present]
            found = [100 * each.found for _, each in present]
            error = np.array(
                [
                    [100 * (each.found - each.interval[0]), 100 * (each.interval[1] - each.found)]
                    for _, each in present
                ]
            ).T
            pyplot.errorbar(values, found, yerr=error, marker="o", capsize=3, label="elements found, %")
            pyplot.ylim(0, 100)
            pyplot.xlabel(knob)
            pyplot.ylabel("elements found, % (95 %)")
            other = pyplot.twinx()
            other.plot(
                values, [each.frechet for _, each in present], color="tab:red", marker="s", linestyle="--"
            )
            other.set_ylabel("Fréchet distance to truth", color="tab:red")

        save(f"ablation_{knob}", curve)
    return files


def ablation_table(knob: str, results: Sequence[Result]) -> str:
    results = comparable(ABLATIONS[knob], results)
    truth = [result for result in results if result.cell.made == "truth"]
    lines = [
        f"| {knob} | found (95 %) | all in one picture | Fréchet | edges | saturation |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in ABLATIONS[knob]:
        own = row(variant, results, truth)
        if own is not None:
            low, high = own.interval
            lines.append(
                f"| {variant.knobs[knob]} | {percent(own.found)} ({percent(low)} to {percent(high)}) | {percent(own.every)} | "
                f"{figure(own.frechet, '.2f')} | {figure(own.edges, '+.3f')} | {figure(own.saturation, '+.3f')} |"
            )
    return "\n".join(lines)


def document(
    results: Sequence[Result],
    command: str,
    cells: int,
    plots_at: Mapping[str, str],
    notes: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    sections_after_methods: Sequence[str] = (),
) -> str:
    """docs/lab/RESULTS.md: what was run (of how many cells), the tables, and what the columns mean.

    With the elements by category, the main methods' table is followed by one of categories, and one of combinations without a style.
    """
    wide = [result for result in results if result.cell.beside]
    pictures = [result for result in results if result.cell.made != "truth" and not result.cell.beside]
    main = [result for result in results if not result.cell.pool and not result.cell.beside]
    sampling = {
        f"{k}={v}" for r in pictures for k, v in r.cell.knobs.items() if k in ("steps", "cfg", "sampler")
    }
    done = len(results)
    whole = (
        "All of its cells are done."
        if done >= cells
        else f"{cells - done} of its {cells} cells are not done yet: the same command goes on with them."
    )
    sections = [
        _HEAD.format(
            command=command,
            sampling=", ".join(sorted(sampling)),
            pictures=sum(len(result.images) for result in (*pictures, *wide)),
            whole=whole,
        ),
        *notes,
        "## Methods",
        said_of(MAIN_ROWS, main),
        table(MAIN_ROWS, main),
    ]
    if found := order(main):
        sections.append(f"{_ORDER}{found}.")
    sections += [_COLUMNS, *_picture("methods", "Elements found by number of LoRAs", plots_at)]
    sections += ["### How often LoRAtorio has more of the elements", win_table(MAIN_ROWS, main)]
    if categories:
        sections += ["### By category", _CATEGORIES, category_table(MAIN_ROWS, main, categories)]
        plain = without(categories.get(STYLE, ()), main)
        if _has(MAIN_ROWS, plain) and len(plain) < len(main):
            sections += ["### Without styles", _PLAIN, said_of(MAIN_ROWS, plain), table(MAIN_ROWS, plain)]
            if found := order(plain):
                sections.append(f"Without styles: {found}.")
            sections += [win_table(MAIN_ROWS, plain)]
    sections += sections_after_methods
    if wide and categories:
        by_name = {name: category for category, names in categories.items() for name in names}
        sections += ["## A place for each LoRA", _PLACES, beside.table(wide, by_name)]
    others = [variant for variant in METHOD_ROWS if variant not in MAIN_ROWS]
    if _has(others, main):
        sections += ["## All methods", said_of(METHOD_ROWS, main), table(METHOD_ROWS, main)]
        sections += _picture("all_methods", "Elements found by number of LoRAs, all methods", plots_at)
        sections += ["How often LoRAtorio has more of the elements:", win_table(METHOD_ROWS, main)]
    if _has(ROLE_ROWS[-2:], main):
        sections += ["## Roles of styles", _ROLES, said_of(ROLE_ROWS, main), table(ROLE_ROWS, main)]
    if _has(BETTER_ROWS[1:], main):
        sections += ["## What the paper does not have, one at a time", said_of(BETTER_ROWS, main)]
        sections += [table(BETTER_ROWS, main)]
    if any(result.cell.pool for result in results):
        dynamic = [result for result in results if result.cell.pool or result.cell.made == "truth"]
        sections += ["## The whole toybox as a pool", _DYNAMIC, said_of(DYNAMIC_ROWS, dynamic)]
        sections += [table(DYNAMIC_ROWS, dynamic)]
    curves = [knob for knob in ABLATIONS if sum(_has([variant], main) for variant in ABLATIONS[knob]) > 1]
    if curves:
        sections += ["## The defaults", _DEFAULTS]
    for knob in curves:
        sections += [f"### {knob}", said_of(ABLATIONS[knob], main), ablation_table(knob, main)]
        sections += _picture(f"ablation_{knob}", knob, plots_at)
    return "\n\n".join(sections) + "\n"


def said_of(variants: Sequence[Variant], results: Sequence[Result]) -> str:
    """How many combinations and seeds a table of these variants has."""
    own = [result for result in comparable(variants, results) if result.cell.made != "truth"]
    combos = {result.cell.elements for result in own}
    parts = [f"{sum(len(c) == n for c in combos)} of N={n}" for n in (2, 3, 4, 5)]
    seeds = sorted({result.cell.count for result in own})
    return (
        f"Combinations: {', '.join(part for part in parts if not part.startswith('0 '))}; "
        f"{' or '.join(map(str, seeds))} seeds each."
    )


def _has(variants: Sequence[Variant], results: Sequence[Result]) -> bool:
    return any(result.cell.is_of(variant) for result in results for variant in variants)


def _picture(name: str, words: str, plots_at: Mapping[str, str]) -> list[str]:
    return [f"![{words}]({plots_at[name]})"] if name in plots_at else []


_HEAD = """# Results

Made by `{command}`; nothing on this page was written by hand but the notes. {whole}
Every combination has a character and at most one LoRA per category; {sampling}; {pictures} pictures in all."""

_COLUMNS = """- *N=2 … 5*, *all N*: share of the wanted elements that the toybox's classifier finds; the interval resamples combinations.
  The first row is what the same classifier says of rendered truth: no method can be trusted to a finer degree than that.
- *all in one picture*: pictures in which nothing is missing. *unasked*: elements found that nobody asked for, per picture.
- *Fréchet*: distance of the classifier's features to those of rendered truth of the same combinations; lower is better.
  Comparable within a table only.
- *edges*: steps across patch borders by steps elsewhere; *saturation*, *clipped*: mean saturation and share of values at
  0 or 255. All as a difference to rendered truth: 0 is best.
- *rows*: model rows a picture costs; *s*: seconds of processor time that a picture took on the machine at hand, sampling and
  decoding. Little pictures in batches of a few: other machines and sizes have other ratios (docs/lab/BENCHMARKS.md)."""

_CATEGORIES = "Share of each category's wanted elements that is found: over all N, and in brackets for each N, in per cent."

_PLACES = """Two characters in a picture of 128×64 px, where the base draws two dolls: all ordered pairs, alone, with each background
and with each style over the whole picture (Euler, 20 steps, CFG 3). A half is right when it has its own character and not
the other's; *found* is in how many of the halves."""

_PLAIN = "The same cells, but only combinations that have no style."

_ROLES = "Only combinations that have a style; the role is the style's."

_DYNAMIC = "The prompt says what is wanted, and every LoRA of the toybox is a candidate: the paper's dynamic setting."

_DEFAULTS = "Each knob on its own, the others at their defaults; the defaults in `loratorio/settings.py` are chosen by these tables."
