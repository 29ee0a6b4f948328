"""What all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Busy machines are slow at times; what is too slow on the whole, pytest's own timeout stops.
settings.register_profile("loratorio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loratorio")

# The tests' tensors are tiny: threads that wait for each other on a busy machine make them many times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system: LORATORIO_CHROMIUM names it, or it is on the PATH."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    executable = (
        os.environ.get("LORATORIO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if not executable:
        pytest.skip("no Chromium: apt-get install chromium, or name one in LORATORIO_CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()
