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
"""The groups of knobs and their headings, where a page shows headings."""


@dataclass(frozen=True)
class Knob:
    """One knob, for every surface.

    Attributes:
        name: in Python, in the API and (with dashes) on the command line.
        label: in the panel. help: its tooltip.
        group: the heading that it belongs under.
        row: its row in the panel. Row 0: the tick box. Row 1: always visible. All others: under "All settings".
        minimum, maximum, step: of a number; both ends are allowed.
        choices: names and labels of a choice.
        former: earlier defaults: the last version that had the value, and the value. Before a knob existed, pictures were made with
            the value that has no effect.
        by_method: methods with a default of their own, and that default. It is put in force when such a method is chosen.
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
    by_method: tuple[tuple[str, bool | int | float | str], ...] = ()

    @property
    def infotext_key(self) -> str:
        """The name of the value in a picture's infotext."""
        return "LoRAtorio" if self.name == "enabled" else f"LoRAtorio {self.label.lower()}"

    def default_with(self, method: str) -> bool | int | float | str:
        """The default with that method."""
        return dict(self.by_method).get(method, self.default)

    def default_in(self, version: str, method: str = "") -> bool | int | float | str:
        """The value that a picture of this version was made with if its infotext does not say. version: "" if unknown."""
        for last, value in self.former:
            if _as_numbers(version) <= _as_numbers(last):
                return value
        return self.default_with(method)

    @property
    def option(self) -> str:
        """On the command line."""
        return _option(self.name)

    def ignored_by(self, method: str) -> bool:
        """Whether this knob has no effect with that method."""
        of_methods = {name for each in METHODS.values() for name in each.knobs}
        return self.name in of_methods and self.name not in METHODS[method].knobs

    @property
    def is_fine(self) -> bool:
        """Whether it has too many steps for a slider, of which one pixel would be several."""
        return (self.maximum - self.minimum) / self.step > 1000

    def check(self, value: Any, naming: Naming = "name") -> bool | int | float | str:
        """`value` in this knob's type. Raises LoratorioError for a wrong one; its sentence calls the knob by `naming`."""
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
    """A dataclass field that carries its `Knob`; the knob gets the field's name. None stands for a default that depends on the method."""
    unsaid = None if more.get("by_method") else default
    return field(default=unsaid, metadata={"knob": (kind, default, label, help, group, row, more)})


@dataclass(frozen=True)
class Settings:
    """The knobs of one generation, checked: a bad value raises LoratorioError.

    Their order is that of the API's positional arguments, so a new knob goes to the end, whatever its row in the panel.

    Attributes:
        naming: what sentences call the knobs. Not a knob itself.
    """

    enabled: bool = knob(
        "bool", False, "Enable", "Compose the prompt's LoRAs instead of merging them. Off: the WebUI's own picture.",
        "method", 0,
    )  # fmt: skip
    method: str = knob(
        "choice", "relative", "Method", "How the LoRAs' predictions are combined.",
        "method", 2, choices=tuple((each.entry.name, each.entry.label) for each in METHODS.values()),
        former=(("0.2.0", "loratorio"),),
    )  # fmt: skip
    patch_size: int = knob(
        "int", 2, "Patch size", "Side of a patch in latent pixels (one is 8×8 picture pixels). Smaller: finer borders between LoRAs.",
        "weights", 3, minimum=1, maximum=64,
    )  # fmt: skip
    temperature: float = knob(
        "float", 0.1, "Temperature", "Softmax temperature. Low: one LoRA per patch. High: all LoRAs equally.",
        "weights", 8, minimum=0.0001, maximum=10, step=0.0001,
    )  # fmt: skip
    adaptive: bool = knob(
        "bool", False, "Adaptive temperature", "Scale the temperature with the spread of the similarities: small in the first steps.",
        "weights", 8,
    )  # fmt: skip
    top_k: int = knob(
        "int", 2, "Top-k", "How many LoRAs may share a patch. 0: all of them (paper).",
        "weights", 3, minimum=0, maximum=100, former=(("0.2.0", 0),),
    )  # fmt: skip
    blend: str = knob(
        "choice", "hard", "Patch borders", "How weights change between patches: at once, gradually, or as the mean of overlapping patches.",
        "weights", 7, choices=tuple((each, each.capitalize()) for each in BLENDS),
    )  # fmt: skip
    recentre: float = knob(
        "float", 0.5, "Re-centring", "Weight of the base model in the unconditional prediction. 0: only the LoRAs (Merge, Composite). "
        "1: only the base model.",
        "guidance", 4, step=0.05, by_method=(("merge", 0.0), ("composite", 0.0), ("w_composite", 0.0)),
    )  # fmt: skip
    rescale: float = knob(
        "float", 0.0, "Guidance rescale", "Against over-saturation: scale the guided prediction towards the conditional contrast. 0: off.",
        "guidance", 7, step=0.05,
    )  # fmt: skip
    share: float = knob(
        "float", 0.15, "Shared part", "How much of each LoRA also acts in the other LoRAs' passes. 0: none (paper). 1: as merging.",
        "weights", 4, step=0.05, former=(("0.1.0", 0.0),),
    )  # fmt: skip
    pool_size: int = knob(
        "int", 5, "Pool size", "The most LoRAs that are taken from a pool. If the prompt calls none of them: how many run per step.",
        "pool", 9, minimum=1, maximum=100,
    )  # fmt: skip
    pool_interval: int = knob(
        "int", 20, "Pool interval", "Score every LoRA of the pool again after this many steps.",
        "pool", 9, minimum=1, maximum=1000,
    )  # fmt: skip
    start: float = knob(
        "float", 0.0, "Active from", "Fraction of the steps at which composing begins. Before it the LoRAs are merged.",
        "steps", 6, step=0.05,
    )  # fmt: skip
    end: float = knob(
        "float", 1.0, "Active to", "Fraction of the steps at which composing ends. After it the LoRAs are merged.",
        "steps", 6, step=0.05,
    )  # fmt: skip
    weight_maps: bool = knob(
        "bool", False, "Weight maps", "Show where each LoRA was used, after the pictures. An X/Y/Z plot does not show them.",
        "shown", 1,
    )  # fmt: skip
    yielding: float = knob(
        "float", YIELDING, "Yielding", "How much of its weight a LoRA without a place gives up inside the other LoRAs' places.",
        "weights", 5, step=0.05,
    )  # fmt: skip
    reuse: int = knob(
        "int", 3, "Reuse", "Run each LoRA only at every n-th step and reuse its latest predictions in between. 1: run it at every step.",
        "steps", 5, minimum=1, maximum=10, former=(("0.1.0", 1),),
    )  # fmt: skip
    single_maps: bool = knob(
        "bool", False, "A map for each", "With weight maps: one map per LoRA, after the map of all LoRAs.",
        "shown", 1,
    )  # fmt: skip
    own_words: bool = knob(
        "bool", True, "Own words", "In its place, a LoRA reads the prompt without the trigger words of LoRAs in other places.",
        "weights", 5, former=(("0.2.0", False),),
    )  # fmt: skip
    find_after: int = knob(
        "int", 2, "Find places after", "With at=auto: after how many steps each LoRA gets its own place. A quarter of the steps at most.",
        "steps", 6, minimum=1, maximum=20,
    )  # fmt: skip
    find_styles: bool = knob(
        "bool", True, "Find styles", "Let a LoRA that changes the whole picture evenly act as with role=style: in all passes.",
        "weights", 5, former=(("0.3.0", False),), by_method=(("loratorio", False),),
    )  # fmt: skip
    naming: Naming = field(default="name", compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in KNOBS:  # the method before the knobs whose defaults depend on it
            value = getattr(self, each.name)
            value = each.default_with(self.method) if value is None and each.by_method else value
            object.__setattr__(self, each.name, each.check(value, self.naming))
        if self.start > self.end:
            raise LoratorioError(
                f"{self.called('start')} ({self.start:g}) is after {self.called('end')} ({self.end:g}): "
                "nothing would be composed. Swap them."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from knob names and values, the rest at their defaults. An unknown name raises LoratorioError."""
        return cls().with_values(values)

    def called(self, name: str) -> str:
        """What the user who made these settings calls this knob, or something else that can be set."""
        if name in KNOB_BY_NAME:
            return str(getattr(KNOB_BY_NAME[name], self.naming))
        return _option(name) if self.naming == "option" else name

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """A copy with some knobs changed, also by a `PRESET`. An unknown name raises LoratorioError with the closest name.

        With a method whose default of a knob is another one (`Knob.by_method`), that knob gets this default unless it is named.
        """
        former = FORMER_METHODS.get(str(values.get("method", "")).strip().lower())
        if former is not None:
            return self.with_values({"recentre": self.recentre, **values, "method": former})
        if PRESET in values:
            rest = {name: value for name, value in values.items() if name != PRESET}
            preset = {} if values[PRESET] is None else find_preset(values[PRESET], self.called(PRESET)).values
            return self.with_values(preset).with_values(rest)
        for name in values:
            if name not in KNOB_BY_NAME:
                near = difflib.get_close_matches(str(name), KNOB_BY_NAME, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the knobs are {', '.join(KNOB_BY_NAME)}."
                raise LoratorioError(f"There is no knob {str(name)!r}; {hint}")
        return replace(self, **{**defaults_of(values.get("method"), self.method), **values})

    def without_effect(self, asked: Iterable[str]) -> list[str]:
        """A sentence for each of these knobs that was changed but is not used by the method, or not without another knob."""
        method = METHODS[self.method].entry.label
        sentences = []
        for name in asked:
            if name == "single_maps" and self.single_maps and not self.weight_maps:
                sentences.append(f"{self.called(name)} has no effect without {self.called('weight_maps')}.")
            knob = KNOB_BY_NAME.get(name)
            default = None if knob is None else knob.default_with(self.method)
            if knob is not None and knob.ignored_by(self.method) and getattr(self, name) != default:
                used = [each.entry.label for each in METHODS.values() if name in each.knobs]
                sentences.append(
                    f"{self.called(name)} = {getattr(self, name)} has no effect with {method}. The methods that use it: {', '.join(used)}."
                )
        return sentences

    def active_at(self, index: int, total: int) -> bool:
        """Whether step `index` (from 0) of `total` is composed."""
        return self.start * total <= index < self.end * total


@dataclass(frozen=True)
class Preset:
    """Values for some knobs, set together. The other knobs keep their values."""

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
            "As published: SoftMin weights, every LoRA at every step and in every patch, re-centring 0.5, no shared part. Slowest.",
            {
                "method": "loratorio",
                "top_k": 0,
                "recentre": 0.5,
                "share": 0.0,
                "reuse": 1,
                "find_styles": False,
            },
        ),
        Preset(
            "balanced",
            "Balanced",
            "The default. Weights by relative divergence, two LoRAs per patch, each LoRA at every third step, re-centring 0.5, a small "
            "shared part.",
            {
                "method": "relative",
                "top_k": 2,
                "recentre": 0.5,
                "share": 0.15,
                "reuse": 3,
                "find_styles": True,
            },
        ),
        Preset(
            "fast",
            "Fast",
            "Like Balanced, but the unconditional prediction uses only the base model.",
            {
                "method": "relative",
                "top_k": 2,
                "recentre": 1.0,
                "share": 0.15,
                "reuse": 3,
                "find_styles": True,
            },
        ),
    )
}
"""Settings that one click, or one word, sets together."""

PRESET_KNOBS = tuple(PRESETS["balanced"].values)
"""The knobs that presets set. Every preset sets the same ones."""

PRESET = "preset"
"""The key of a preset's name in a mapping of knobs. Knobs in the same mapping override the preset."""


def find_preset(name: Any, called: str = PRESET) -> Preset:
    """A preset by name or label, in any case. Raises LoratorioError with the known names."""
    for preset in PRESETS.values():
        if str(name).strip().lower() in (preset.name, preset.label.lower()):
            return preset
    raise LoratorioError(f"{called} must be one of {', '.join(PRESETS)}, not {name!r}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_numbers(version: str) -> tuple[int, ...]:
    """A version, comparable. Anything that is not a version comes first."""
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


def defaults_of(method: Any, before: Any = None) -> dict[str, Any]:
    """The knobs whose defaults change when this method is chosen in place of the one before, with their new defaults. The methods by name
    or label; None, or an unknown one: the default method."""
    choice = KNOB_BY_NAME["method"]
    names = {text.lower(): name for name, label in choice.choices for text in (name, label)}
    new, old = (names.get(str(each).strip().lower(), str(choice.default)) for each in (method, before))
    changed = (
        {} if method is None else {knob.name: knob.default_with(new) for knob in KNOBS if knob.by_method}
    )
    return {name: value for name, value in changed.items() if value != KNOB_BY_NAME[name].default_with(old)}


FORMER_METHODS = {
    "merge_anchored": "merge",
    "merge, re-centred": "merge",
    "composite_anchored": "composite",
    "composite, re-centred": "composite",
}
"""Until 0.3.0, Merge and Composite with *Re-centring* were methods of their own: their names and labels, and what they are now."""


def panel_rows() -> list[list[Knob]]:
    """The panel's knobs row by row, without the tick box: first the visible row, then those under "All settings"."""
    rows = sorted({each.row for each in KNOBS if each.row})
    return [[each for each in KNOBS if each.row == row] for row in rows]
