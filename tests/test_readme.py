"""README.md against the code: its table of knobs, its links, and the commands that it shows."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loratorio.standalone import cli
from loratorio.standalone.checkpoint import load_checkpoint
from loratorio_lab import cli as lab
from loratorio_lab.knob_table import STALE, with_table
from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_knobs_is_current() -> None:
    assert with_table(README) == README, STALE


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that there is, and to a heading of it."""
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        headings = (
            re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        )
        assert not anchor or anchor in [
            re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings
        ]


@pytest.mark.parametrize("kind", ["toybox", "folder"])
def test_its_python_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, and with a checkpoint and LoRAs of one's own, by strings."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    if kind == "folder":
        model = load_checkpoint(tiny.save_sd(tmp_path / "model"))
        for name in ("ghost", "night", "ink"):
            tiny.save_kohya(tmp_path / "loras" / f"{name}.safetensors", model.unet)
        code = code.replace("toybox.CHECKPOINT", "'model'").replace("toybox.LORA_DIR", "'loras'")
    exec(code, {})
    side = 128 if kind == "toybox" else 64
    assert Image.open("ghost.png").size == (side, side)


class Parsed(Exception):
    """A command's arguments are ones that it takes."""


def test_commands_that_the_docs_name_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all their options: nothing is run."""
    parse = ArgumentParser.parse_args

    def parse_only(self: ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES)
    shown = re.findall(r"^ *(loratorio(?:-lab)?) +(.*)$", text, re.MULTILINE)
    shown += re.findall(r"`(loratorio-lab) ([^`]+)`", text)
    assert len(shown) >= 20
    for program, typed in shown:
        words = [word for word in shlex.split(typed, comments=True) if word != "..."]
        main = lab.main if program == "loratorio-lab" else cli.main
        if words[-1] not in ("--help", "-h"):
            with pytest.raises(Parsed):
                main(words)
