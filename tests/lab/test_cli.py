"""`loratorio-lab`: every command is there, and what is wrong is a sentence."""

from __future__ import annotations

import importlib

import pytest

from loratorio_lab import knob_table
from loratorio_lab.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, about = COMMANDS[command]
    assert callable(importlib.import_module(module).main)
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert command in shown
    assert about in shown
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"loratorio-lab {command}" in capsys.readouterr().out


def test_lint_says_when_the_table_of_knobs_is_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knob-table", "--check"]) == 0
    monkeypatch.setattr(knob_table, "table", lambda: "a table with one knob more")
    assert main(["knob-table", "--check"]) == 2
    assert "stale" in (said := capsys.readouterr().err)
    assert "loratorio-lab knob-table" in said


def test_an_unknown_command_and_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["brew"]) == 2
    assert "loratorio-lab COMMAND" in capsys.readouterr().out
    assert main(["bench", "--counts", "7"]) == 2
    assert "--counts must be of 2, 3, 4 and 5" in capsys.readouterr().err


def test_nothing_of_the_package_imports_it() -> None:
    """Also as an import-linter contract; here for who runs only the tests."""
    from pathlib import Path

    import loratorio

    files = list(Path(loratorio.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "import loratorio_lab" not in text
        assert "from loratorio_lab" not in text
