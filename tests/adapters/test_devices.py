"""Everything is brought to the device that it is used on; told without a GPU, see `fake_accelerator`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a newer torch, whose devices can be pretended",
)
def test_nothing_is_on_two_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.fake_accelerator"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compositions" in done.stdout
