"""Tables and plots of the results, and docs/lab/RESULTS.md made of them."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
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
        edges, saturation: as differences to rendered truth.
        rows: per picture.
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


def of_size(results: Sequence[Result], count: int) -> list[Result]:
    return [result for result in results if len(result.cell.elements) == count]


def table(variants: Sequence[Variant], results: Sequence[Result], whole: bool = True) -> str:
    """Elements found, in all and how well. whole: also per N, and first what the classifier finds in rendered truth."""
    results = comparable(variants, results)
    counts = [count for count in (2, 3, 4, 5) if whole and of_size(results, count)]
    truth = [result for result in results if result.cell.made == "truth"]
    head = ["", *(f"N={count}" for count in counts), "all N (95 %)", "all in one picture", "unasked"]
    head += ["Fréchet", "rows"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for variant in (*((TRUTH,) if whole else ()), *variants):
        every = row(variant, results, truth)
        if every is None:
            continue
        by_count = [row(variant, of_size(results, count), truth) for count in counts]
        cells = [variant.label, *("" if each is None else percent(each.found) for each in by_count)]
        cells += [with_interval(every), percent(every.every), f"{every.other:.2f}"]
        cells += ["", ""] if variant.made == "truth" else [figure(every.frechet, ".1f"), f"{every.rows:.0f}"]
        lines.append(cells)
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.0f}"


def with_interval(of: TableRow) -> str:
    """The elements that it finds, and the 95 % interval, in per cent."""
    return ranged(of.found, of.interval)


def ranged(share: float, interval: tuple[float, float]) -> str:
    """A share and its interval, in per cent."""
    return f"{percent(share)} ({percent(interval[0])}–{percent(interval[1])})"


def figure(value: float, form: str) -> str:
    """A number in this format, or nothing for NaN: a Fréchet distance needs two pictures."""
    return "" if math.isnan(value) else f"{value:{form}}"


def category_table(
    variants: Sequence[Variant], results: Sequence[Result], categories: Mapping[str, Sequence[str]]
) -> str:
    """Share of each category's wanted elements that is found, over all N.

    Args:
        categories: names of the elements by category.
    """
    results = comparable(variants, results)
    lines = [["", *categories], ["---", *["---:"] * len(categories)]]
    for variant in variants:
        own = [result for result in results if result.cell.is_of(variant)]
        if own:
            found = [percent(_share_of(names, own)) or "–" for names in categories.values()]
            lines.append([variant.label, *found])
    return markdown(lines)


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


_NOTES = re.compile("<!-- notes -->.*<!-- end of notes -->", re.DOTALL)


def notes_in(file: Path) -> str:
    """What was written by hand into a page of results, with the marks around it; empty if there is no page, or no such part."""
    found = _NOTES.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[0] if found else ""


_ORDER = "By elements found: "


def published_order(file: Path) -> str:
    """The order that a page of results states; empty if it states none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(_ORDER).rstrip(".") for line in lines if line.startswith(_ORDER)), "")


def agrees(own: str, published: str) -> bool:
    """Whether an order has all published methods, and reverses none that are clearly apart in the published order."""
    place = {
        label: number for number, tier in enumerate(published.split(" > ")) for label in tier.split(" ≈ ")
    }
    labels = own.replace(" ≈ ", " > ").split(" > ")
    ranked = [place[label] for label in labels if label in place]
    return place.keys() <= set(labels) and ranked == sorted(ranked)


def plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """Found elements by N, of the main methods and of all."""
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
    return files


def ablation_table(knobs: Sequence[str], results: Sequence[Result]) -> str:
    """One row per value of each knob; differences of edges and saturation are to rendered truth."""
    lines = [["knob", "value", "found (95 %)", "all in one picture", "Fréchet", "edges", "saturation"]]
    lines += [["---", *["---:"] * (len(lines[0]) - 1)]]
    for knob in knobs:
        own = comparable(ABLATIONS[knob], results)
        truth = [result for result in own if result.cell.made == "truth"]
        for variant in ABLATIONS[knob]:
            each = row(variant, own, truth)
            if each is not None:
                figures = [
                    figure(each.frechet, ".1f"),
                    figure(each.edges, "+.2f"),
                    figure(each.saturation, "+.2f"),
                ]
                lines.append(
                    [knob, f"{variant.knobs[knob]}", with_interval(each), percent(each.every), *figures]
                )
    return markdown(lines)


def document(
    results: Sequence[Result],
    command: str,
    cells: int,
    plots_at: Mapping[str, str],
    notes: str = "",
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
        "# Results",
        textwrap.fill(
            f"Made by `{command}`; only the notes are written by hand, and kept. {whole} Every combination has a character and at most one "
            f"LoRA per category; {', '.join(sorted(sampling))}; {sum(len(each.images) for each in (*pictures, *wide))} pictures in all.",
            width=150,
            break_on_hyphens=False,
        ),
        *([notes] if notes else []),
        "## Methods",
        said_of(MAIN_ROWS, main),
        table(MAIN_ROWS, main),
    ]
    if found := order(main):
        sections.append(f"{_ORDER}{found}.")
    sections += [_COLUMNS, *_picture("methods", "Elements found by number of LoRAs", plots_at)]
    if categories:
        sections += ["### By category", _CATEGORIES, category_table(MAIN_ROWS, main, categories)]
        plain = without(categories.get(STYLE, ()), main)
        if _has(MAIN_ROWS, plain) and len(plain) < len(main):
            sections += ["### Without styles", _PLAIN, said_of(MAIN_ROWS, plain), table(MAIN_ROWS, plain)]
            if found := order(plain):
                sections.append(f"Without styles: {found}.")
    sections += sections_after_methods
    if wide and categories:
        by_name = {name: category for category, names in categories.items() for name in names}
        sections += ["## A place for each LoRA", _PLACES, beside.table(wide, by_name)]
    others = [variant for variant in METHOD_ROWS if variant not in MAIN_ROWS]
    if _has(others, main):
        rows = [*others, MAIN_ROWS[-1]]
        sections += ["## Other methods", said_of(rows, main), table(rows, main, whole=False)]
        sections += _picture("all_methods", "Elements found by number of LoRAs, all methods", plots_at)
    if _has(ROLE_ROWS[-2:], main):
        sections += [
            "## Roles of styles",
            _ROLES,
            said_of(ROLE_ROWS, main),
            table(ROLE_ROWS, main, whole=False),
        ]
    if (
        sum(_has([variant], main) for variant in BETTER_ROWS[1:]) > 1
    ):  # a single one is a row of the defaults, too
        sections += ["## What the paper does not have, one at a time", said_of(BETTER_ROWS, main)]
        sections += [table(BETTER_ROWS, main, whole=False)]
    if any(result.cell.pool for result in results):
        dynamic = [result for result in results if result.cell.pool or result.cell.made == "truth"]
        sections += ["## The whole toybox as a pool", _DYNAMIC, said_of(DYNAMIC_ROWS, dynamic)]
        sections += [table(DYNAMIC_ROWS, dynamic, whole=False)]
    curves = [knob for knob in ABLATIONS if sum(_has([variant], main) for variant in ABLATIONS[knob]) > 1]
    if curves:
        sections += [
            "## The defaults",
            _DEFAULTS,
            said_of(ABLATIONS[curves[0]], main),
            ablation_table(curves, main),
        ]
    return "\n\n".join(sections) + "\n"


def said_of(variants: Sequence[Variant], results: Sequence[Result]) -> str:
    """How many combinations and seeds a table of these variants has."""
    own = [result for result in comparable(variants, results) if result.cell.made != "truth"]
    combos = {result.cell.elements for result in own}
    parts = [f"{sum(len(c) == n for c in combos)} of N={n}" for n in (2, 3, 4, 5)]
    seeds = sorted({result.cell.count for result in own})
    return (
        f"Combinations: {', '.join(part for part in parts if not part.startswith('0 '))}; "
        f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'} each."
    )


def _has(variants: Sequence[Variant], results: Sequence[Result]) -> bool:
    return any(result.cell.is_of(variant) for result in results for variant in variants)


def _picture(name: str, words: str, plots_at: Mapping[str, str]) -> list[str]:
    return [f"![{words}]({plots_at[name]})"] if name in plots_at else []


_COLUMNS = """- *N=2 … 5*, *all N*: wanted elements that the toybox's classifier finds, in per cent. The interval resamples combinations.
  *Rendered truth* is what the classifier finds in rendered pictures.
- *all in one picture*: pictures in which nothing is missing, in per cent. *unasked*: elements per picture that were not requested.
- *Fréchet*: distance of the classifier's features to those of rendered truth; lower is better. Comparable within a table only.
- *rows*: model rows per picture."""

_CATEGORIES = "Wanted elements of each category that are found, over all N, in per cent."

_PLACES = """Two characters in a picture of 192×128 px: all ordered pairs, alone, with each background and with each style over the
whole picture; three in 288 px and four in 384, neighbours in the list of characters. A part is right when it has its own character
and none of the others'. Per cent of the pictures in which all are, and of the halves in which the background or style is found."""

_PLAIN = "The same, of combinations without a style."

_ROLES = "Combinations with a style; the role is the style's."

_DYNAMIC = "The prompt calls the wanted elements; every LoRA of the toybox is a candidate (the paper's dynamic setting)."

_DEFAULTS = """The defaults in `loratorio/settings.py` are chosen by this table. One knob changes, the others are *Paper*'s.
*edges*: steps across patch borders over steps elsewhere; *saturation*: the mean. Both as differences to rendered truth: 0 is best."""
