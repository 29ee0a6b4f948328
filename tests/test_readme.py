"""README.md against the code: its table of knobs, its links, and the commands that it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from loratorio.standalone import cli
from loratorio_lab.knob_table import with_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_knobs_is_current() -> None:
    assert with_table(README) == README, "run: loratorio-lab knob-table"


@pytest.mark.parametrize("page", ["README.md", "docs/ARCHITECTURE.md"])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (file.parent / link).exists(), link


def test_its_commands_are_commands() -> None:
    shown = re.findall(r"^loratorio (.*)$", README, re.MULTILINE)
    assert len(shown) >= 3
    for line in shown:
        if "--help" not in line:
            cli._parser().parse_args(shlex.split(line))
