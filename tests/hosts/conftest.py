"""The stand-in of tests/standin/a1111 as fixtures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

STANDIN = Path(__file__).parent.parent / "standin" / "a1111"


@pytest.fixture(scope="module")
def a1111() -> Iterator[Any]:
    """The stand-in's modules, importable as the WebUI's are, for this file only."""
    before = set(sys.modules)
    sys.path.insert(0, str(STANDIN))
    try:
        import networks
        import run
        from modules import processing, script_callbacks, sd_hijack, shared

        yield SimpleNamespace(
            run=run,
            shared=shared,
            networks=networks,
            processing=processing,
            callbacks=script_callbacks,
            hijack=sd_hijack.model_hijack,
        )
    finally:
        sys.path.remove(str(STANDIN))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("modules", "network", "networks", "run"):
                del sys.modules[name]


@pytest.fixture
def standin(a1111: Any) -> Any:
    return a1111.run.Standin()
