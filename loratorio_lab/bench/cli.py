"""`loratorio-lab bench`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.chosen_toybox import add_toybox, toybox_of

from . import beside
from .plan import (
    ABLATIONS,
    BETTER_ROWS,
    CHARACTER,
    DYNAMIC_ROWS,
    MAIN_ROWS,
    METHOD_ROWS,
    PRESET_ROWS,
    ROLE_ROWS,
    SAMPLING,
    SPEED_ROWS,
    STYLE,
    TRUTHS,
    Cell,
    Variant,
    cells,
    combinations,
    distinct,
    sample,
)

QUICK_MINUTES = 9.0
GROUPS = (
    "methods",
    "presets",
    "styles",
    "speed",
    "others",
    "roles",
    "better",
    "dynamic",
    "ablations",
    "places",
    "words",
    "found",
)
GRID: Mapping[str, Any] = {
    "groups": ",".join(GROUPS),
    "combinations": 24,
    "other_combinations": 8,
    "ablation_combinations": 6,
    "seeds": 2,
    "ablation_seeds": 2,
    "place_seeds": 2,
    "preset_seeds": 2,
    "speed_combinations": 12,
    "elements": "",
    "counts": "2,3,4,5",
    **SAMPLING,
}
"""What the tables are made of unless an option says otherwise."""
DOCS = Path(__file__).parents[2] / "docs" / "lab"
PUBLISHED = DOCS / "RESULTS.md"
"""In a clone: the tables that ship."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="loratorio-lab bench",
        description="Makes pictures of every combination by every method, measures them, and writes tables and plots. "
        "Goes on from what is in --out after it was stopped. With --webui it does the same with your own LoRAs in a running WebUI.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a part of the methods' tables, in under ten minutes on two cores, and whether the published order holds; "
        "with --webui merging and the presets, in as long",
    )
    parser.add_argument(
        "--groups",
        default=GRID["groups"],
        help=f"which tables, of {', '.join(GROUPS)}, with commas between",
    )
    for name, about in (
        ("combinations", "how many of each N for the main methods (0: all)"),
        ("other_combinations", "how many of each N for the other methods and roles"),
        ("ablation_combinations", "how many of each N for the other tables"),
        ("seeds", "pictures per combination and method"),
        ("ablation_seeds", "pictures per combination in the other tables"),
        ("place_seeds", "pictures per group of characters in the table of places"),
        ("preset_seeds", "pictures per combination and preset"),
        ("speed_combinations", "how many of each N for what the presets are chosen from"),
        ("elements", "only these LoRAs of the toybox, with commas between"),
        ("counts", "numbers of LoRAs, with commas between"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(GRID[name]), default=GRID[name], help=about)
    for name, of in (("steps", int), ("cfg", float), ("sampler", str)):
        parser.add_argument(
            f"--{name}", type=of, help=f"{SAMPLING[name]} for the toybox; with --webui the WebUI's own"
        )
    parser.add_argument("--out", type=Path, default=Path("loratorio-bench"), help="folder of the results")
    parser.add_argument(
        "--report",
        type=Path,
        help="write the tables here (docs/lab/RESULTS.md), and plots into results/ next to it; notes between its marks are kept",
    )
    parser.add_argument("--report-only", action="store_true", help="make no picture, only the report")
    parser.add_argument("--minutes", type=float, help="begin no new cell after this time")
    # Models as small as the toybox's are no faster with two threads, and much slower where another program wants one.
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="cells at once (as many as processors)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="on Ray: 'local' for this machine, 'auto' or an address for a cluster",
    )
    add_toybox(parser)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument(
        "--webui",
        metavar="URL",
        help="measure your own LoRAs in a running WebUI, by CLIPScore (needs open_clip)",
    )
    parser.add_argument(
        "--loras", type=Path, help="with --webui: JSON file of the LoRAs and their trigger words by category"
    )
    parser.add_argument(
        "--base-prompt", default="", help="with --webui: what stands before the trigger words"
    )
    parser.add_argument("--negative", default="", help="with --webui: the negative prompt")
    parser.add_argument("--size", help="with --webui: of the pictures, e.g. 512x768; else the WebUI's own")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Raises LoratorioError where something in the input is wrong."""
    bench(parser().parse_args(arguments))


def bench(options: argparse.Namespace) -> None:
    """Make what is missing, and report."""
    if options.minutes is None and options.quick:
        options.minutes = QUICK_MINUTES
    if options.webui:
        from .webui import bench_webui

        bench_webui(options)
        return
    from .backend import named
    from .runner import run
    from .store import Store

    for name, value in SAMPLING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check(options)
    grid = the_grid(options)
    backend = options.backend or named(options)
    store = Store(options.out / ("unregularised" if options.unregularised else "cells"))
    if not options.report_only:
        until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        since = time.monotonic()

        def tell(done: int, total: int, cell: Cell) -> None:
            spent = time.monotonic() - since
            print(
                f"{done}/{total} after {spent:.0f} s: {cell.variant} {'+'.join(cell.elements)}",
                file=sys.stderr,
                flush=True,
            )

        count = run(grid, store, backend, options.workers, options.ray, until, tell)
        left = len(store.missing(grid))
        print(f"{count} cells done now, {len(grid) - left} of {len(grid)} in {options.out}.")
    _report(options, grid, store)


def check(options: argparse.Namespace) -> None:
    """Raises LoratorioError for numbers that make no sense."""
    for what, least in (
        ("seeds", 1),
        ("ablation_seeds", 1),
        ("place_seeds", 1),
        ("preset_seeds", 1),
        ("speed_combinations", 0),
        ("workers", 1),
        ("combinations", 0),
        ("other_combinations", 0),
        ("ablation_combinations", 0),
        ("steps", 1),
    ):
        if getattr(options, what) < least:
            raise LoratorioError(
                f"--{what.replace('_', '-')} must be {least} or more, not {getattr(options, what)}."
            )
    for group in options.groups.split(","):
        if group not in GROUPS:
            raise LoratorioError(f"--groups must be of {', '.join(GROUPS)}, not {group!r}.")
    if not set(options.counts.split(",")) <= {"2", "3", "4", "5"}:
        raise LoratorioError(
            f"--counts must be of 2, 3, 4 and 5, with commas between, not {options.counts!r}."
        )


def chosen_categories(options: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """The toybox's elements by category, or only those in --elements. Raises LoratorioError."""
    categories, names = toybox_of(options).categories(), options.elements
    if not names:
        return categories
    wanted = {name.strip() for name in names.split(",")}
    unknown = wanted - {name for own in categories.values() for name in own}
    if unknown or not wanted & set(categories[CHARACTER]):
        known = ", ".join(name for own in categories.values() for name in own)
        raise LoratorioError(f"--elements must be of {known}, a character among them, not {names!r}.")
    return {category: [name for name in own if name in wanted] for category, own in categories.items()}


def the_grid(options: argparse.Namespace) -> list[Cell]:
    """All cells that the options request, each once: first a part of every table, last the main methods on the other combinations."""
    groups = ["others", "methods"] if options.quick else options.groups.split(",")
    counts = [int(count) for count in options.counts.split(",")]
    sampling = {"steps": options.steps, "cfg": options.cfg, "sampler": options.sampler}
    categories = chosen_categories(options)
    every, some, few = options.combinations, options.other_combinations, options.ablation_combinations
    if options.quick:
        every, some = 6, 1
    few_seeds = min(options.seeds, options.ablation_seeds)
    drawn = options.art is not None  # the truth can be rendered

    def part(
        variants: Sequence[Variant], limit: int, seeds: int, of: Sequence[str] = (), **other: Any
    ) -> Iterator[Cell]:
        # By rounds over N, so that a grid that is stopped has as many of each, as far as there are.
        chosen = [
            sample([c for c in combinations(categories, n) if not of or set(c) & set(of)], limit)
            for n in counts
        ]
        longest = max((len(each) for each in chosen), default=0)
        mixed = [each[i] for i in range(longest) for each in chosen if i < len(each)]
        yield from cells(variants, mixed, seeds, {**sampling, **other}, TRUTHS if drawn else 0)

    grid: list[Cell] = []
    if options.quick:  # in nine minutes on a slow machine the main methods must be there
        grid += part(MAIN_ROWS, every, options.seeds)
    if "others" in groups:
        grid += part(METHOD_ROWS, some, options.seeds)
    if "roles" in groups:
        grid += part(ROLE_ROWS, some, options.seeds, categories.get(STYLE, ()))
    if "better" in groups:
        grid += part(BETTER_ROWS, few, few_seeds)
    if "dynamic" in groups:
        grid += part(DYNAMIC_ROWS, few, few_seeds)
    if "ablations" in groups:
        grid += part([variant for rows in ABLATIONS.values() for variant in rows], few, few_seeds)
    if "places" in groups:
        grid += beside.cells(categories, options.place_seeds, truth=drawn)
    if "styles" in groups:
        from . import styles

        grid += styles.cells(categories, options.preset_seeds, truth=drawn)
    if "words" in groups:
        grid += beside.cells(categories, options.place_seeds, beside.WORD_ROWS, truth=drawn)
    if "found" in groups:
        grid += beside.cells(categories, options.place_seeds, beside.FOUND_ROWS, truth=drawn)
    if "speed" in groups:
        grid += part(SPEED_ROWS, options.speed_combinations, options.preset_seeds)
    if "presets" in groups:
        grid += part(PRESET_ROWS, every, options.preset_seeds)
    if "methods" in groups:
        grid += part(MAIN_ROWS, every, options.seeds)
    return distinct(grid)


def _report(options: argparse.Namespace, grid: Sequence[Cell], store: Any) -> None:
    from . import presets, styles
    from .report import agrees, document, notes_in, order, plots, published_order, table

    results = list(store.read(grid))
    if speed := presets.section(results, {}):
        print("\n\n".join(speed))
    if not results:
        print("There are no results yet.")
        return
    print(table(MAIN_ROWS, results))
    categories = chosen_categories(options)
    in_styles = styles.section(results, categories)
    print("\n\n".join(in_styles))
    if wide := [result for result in results if result.cell.beside]:
        of = {name: category for category, names in categories.items() for name in names}
        print(beside.table(wide, of))
    found = order(results)
    published = published_order(PUBLISHED) if PUBLISHED.is_file() else ""
    if found:
        print(f"By elements found: {found}.")
    if found and published:
        verdict = "agrees with" if agrees(found, published) else "DIFFERS from"
        print(f"This {verdict} the published order, {published} (≈: not clearly apart).")
    if options.report is None:
        return
    folder = options.report.parent / ("results_unregularised" if options.unregularised else "results")
    pictures = plots(results, folder)
    if (drawn := presets.plot(results, folder)) is not None:
        pictures.append(drawn)
    by_name = {file.stem: f"{folder.name}/{file.name}" for file in pictures}
    from loratorio.standalone.output import write_all

    text = document(
        results,
        command_line(options),
        len(grid),
        by_name,
        notes_in(options.report),
        categories,
        [*presets.section(results, by_name), *in_styles],
    )
    write_all({options.report: text.encode()})
    print(f"Written: {options.report} and {len(pictures)} plots in {folder}.")


def command_line(options: argparse.Namespace) -> str:
    """The command that makes this report, as a user types it."""
    parts = ["loratorio-lab bench"]
    if options.quick:
        parts.append("--quick")
    for name, default in GRID.items():
        value = getattr(options, name)
        if value != default:
            parts.append(f"--{name.replace('_', '-')} {value}")
    if options.unregularised:
        parts.append("--unregularised")
    if options.toybox != toybox.FOLDER:
        parts.append(f"--toybox {options.toybox.name}")
    if options.art is not None:
        parts.append(f"--art {options.art.name}")
    if options.report is not None:
        parts.append(f"--report docs/lab/{options.report.name}")
    return " ".join(parts)
