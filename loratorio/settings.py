"""Every knob, once: its name, default, range, label and help. Panel, API, infotext, X/Y/Z plot, CLI and docs are made from this."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from .compose.methods import METHODS
from .compose.patches import BLENDS
from .compose.regions import YIELDING
from .errors import LoratorioError

Kind = Literal["bool", "int", "float", "choice"]

Naming = Literal["name", "label", "option"]
"""What a user calls a knob: by its name in the API, its label in the panel, its option on the command line."""

Group = Literal["method", "weights", "guidance", "pool", "steps", "shown"]
GROUPS: dict[Group, str] = {
    "method": "Method",
    "weights": "Where each LoRA is used",
    "guidance": "Guidance",
    "pool": "Pools",
    "steps": "Steps",
    "shown": "What is shown",
}
"""What knobs are about, and the headings under which they stand where there is room for headings."""


@dataclass(frozen=True)
class Knob:
    """One knob as every surface shows it.

    Attributes:
        name: in Python, API and (with dashes) on the command line.
        label: in the panel. help: its tooltip, in plain words.
        group: what it is about.
        row: of the panel; knobs of one row stand side by side. Row 0 has none, row 1 is in sight, all others are in the panel's fold.
        minimum, maximum, step: of a number; the range is closed.
        choices: names and labels of a choice.
        former: its defaults in versions before: the last version that had it, and the value. A version that did not have the knob
            yet made pictures with the value that does nothing.
    """

    name: str
    kind: Kind
    default: bool | int | float | str
    label: str
    help: str
    group: Group
    row: int
    minimum: float = 0
    maximum: float = 1
    step: float = 1
    choices: tuple[tuple[str, str], ...] = ()
    former: tuple[tuple[str, bool | int | float | str], ...] = ()

    @property
    def infotext_key(self) -> str:
        """Under this name the value stands in a picture's infotext."""
        return "LoRAtorio" if self.name == "enabled" else f"LoRAtorio {self.label.lower()}"

    def default_in(self, version: str) -> bool | int | float | str:
        """What a picture of this version was made with where its infotext does not say; "" stands for one that says no version."""
        for last, value in self.former:
            if _as_numbers(version) <= _as_numbers(last):
                return value
        return self.default

    @property
    def option(self) -> str:
        """On the command line."""
        return "--" + self.name.replace("_", "-")

    def ignored_by(self, method: str) -> bool:
        """Whether this knob is without effect on that method's pictures."""
        of_methods = {name for each in METHODS.values() for name in each.knobs}
        return self.name in of_methods and self.name not in METHODS[method].knobs

    @property
    def is_fine(self) -> bool:
        """Whether it has too many steps for a slider: a pixel of one would be many of them."""
        return (self.maximum - self.minimum) / self.step > 1000

    def check(self, value: Any, naming: Naming = "name") -> bool | int | float | str:
        """`value` as this knob's own type. Raises LoratorioError with a sentence, in which the knob is named so, when it cannot be."""
        called = str(getattr(self, naming))
        if self.kind == "bool":
            return self._check_bool(value, called)
        if self.kind == "choice":
            return self._check_choice(value, called)
        return self._check_number(value, called)

    def _check_bool(self, value: Any, called: str) -> bool:
        words = {
            "true": True,
            "false": False,
            "yes": True,
            "no": False,
            "on": True,
            "off": False,
            "1": True,
            "0": False,
        }
        if isinstance(value, str) and value.strip().lower() in words:
            return words[value.strip().lower()]
        if isinstance(value, (bool, int)) and value in (0, 1):
            return bool(value)
        raise LoratorioError(f"{called} must be true or false, not {value!r}.")

    def _check_choice(self, value: Any, called: str) -> str:
        text = str(value).strip().lower()
        for name, label in self.choices:
            if text in (name.lower(), label.lower()):
                return name
        names = [name for name, _ in self.choices]
        near = difflib.get_close_matches(text, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise LoratorioError(f"{called} must be one of {', '.join(names)}, not {value!r}{hint}")

    def _check_number(self, value: Any, called: str) -> int | float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        whole = self.kind == "int"
        if not math.isfinite(number) or (whole and number != int(number)):
            raise LoratorioError(f"{called} must be a {'whole ' if whole else ''}number, not {value!r}.")
        if not self.minimum <= number <= self.maximum:
            raise LoratorioError(f"{called} must be from {self.minimum:g} to {self.maximum:g}, not {value}.")
        return int(number) if whole else number


def knob(
    kind: Kind,
    default: bool | int | float | str,
    label: str,
    help: str,
    group: Group,
    row: int,
    **more: Any,
) -> Any:
    """A dataclass field that carries its `Knob` (whose name is filled in from the field's)."""
    return field(default=default, metadata={"knob": (kind, default, label, help, group, row, more)})


@dataclass(frozen=True)
class Settings:
    """The knobs of one generation, checked: making one with a bad value raises LoratorioError.

    Their order is that of the API's positional arguments: a new knob goes to the end, whatever its row in the panel.

    Attributes:
        naming: how sentences name the knobs. Not a knob.
    """

    enabled: bool = knob(
        "bool", False, "Enable", "Compose the prompt's LoRAs instead of merging them. Off: the picture is the WebUI's own.",
        "method", 0,
    )  # fmt: skip
    method: str = knob(
        "choice", "relative", "Method", "How the LoRAs' predictions are combined.",
        "method", 2, choices=tuple((each.entry.name, each.entry.label) for each in METHODS.values()),
        former=(("0.2.0", "loratorio"),),
    )  # fmt: skip
    patch_size: int = knob(
        "int", 2, "Patch size", "Side of a patch in latent pixels (one is 8 picture pixels). Smaller: finer borders between LoRAs.",
        "weights", 3, minimum=1, maximum=64,
    )  # fmt: skip
    temperature: float = knob(
        "float", 0.1, "Temperature", "Of the softmax over the LoRAs in each patch. Low: one LoRA a patch. High: all of them equally.",
        "weights", 8, minimum=0.0001, maximum=10, step=0.0001,
    )  # fmt: skip
    adaptive: bool = knob(
        "bool", False, "Adaptive temperature", "Scale the temperature by how much the similarities differ: little in the first steps.",
        "weights", 8,
    )  # fmt: skip
    top_k: int = knob(
        "int", 2, "Top-k", "How many LoRAs may share a patch. 0: all of them (paper).",
        "weights", 3, minimum=0, maximum=100, former=(("0.2.0", 0),),
    )  # fmt: skip
    blend: str = knob(
        "choice", "hard", "Patch borders", "How weights change between patches: at once, interpolated, or from overlapping patches.",
        "weights", 7, choices=tuple((each, each.capitalize()) for each in BLENDS),
    )  # fmt: skip
    recentre: float = knob(
        "float", 0.5, "Re-centring", "Weight of the base model in the unconditional prediction. 0: the LoRAs only. 1: the base model only.",
        "guidance", 4, step=0.05,
    )  # fmt: skip
    rescale: float = knob(
        "float", 0.0, "Guidance rescale", "Against over-saturation: scale the guided prediction towards the conditional one's contrast.",
        "guidance", 7, step=0.05,
    )  # fmt: skip
    share: float = knob(
        "float", 0.15, "Shared part", "Part of every LoRA that is active in the other LoRAs' passes too. 0: none (paper). 1: as merging.",
        "weights", 4, step=0.05, former=(("0.1.0", 0.0),),
    )  # fmt: skip
    pool_size: int = knob(
        "int", 5, "Pool size", "How many of a pool's LoRAs are taken at most; where the prompt calls none, how many are run at a step.",
        "pool", 9, minimum=1, maximum=100,
    )  # fmt: skip
    pool_interval: int = knob(
        "int", 20, "Pool interval", "All of a pool's LoRAs are run at the first step, and then at every step of this number.",
        "pool", 9, minimum=1, maximum=1000,
    )  # fmt: skip
    start: float = knob(
        "float", 0.0, "Active from", "Fraction of the steps at which composing begins; before it the LoRAs are merged.",
        "steps", 6, step=0.05,
    )  # fmt: skip
    end: float = knob(
        "float", 1.0, "Active to", "Fraction of the steps at which composing ends; after it the LoRAs are merged.",
        "steps", 6, step=0.05,
    )  # fmt: skip
    weight_maps: bool = knob(
        "bool", False, "Weight maps", "Show, after the pictures, where each LoRA was used. An X/Y/Z plot has no room for them.",
        "shown", 1,
    )  # fmt: skip
    yielding: float = knob(
        "float", YIELDING, "Yielding", "Part of its weight that a LoRA without a place gives up inside the places of others.",
        "weights", 5, step=0.05,
    )  # fmt: skip
    reuse: int = knob(
        "int", 3, "Reuse", "Run each LoRA at every n-th step; in between its most recent predictions are reused. 1: run at every step.",
        "steps", 5, minimum=1, maximum=10, former=(("0.1.0", 1),),
    )  # fmt: skip
    single_maps: bool = knob(
        "bool", False, "A map for each", "With weight maps: after the one of all LoRAs, one for each of them.",
        "shown", 1,
    )  # fmt: skip
    naming: Naming = field(default="name", compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in KNOBS:
            object.__setattr__(self, each.name, each.check(getattr(self, each.name), self.naming))
        if self.start > self.end:
            raise LoratorioError(
                f"{self.called('start')} ({self.start:g}) is after {self.called('end')} ({self.end:g}): "
                "composing would never happen. Swap them."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from knob names and values, the rest at their defaults. Unknown names are a LoratorioError."""
        return cls().with_values(values)

    def called(self, name: str) -> str:
        """What the user who made these settings calls the knob of this name."""
        return str(getattr(KNOB_BY_NAME[name], self.naming))

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """A copy with some knobs changed, also by a `PRESET`. Unknown names are a LoratorioError that says which come near."""
        if PRESET in values:
            rest = {name: value for name, value in values.items() if name != PRESET}
            preset = {} if values[PRESET] is None else find_preset(values[PRESET]).values
            return self.with_values({**preset, **rest})
        for name in values:
            if name not in KNOB_BY_NAME:
                near = difflib.get_close_matches(str(name), KNOB_BY_NAME, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the knobs are {', '.join(KNOB_BY_NAME)}."
                raise LoratorioError(f"There is no knob {str(name)!r}; {hint}")
        return replace(self, **values)

    def without_effect(self, asked: Iterable[str]) -> list[str]:
        """A sentence for each of these knobs that was set, but that the method does not look at."""
        method = METHODS[self.method].entry.label
        sentences = []
        for name in asked:
            knob = KNOB_BY_NAME.get(name)
            if knob is not None and knob.ignored_by(self.method) and getattr(self, name) != knob.default:
                used = [each.entry.label for each in METHODS.values() if name in each.knobs]
                sentences.append(
                    f"{self.called(name)} = {getattr(self, name)} changes nothing with the method {method}. It is for {', '.join(used)}."
                )
        return sentences

    def active_at(self, index: int, total: int) -> bool:
        """Whether step `index` (from 0) of `total` lies in the part of the steps that is composed."""
        return self.start * total <= index < self.end * total


@dataclass(frozen=True)
class Preset:
    """Values for some knobs, set together; all else stays as it is."""

    name: str
    label: str
    help: str
    values: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "paper",
            "Paper",
            "As published: weights by SoftMin, every LoRA at every step and in every patch, re-centring 0.5, no shared part. Slowest.",
            {"method": "loratorio", "top_k": 0, "recentre": 0.5, "share": 0.0, "reuse": 1},
        ),
        Preset(
            "balanced",
            "Balanced",
            "Relative divergence, each LoRA at every third step, two of them a patch, re-centring 0.5, a small shared part. The default.",
            {"method": "relative", "top_k": 2, "recentre": 0.5, "share": 0.15, "reuse": 3},
        ),
        Preset(
            "fast",
            "Fast",
            "As Balanced, and the base model only in the unconditional prediction.",
            {"method": "relative", "top_k": 2, "recentre": 1.0, "share": 0.15, "reuse": 3},
        ),
    )
}
"""Settings of which one click, or one word, sets all."""

PRESET_KNOBS = tuple(PRESETS["balanced"].values)
"""The knobs that a preset sets: every preset the same."""

PRESET = "preset"
"""Beside knobs, under this name, a mapping may have a preset's name: the preset's values, and those that stand beside it on top."""


def find_preset(name: Any) -> Preset:
    """By name or label, in any case. Raises LoratorioError with the names that there are."""
    for preset in PRESETS.values():
        if str(name).strip().lower() in (preset.name, preset.label.lower()):
            return preset
    raise LoratorioError(f"{PRESET} must be one of {', '.join(PRESETS)}, not {name!r}.")


def _as_numbers(version: str) -> tuple[int, ...]:
    """A version to compare; what is none comes before all."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _knob_of(name: str, metadata: Mapping[str, Any]) -> Knob:
    kind, default, label, help_text, group, row, more = metadata["knob"]
    if kind == "float":
        more = {"step": 0.01, **more}
    return Knob(name, cast(Kind, kind), default, label, help_text, group, row, **more)


KNOBS: tuple[Knob, ...] = tuple(
    _knob_of(each.name, each.metadata) for each in fields(Settings) if "knob" in each.metadata
)
"""All knobs, in the order of the API's positional arguments."""

KNOB_BY_NAME: dict[str, Knob] = {each.name: each for each in KNOBS}


def panel_rows() -> list[list[Knob]]:
    """The knobs of the panel row by row, but for the tick box: first the row in sight, then those in the fold."""
    rows = sorted({each.row for each in KNOBS if each.row})
    return [[each for each in KNOBS if each.row == row] for row in rows]
