"""The laboratory's commands, each on a tiny run, print figures that can be: finite, and where the toybox has them.

What a measure's pictures are made with is said by it, so that a default that changes leaves its figures as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loratorio.settings import KNOBS, PRESETS
from loratorio_lab.cli import main
from loratorio_lab.knobs import OTHERS


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``loratorio-lab …`` and gives what it prints."""

    def run(*typed: str, code: int = 0) -> str:
        assert main(typed) == code
        text = capsys.readouterr().out
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE), text
        return text

    return run


def numbers(pattern: str, text: str) -> list[float]:
    found = [float(each) for each in re.findall(pattern, text)]
    assert found, f"{pattern} is not in {text}"
    return found


def test_every_knob_is_said() -> None:
    """By all measures alike, or by a preset, or by the measure: one that is new must be put somewhere."""
    of_presets = {name for preset in PRESETS.values() for name in preset.values}
    matter = {knob.name for knob in KNOBS if knob.group != "shown" and knob.name != "enabled"}
    assert of_presets | OTHERS.keys() == matter
    assert not of_presets & OTHERS.keys()


def test_premise(printed: Any) -> None:
    """A LoRA that the prompt calls diverges further more often than not: on this toybox hardly (docs/lab/TOYBOX.md)."""
    text = printed("premise", "--combinations", "1")
    assert "method loratorio" in text
    assert "top_k 0" in text
    (every,) = numbers(r"all 3: ([\d.]+)", text)
    assert 0.5 < every <= 1
    assert all(0.5 < each <= 1 for each in numbers(r"step \d of 12: ([\d.]+)", text))
    mean, of_all = numbers(r"(?:AUC|of all pairs) ([\d.]+)", text)
    assert 0.5 < min(mean, of_all) <= 1


def test_reuse_cost(printed: Any) -> None:
    text = printed("reuse-cost", "--combinations", "1", "--counts", "2", "--seeds", "1", "--cfg", "2")
    rows = {line.split("|")[4].strip(): line for line in text.splitlines() if line.startswith("| euler")}
    assert list(rows) == ["Paper", "Balanced", "Fast"]
    steps = [float(row.split("|")[5]) for row in rows.values()]
    assert steps[0] == 3.0  # 2(N + 1) rows are N + 1 plain steps
    assert 1 < steps[2] < steps[1] < 2
    for name in ("Balanced", "Fast"):
        mean, least = numbers(r"([\d.]+) dB", rows[name])
        assert 20 < least <= mean < 60
    assert all(0 <= each <= 100 for each in numbers(r"(\d+) % \|", text))


def test_pool_cost(printed: Any) -> None:
    typed = (
        "--pool",
        "6",
        "--sizes",
        "3",
        "--intervals",
        "20",
        "--seeds",
        "1",
        "--steps",
        "12",
        "--cfg",
        "2",
    )
    text = printed(
        "pool-cost", *typed, "--prompt", "oktavo on the left, shrumi on the right, lunara background"
    )
    assert "method relative" in text
    pooled, whole = numbers(r"([\d.]+) plain steps a step by rows", text)
    assert 1 < pooled < whole < 8
    mean, least = numbers(r"(?:PSNR|least) ([\d.]+)", text)
    assert 15 < least <= mean < 60


def test_step_time(printed: Any) -> None:
    text = printed("step-time", "--quick", "--counts", "2", "--preset-counts", "2", "--threads", "1")
    assert all(0 < each < 1e-4 for each in numbers(r"relative error ([\d.e-]+)", text))
    assert all(0 < each < 100 for each in numbers(r"ours over \w+ ([\d.]+)", text))
    paper = next(line.split() for line in text.splitlines() if line.startswith("  paper "))
    assert float(paper[3]) == 6.0  # rows of two LoRAs and the base


def test_check(printed: Any) -> None:
    with_it, base = numbers(r"(\d+)%", printed("check", "--seeds", "4", "--only", "ghost"))
    assert (with_it, base) == (100, 0)


def test_bench(printed: Any, tmp_path: Path) -> None:
    report = tmp_path / "RESULTS.md"
    typed = (
        "--groups",
        "methods",
        "--combinations",
        "1",
        "--other-combinations",
        "1",
        "--counts",
        "2",
        "--seeds",
        "1",
    )
    printed("bench", "--out", str(tmp_path / "results"), "--workers", "1", *typed, "--report", str(report))
    text = report.read_text(encoding="utf-8")
    assert "nan" not in text.lower().split()
    assert all(0 <= each <= 100 for each in numbers(r"(\d+) %", text))
