"""Tests against a running WebUI; each is skipped without one.

LORATORIO_WEBUI_URL     its address, e.g. http://127.0.0.1:7860 (started with --api)
LORATORIO_WEBUI_LORAS   at least three LoRAs for its checkpoint, comma separated; else the first three it lists
LORATORIO_WEBUI_WORDS   the words that call them, comma separated, where they do little without
LORATORIO_WEBUI_CFG     5 by default; the toybox's LoRAs want 3
LORATORIO_WEBUI_SIZE    side of the pictures in pixels; 64 by default; the toybox is made for 128
LORATORIO_WEBUI_EXTRA   other checkpoints and their LoRAs: "inpainting=NAME, refiner=NAME, v2=NAME:LORA+LORA, xl=NAME:LORA+LORA,
                        gguf=NAME, other=NAME" (other: one that the LoRAs do not fit)
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from .client import WebUI


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("LORATORIO_WEBUI_URL"):
        for item in items:
            if "tests/webui/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="no LORATORIO_WEBUI_URL: needs a running WebUI"))


@pytest.fixture(scope="session")
def webui() -> WebUI:
    return WebUI(os.environ["LORATORIO_WEBUI_URL"])


@pytest.fixture(scope="session")
def loras(webui: WebUI) -> list[str]:
    """Names of three LoRAs."""
    named = os.environ.get("LORATORIO_WEBUI_LORAS", "")
    names = [name.strip() for name in named.split(",") if name.strip()] or webui.lora_names()
    if len(names) < 3:
        pytest.skip("the WebUI has fewer than three LoRAs")
    return names[:3]


@pytest.fixture(scope="session")
def extra() -> dict[str, tuple[str, list[str]]]:
    """Checkpoints by what they are for, each with its LoRAs (none: the usual ones fit)."""
    found = {}
    for part in filter(None, os.environ.get("LORATORIO_WEBUI_EXTRA", "").replace(" ", "").split(",")):
        purpose, _, rest = part.partition("=")
        checkpoint, _, names = rest.partition(":")
        found[purpose] = checkpoint, [name for name in names.split("+") if name]
    return found


@pytest.fixture(scope="session")
def has_reference(webui: WebUI) -> bool:
    """Whether `reference_extension/` is installed in the WebUI."""
    listed: dict[str, Any] = webui.call("scripts")
    return "loratorio slow reference" in listed["txt2img"]
