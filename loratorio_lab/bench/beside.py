"""Two characters next to each other, each from its own LoRA, with and without places; alone, in front of a background, under a style."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from loratorio.settings import PRESETS

from .plan import CHARACTER, PAPER, SAMPLING, STYLE, Cell, Variant, cell
from .store import ImageResult, Result

if TYPE_CHECKING:
    from loratorio_lab.toybox.world import World

ROWS: tuple[Variant, ...] = (
    Variant("beside_truth", "Rendered truth", made="truth", beside="free"),
    Variant("beside_merge", "Merge", {"method": "merge"}, beside="free"),
    Variant("beside_free", "LoRAtorio", PAPER, beside="free"),
    Variant("beside_placed", "**LoRAtorio, a place for each**", PAPER, beside="placed"),
    Variant("beside_share", "the same, shared part 0.15", {**PAPER, "share": 0.15}, beside="placed"),
    Variant(
        "beside_yielding",
        "LoRAtorio, a place for each, yielding 0.85",
        {**PAPER, "yielding": 0.85},
        beside="placed",
    ),
    *(
        Variant(
            f"beside_{name}",
            f"{PRESETS[name].label}, a place for each",
            PRESETS[name].values,
            beside="placed",
        )
        for name in ("balanced", "fast")
    ),
)

_BALANCED = PRESETS["balanced"].values

WORD_ROWS: tuple[Variant, ...] = (
    Variant(
        "common_whole",
        "both words in the prompt, read by both",
        {**_BALANCED, "own_words": False},
        beside="placed common",
    ),
    Variant(
        "common", "**both words in the prompt, each read by its own LoRA**", _BALANCED, beside="placed common"
    ),
    Variant("beside_balanced", "Balanced, a place for each", _BALANCED, beside="placed"),
)
"""Whose words a LoRA reads; the last row has `words=`, as all placed rows of the other table."""

FOUND_ROWS: tuple[Variant, ...] = (
    *ROWS[:2],
    Variant("free_balanced", "Balanced, no places", _BALANCED, beside="free"),
    *WORD_ROWS[1:],
    *(
        Variant(
            f"found_{after}{common.replace(' ', '_')}",
            f"Balanced, found after {after} step{'s' if after > 1 else ''}, {words}",
            {**_BALANCED, "find_after": after},
            beside=f"found{common}",
        )
        for after in (2, 1, 4)
        for common, words in (("", "own words"), (" common", "words in the common prompt"))
    ),
)
"""The same prompts with places that are found, and beside them drawn ones, none, merged and rendered ones."""

BACKGROUND = "background"


def cells(
    categories: Mapping[str, Sequence[str]], seeds: int, rows: Sequence[Variant] = ROWS, *, truth: bool
) -> list[Cell]:
    """All ordered pairs of characters, alone and with every background or style that lies over the whole picture."""
    pairs = list(itertools.permutations(categories.get(CHARACTER, ()), 2))
    further = [
        (),
        *((name,) for kind in (BACKGROUND, STYLE) for name in categories.get(kind, ())),
    ]
    return [
        cell(variant, (*pair, *more), seeds, SAMPLING)
        for more in further
        for pair in pairs
        for variant in rows
        if truth or variant.made != "truth"
    ]


def prompt(cell: Cell, world: World) -> str:
    """The words of the elements, and the tags. Only characters have places."""
    left, right, *more = cell.elements
    of = {element.name: element for element in world.elements}
    background = next((of[name].trigger for name in more if of[name].category == BACKGROUND), world.plain)
    styles = [f"{of[name].trigger} style" for name in more if of[name].category == STYLE]
    rest = [f"{background} background", *styles]
    everywhere = [f"<lora:{name}:1>" for name in more]
    # A LoRA that reads its own words only knows of no other figure, and one alone is large.
    words = [
        f"small {of[name].trigger} on the {side}"
        for name, side in zip((left, right), world.sides, strict=True)
    ]
    kind, _, common = cell.beside.partition(" ")
    if kind != "free":
        sides = ("left", "right") if kind == "placed" else ("auto", "auto")
        # Each character's word belongs to its own place.
        own = ["" if common else f":words={each}" for each in words]
        pair = [
            f"<lora:{name}:at={side}{each}:1>"
            for name, side, each in zip((left, right), sides, own, strict=True)
        ]
    else:
        pair, common = [f"<lora:{left}:1>", f"<lora:{right}:1>"], "common"
    return " ".join([", ".join([*words, *rest] if common else rest), *pair, *everywhere])


def found_in(halves: Sequence[Mapping[str, bool]]) -> tuple[str, ...]:
    """What the classifier finds in the left and in the right half, as ``left:cat``."""
    return tuple(
        f"{side}:{name}"
        for side, found in zip(("left", "right"), halves, strict=True)
        for name, there in found.items()
        if there
    )


def is_right(image: ImageResult, elements: Sequence[str]) -> bool:
    """Whether each half has its own character and not the other's."""
    left, right = elements[:2]
    wanted, wrong = {f"left:{left}", f"right:{right}"}, {f"left:{right}", f"right:{left}"}
    found = set(image.found)
    return wanted <= found and not wrong & found


def table(results: Sequence[Result], category: Mapping[str, str]) -> str:
    """Per variant: the share of pictures with both halves right, alone and with each background and style, and of halves in which that
    is found."""
    further = list(dict.fromkeys(name for result in results for name in result.cell.elements[2:]))
    further.sort(key=lambda name: (category[name] != BACKGROUND, name))
    titles = [f"{'before' if category[name] == BACKGROUND else 'in'} {name}" for name in further]
    lines = [
        f"| both halves right / that is found | {' | '.join(['alone', *titles])} |",
        "| --- |" + " ---: |" * (1 + len(further)),
    ]
    every = [*ROWS, *WORD_ROWS, *FOUND_ROWS]
    for variant in (each for i, each in enumerate(every) if each not in every[:i]):
        own = [result for result in results if result.cell.is_of(variant)]
        if not own:
            continue
        shown = [_share_right([each for each in own if len(each.cell.elements) == 2])]
        for name in further:
            part = [each for each in own if name in each.cell.elements[2:]]
            shown.append(f"{_share_right(part)} / {_share_found(part, name)}" if part else "–")
        lines.append(f"| {variant.label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _share_right(results: Sequence[Result]) -> str:
    right = [is_right(image, result.cell.elements) for result in results for image in result.images]
    return f"{100 * np.mean(right):.0f}" if right else "–"


def _share_found(results: Sequence[Result], name: str) -> str:
    found = [
        f"{side}:{name}" in image.found
        for result in results
        for image in result.images
        for side in ("left", "right")
    ]
    return f"{100 * np.mean(found):.0f}"
