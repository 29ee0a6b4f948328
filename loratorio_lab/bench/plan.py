"""What is compared: combinations of elements, variants (a method with its knobs), and the grid of cells made of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loratorio.settings import KNOB_BY_NAME, KNOBS, PRESETS, Settings

CHARACTER = "character"
STYLE = "style"


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: in results, `label` in tables.
        knobs: settings other than the defaults.
        role: of the style LoRAs, where it is not *content*.
        pool: all LoRAs of the toybox are candidates, and none is named.
        unlabelled: their files do not say which words call them.
        beside: characters beside each other in a wide picture: ``free``, or ``placed`` by `at=` in their tags, or ``found``
            by `at=auto`; each character's word is its own, or with ``common`` all are in the prompt.
        made: ``picture`` by the model, or ``truth``: rendered.
    """

    name: str
    label: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    role: str = ""
    pool: bool = False
    made: str = "picture"
    beside: str = ""
    unlabelled: bool = False

    def resolved(self) -> dict[str, Any]:
        """Every knob that affects the picture, at this variant's value. A changed default makes new cells."""
        settings = Settings().with_values(self.knobs)
        used = [
            knob.name
            for knob in KNOBS
            if knob.group != "shown" and knob.name != "enabled" and not knob.ignored_by(settings.method)
        ]
        if not self.pool:
            used = [name for name in used if KNOB_BY_NAME[name].group != "pool"]
        if "common" not in self.beside:
            used.remove("own_words")
        if not self.beside.startswith("found"):
            used = [name for name in used if name != "find_after"]
        return {name: getattr(settings, name) for name in used}


@dataclass(frozen=True)
class Cell:
    """One combination under one variant, for some seeds: what a worker does at once.

    Attributes:
        elements: names, of different categories; with `beside`, characters come first, from left to right.
        seed, count: the first seed, and how many follow one another.
        variant: the first that asked for this; others may be the same work.
        knobs: every knob that matters to the picture, and `steps`, `cfg`, `sampler`.
    """

    variant: str
    elements: tuple[str, ...]
    seed: int
    count: int
    knobs: Mapping[str, Any]
    role: str = ""
    pool: bool = False
    made: str = "picture"
    beside: str = ""
    unlabelled: bool = False

    @property
    def key(self) -> str:
        """Equal for equal work only: the name of the result's file."""
        work = {name: value for name, value in asdict(self).items() if name != "variant"}
        work = {name: value for name, value in work.items() if name not in ("beside", "unlabelled") or value}
        if self.beside:
            # Other results: until 0.5.1 judged by left and right half, in 0.5.2 three and four in parts of 96 px.
            work["parts"] = "numbered, three in 64 px each"
        content = json.dumps(work, sort_keys=True)
        made = self.knobs.get("method", self.made)
        return f"{made}.{'+'.join(self.elements)}.{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def is_of(self, variant: Variant) -> bool:
        """Whether this cell belongs to the variant."""
        if (self.made, self.role, self.pool, self.beside, self.unlabelled) != (
            variant.made,
            variant.role,
            variant.pool,
            variant.beside,
            variant.unlabelled,
        ):
            return False
        return self.made == "truth" or variant.resolved().items() <= self.knobs.items()


PAPER: Mapping[str, Any] = PRESETS["paper"].values
"""LoRAtorio as published. All tables but those of presets use it, so that they do not change with the users' defaults."""

TRUTH = Variant("truth", "Rendered truth", made="truth")
TRUTHS = 16
"""Rendered pictures per combination."""

METHOD_ROWS: tuple[Variant, ...] = (
    Variant("merge", "Merge", {"method": "merge"}),
    Variant("merge_anchored", "Merge, re-centred", {"method": "merge", "recentre": 0.5}),
    Variant("composite", "Composite", {"method": "composite"}),
    Variant("composite_anchored", "Composite, re-centred", {"method": "composite", "recentre": 0.5}),
    Variant("switch", "Switch", {"method": "switch"}),
    Variant("cmlora", "CMLoRA", {"method": "cmlora"}),
    Variant("klora", "K-LoRA", {"method": "klora"}),
    Variant("lego", "LoRA-LEGO", {"method": "lego"}),
    Variant("frequency", "Frequency bands (MultLFG)", {"method": "frequency", "top_k": 0}),
    Variant("w_composite", "W-Composite", {"method": "w_composite"}),
    Variant("loratorio", "LoRAtorio", PAPER),
    Variant("divergence", "LoRAtorio by divergence", {**PAPER, "method": "divergence"}),
    Variant("relative", "LoRAtorio, relative", {**PAPER, "method": "relative"}),
)
"""All methods."""

MAIN_ROWS = tuple(
    row
    for row in METHOD_ROWS
    if row.name in ("merge", "merge_anchored", "lego", "composite", "loratorio", "divergence", "relative")
)
"""Those that are run on every combination."""

ROLE_ROWS: tuple[Variant, ...] = (
    Variant("merge", "Merge", {"method": "merge"}),
    Variant("merge_anchored", "Merge, re-centred", {"method": "merge", "recentre": 0.5}),
    Variant("loratorio", "LoRAtorio", PAPER),
    Variant("share", "LoRAtorio, shared part 0.3", {**PAPER, "share": 0.3}),
    Variant("role_style", "LoRAtorio, role=style", PAPER, role="style"),
    Variant("role_always", "LoRAtorio, role=always", PAPER, role="always"),
)
"""What a style LoRA's role does; only for combinations that have one."""

BETTER_ROWS: tuple[Variant, ...] = (
    Variant(
        "plain", "LoRAtorio as in the paper", {**PAPER, "blend": "hard", "adaptive": False, "rescale": 0.0}
    ),
    Variant(
        "smooth",
        "with interpolated weights",
        {**PAPER, "blend": "interpolated", "adaptive": False, "rescale": 0.0},
    ),
    Variant(
        "overlap",
        "with overlapping patches",
        {**PAPER, "blend": "overlapping", "adaptive": False, "rescale": 0.0},
    ),
    Variant(
        "adaptive",
        "with adaptive temperature",
        {**PAPER, "blend": "hard", "adaptive": True, "rescale": 0.0},
    ),
    Variant(
        "rescale",
        "with guidance rescale 0.7",
        {**PAPER, "blend": "hard", "adaptive": False, "rescale": 0.7},
    ),
    Variant(
        "share",
        "with a shared part of 0.3",
        {**PAPER, "blend": "hard", "adaptive": False, "rescale": 0.0, "share": 0.3},
    ),
    Variant(
        "start",
        "merged for the first fifth of the steps",
        {**PAPER, "blend": "hard", "adaptive": False, "rescale": 0.0, "start": 0.2},
    ),
)
"""What the paper does not have, one at a time."""

STYLES_OFF = Variant(
    "styles_off", "Balanced without Find styles", {**PRESETS["balanced"].values, "find_styles": False}
)

PRESET_ROWS: tuple[Variant, ...] = (
    Variant("merge", "Merge", {"method": "merge"}),
    *(Variant(preset.name, preset.label, preset.values) for preset in PRESETS.values()),
    STYLES_OFF,
    Variant(
        "balanced_softmin",
        "Balanced with the paper's SoftMin",
        {**PRESETS["balanced"].values, "method": "loratorio", "find_styles": False},
    ),
    Variant(
        "balanced_all",
        "the same, top-k 0",
        {**PRESETS["balanced"].values, "method": "loratorio", "top_k": 0, "find_styles": False},
    ),
)
"""The presets, and the effect of the default's weights and top-k; run on every combination."""


def speed(recentre: float, share: float, reuse: int) -> Variant:
    """A row for a preset's settings."""
    label = f"λ = {recentre:g}, shared part {share:g}, reuse {reuse}"
    return Variant(label, label, {"recentre": recentre, "share": share, "reuse": reuse})


SPEED_ROWS: tuple[Variant, ...] = (
    Variant("merge", "Merge", {"method": "merge"}),
    *(speed(0.5, share, reuse) for share in (0.0, 0.15) for reuse in (1, 3)),
    *(speed(1.0, share, reuse) for share in (0.0, 0.15) for reuse in (1, 2, 3, 4)),
)
"""What the presets are chosen from."""

SAMPLING: Mapping[str, Any] = {"steps": 20, "cfg": 3.0, "sampler": "euler"}
"""How the toybox's pictures are sampled."""

DYNAMIC_ROWS: tuple[Variant, ...] = (
    Variant("named", "LoRAtorio, the LoRAs named", PAPER),
    Variant("pool", "LoRAtorio, a pool of all, by trigger words", PAPER, pool=True),
    Variant(
        "pool_unlabelled", "the same without trigger words, by reaction", PAPER, pool=True, unlabelled=True
    ),
    Variant(
        "pool_balanced",
        "Balanced, without trigger words",
        PRESETS["balanced"].values,
        pool=True,
        unlabelled=True,
    ),
    Variant("balanced_named", "Balanced, the LoRAs named", PRESETS["balanced"].values),
    Variant("pool_merge", "Merge of all", {"method": "merge"}, pool=True, unlabelled=True),
)
"""The whole toybox as a pool; only the prompt tells which elements are wanted."""


def ablation(knob: str, values: Sequence[Any], **fixed: Any) -> tuple[Variant, ...]:
    """A row for each value of one knob; the other knobs as in the paper or as `fixed`."""
    return tuple(
        Variant(f"{knob}={value}", f"{knob} {value}", {**PAPER, **fixed, knob: value}) for value in values
    )


ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "patch_size": ablation("patch_size", (1, 2, 4)),
    "temperature": ablation("temperature", (0.003, 0.01, 0.03, 0.1, 0.3)),
    "recentre": ablation("recentre", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "top_k": ablation("top_k", (1, 2, 0)),
    "share": ablation("share", (0.0, 0.15, 0.3, 0.5, 1.0)),
}
"""The curves that choose the defaults."""


def combinations(categories: Mapping[str, Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """Every ComposLoRA-style combination of `count` elements: a character, and at most one element per category.

    Args:
        categories: names of the elements by category; the order is kept.
    """
    others = [name for name in categories if name != CHARACTER]
    found = []
    for character in categories[CHARACTER]:
        for chosen in itertools.combinations(others, count - 1):
            for rest in itertools.product(*(categories[name] for name in chosen)):
                found.append((character, *rest))
    return found


def sample(items: Sequence[tuple[str, ...]], limit: int) -> list[tuple[str, ...]]:
    """`limit` of them (0: all), always in the same order. Every element is about equally frequent, whatever the limit."""
    rng = random.Random(0)
    left = list(items)
    rng.shuffle(left)
    used: dict[str, int] = {}
    chosen = []
    for _ in range(min(limit or len(items), len(items))):
        best = min(left, key=lambda item: sum(used.get(name, 0) for name in item))
        left.remove(best)
        chosen.append(best)
        for name in best:
            used[name] = used.get(name, 0) + 1
    return chosen


def cell(variant: Variant, elements: tuple[str, ...], count: int, sampling: Mapping[str, Any]) -> Cell:
    """A combination under a variant, for `count` seeds from 0. Rendered pictures have no knobs."""
    return Cell(
        variant.name,
        elements,
        0,
        count,
        {} if variant.made == "truth" else {**sampling, **variant.resolved()},
        variant.role,
        variant.pool,
        variant.made,
        variant.beside,
        variant.unlabelled,
    )


def cells(
    variants: Sequence[Variant],
    combos: Sequence[tuple[str, ...]],
    seeds: int,
    sampling: Mapping[str, Any],
    truths: int = TRUTHS,
) -> list[Cell]:
    """The grid, combination by combination, so that an interrupted grid has complete rows. truths: rendered pictures of each."""
    grid = []
    for combo in combos:
        if truths:
            grid.append(cell(TRUTH, combo, truths, sampling))
        grid += [cell(variant, combo, seeds, sampling) for variant in variants]
    return distinct(grid)


def distinct(grid: Sequence[Cell]) -> list[Cell]:
    """Each cell once, in the order of its first occurrence."""
    by_key: dict[str, Cell] = {}
    for cell in grid:
        by_key.setdefault(cell.key, cell)
    return list(by_key.values())
