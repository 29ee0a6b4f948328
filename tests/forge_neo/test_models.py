"""Forge Neo's own model classes, tiny and random. Needs its folder in LORATORIO_FORGE_NEO, with its environment in `venv` there
(or its Python in LORATORIO_FORGE_NEO_PYTHON)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEO = os.environ.get("LORATORIO_FORGE_NEO", "")

pytestmark = pytest.mark.skipif(not NEO, reason="no LORATORIO_FORGE_NEO: needs Forge Neo's folder")


@pytest.mark.parametrize(
    ("model", "storage"),
    [
        *((model, "float32") for model in ("flux", "z_image", "qwen_image", "anima", "wan")),
        *((model, storage) for model in ("flux", "z_image") for storage in ("float8", "gguf")),
    ],
)
def test_composed_rows_are_what_the_host_predicts_with_one_lora_merged(model: str, storage: str) -> None:
    python = os.environ.get("LORATORIO_FORGE_NEO_PYTHON") or str(Path(NEO) / "venv" / "bin" / "python")
    command = [python, str(HERE / "probe.py"), str(HERE.parent.parent), model, storage]
    done = subprocess.run(command, cwd=NEO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["plain"] < 1e-6  # the model as stored and that of its reference are the same
    assert max(seen["solo"]) < 1e-5
    assert seen["all"] < 1e-5
    assert min(seen["effect"]) > 0.1
    assert seen["same"]
    assert seen["hooks"] == 0
