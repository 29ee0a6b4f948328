"""Characters next to each other, each from its own LoRA, with and without places.

Two alone, in front of a background, under a style; three and four alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
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
CROWDS = {3: "three", 4: "four"}
"""More characters than two, and their column's title."""


def cells(
    categories: Mapping[str, Sequence[str]], seeds: int, rows: Sequence[Variant] = ROWS, *, truth: bool
) -> list[Cell]:
    """All ordered pairs of characters, alone and with every background or style that lies over the whole picture; three and four
    neighbours in the list of characters, which is a ring."""
    characters = list(categories.get(CHARACTER, ()))
    pairs = list(itertools.permutations(characters, 2))
    overall = [name for kind in (BACKGROUND, STYLE) for name in categories.get(kind, ())]
    groups = [
        *pairs,
        *((*pair, name) for name in overall for pair in pairs),
        *(
            tuple((characters * 2)[i : i + count])
            for count in CROWDS
            if len(characters) >= count
            for i in range(len(characters))
        ),
    ]
    return [
        cell(variant, group, seeds, SAMPLING)
        for group in groups
        for variant in rows
        if truth or variant.made != "truth"
    ]


def characters_of(elements: Sequence[str], category: Mapping[str, str]) -> tuple[str, ...]:
    """The characters among a cell's elements, from left to right."""
    return tuple(name for name in elements if category[name] == CHARACTER)


def width(cell: Cell, world: World) -> int:
    """Of the cell's pictures, in pixels."""
    return world.width_beside(parts(cell, world))


def parts(cell: Cell, world: World) -> int:
    """How many equal parts of the width the cell's pictures have: one for each character."""
    return len(characters_of(cell.elements, _categories(world)))


def _categories(world: World) -> dict[str, str]:
    return {element.name: element.category for element in world.elements}


def prompt(cell: Cell, world: World) -> str:
    """The words of the elements, and the tags. Only characters have places."""
    of = {element.name: element for element in world.elements}
    category = _categories(world)
    characters = characters_of(cell.elements, category)
    more = [name for name in cell.elements if name not in characters]
    background = next((of[name].trigger for name in more if category[name] == BACKGROUND), world.plain)
    styles = [f"{of[name].trigger} style" for name in more if category[name] == STYLE]
    rest = [f"{background} background", *styles]
    everywhere = [f"<lora:{name}:1>" for name in more]
    # A LoRA that reads its own words only knows of no other figure, and one alone is large.
    words = [
        f"small {of[name].trigger}{where}"
        for name, where in zip(characters, world.positions(len(characters)), strict=True)
    ]
    kind, _, common = cell.beside.partition(" ")
    if kind == "free":
        placed, common = [f"<lora:{name}:1>" for name in characters], "common"
    else:
        places = drawn_places(len(characters)) if kind == "placed" else ["auto"] * len(characters)
        # Each character's word belongs to its own place.
        own = ["" if common else f":words={each}" for each in words]
        placed = [
            f"<lora:{name}:at={place}{each}:1>"
            for name, place, each in zip(characters, places, own, strict=True)
        ]
    return " ".join([", ".join([*words, *rest] if common else rest), *placed, *everywhere])


def drawn_places(count: int) -> list[str]:
    """Equal parts of the width, from left to right, as `at=` takes them."""
    if count == 2:
        return ["left", "right"]
    return [f"{i / count:.3g},0,{(i + 1) / count:.3g},1" for i in range(count)]


def found_in(found: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """What the classifier finds in the equal parts of a picture, from left to right, as ``1:cat``."""
    return tuple(f"{i}:{name}" for i, names in enumerate(found, 1) for name in names)


def is_right(image: ImageResult, characters: Sequence[str]) -> bool:
    """Whether each part of the picture has its own character and none of the others'."""
    wanted = {f"{i}:{name}" for i, name in enumerate(characters, 1)}
    every = {f"{i}:{name}" for i in range(1, len(characters) + 1) for name in characters}
    return set(image.found) & every == wanted


def table(results: Sequence[Result], category: Mapping[str, str]) -> str:
    """Per variant: the share of pictures with every character right, two alone and with each background and style, and of halves in which
    that is found; three and four."""

    def count(result: Result) -> int:
        return len(characters_of(result.cell.elements, category))

    further = list(
        dict.fromkeys(name for each in results for name in each.cell.elements if category[name] != CHARACTER)
    )
    further.sort(key=lambda name: (category[name] != BACKGROUND, name))
    crowds = [n for n in CROWDS if any(count(each) == n for each in results)]
    titles = [
        "alone",
        *(f"{'before' if category[name] == BACKGROUND else 'in'} {name}" for name in further),
        *(CROWDS[n] for n in crowds),
    ]
    lines = [
        f"| all right / that is found | {' | '.join(titles)} |",
        "| --- |" + " ---: |" * len(titles),
    ]
    every = [*ROWS, *WORD_ROWS, *FOUND_ROWS]
    for variant in (each for i, each in enumerate(every) if each not in every[:i]):
        own = [result for result in results if result.cell.is_of(variant)]
        if not own:
            continue
        shown = [
            _share_right([each for each in own if count(each) == len(each.cell.elements) == 2], category)
        ]
        for name in further:
            part = [each for each in own if name in each.cell.elements]
            shown.append(f"{_share_right(part, category)} / {_share_found(part, name)}" if part else "–")
        shown += [_share_right([each for each in own if count(each) == n], category) for n in crowds]
        lines.append(f"| {variant.label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _share_right(results: Sequence[Result], category: Mapping[str, str]) -> str:
    right = [
        is_right(image, characters_of(result.cell.elements, category))
        for result in results
        for image in result.images
    ]
    return f"{100 * np.mean(right):.0f}" if right else "–"


def _share_found(results: Sequence[Result], name: str) -> str:
    found = [
        f"{half}:{name}" in image.found for result in results for image in result.images for half in (1, 2)
    ]
    return f"{100 * np.mean(found):.0f}"
