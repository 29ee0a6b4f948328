"""The table of knobs in README.md, made from the settings: ``loratorio-lab knob-table`` renews it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from loratorio.errors import LoratorioError
from loratorio.settings import KNOBS, Knob

_MARKS = ("<!-- knobs: made by loratorio-lab knob-table -->", "<!-- end of knobs -->")


def table() -> str:
    """All knobs as Markdown."""
    rows = [
        "| in the panel | in Python and the API | values, **default** | what it does |",
        "| --- | --- | --- | --- |",
    ]
    rows += [f"| {knob.label} | `{knob.name}` | {_values(knob)} | {knob.help} |" for knob in KNOBS]
    return "\n".join(rows)


def with_table(text: str) -> str:
    """`text` with the table between its marks renewed. Raises ValueError without marks."""
    pattern = re.compile(f"({re.escape(_MARKS[0])}).*({re.escape(_MARKS[1])})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text has no {_MARKS[0]}")
    return pattern.sub(lambda marks: f"{marks[1]}\n{table()}\n{marks[2]}", text)


def _values(knob: Knob) -> str:
    if knob.name == "method":  # a dozen names: they have a page of their own
        return f"[methods](docs/METHODS.md), **{knob.default}**"
    if knob.kind in ("bool", "choice"):
        default = ("on" if knob.default else "off") if knob.kind == "bool" else knob.default
        names = [name for name, _ in knob.choices] or ["on", "off"]
        return "/".join(f"**{name}**" if name == default else name for name in names)
    return f"{knob.minimum:g} to {knob.maximum:g}, **{knob.default}**"


STALE = "README.md's table of knobs is stale: a knob, or a method, was added or changed. Renew it: loratorio-lab knob-table"


def main(arguments: Sequence[str] = ()) -> None:
    """Renew the table. With ``--check``, which `make lint` runs: write nothing, raise LoratorioError where it is stale."""
    parser = argparse.ArgumentParser(
        prog="loratorio-lab knob-table", description="Renew README's table of knobs."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the table is stale")
    check = parser.parse_args(arguments).check
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    if check and with_table(text) != text:
        raise LoratorioError(STALE)
    if not check:
        readme.write_text(with_table(text), encoding="utf-8")
