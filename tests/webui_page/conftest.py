"""A real Gradio page in its own process and virtual environment, and a headless Chromium to drive it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, for a page's server on a busy machine


@pytest.fixture(scope="module", params=["gradio3", "gradio4"])
def server(request: pytest.FixtureRequest, browser: Any) -> Iterator[str]:
    """The address of tests/webui_page/page.py, served by one of the two Gradio versions."""
    python = ROOT / ".venvs" / request.param / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venvs/{request.param}: run tests/webui_page/make_venvs.sh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost"}
    process = subprocess.Popen(
        [str(python), "-m", "tests.webui_page.page", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(address: str, process: subprocess.Popen[str]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the page's server ended: {process.stdout.read() if process.stdout else ''}")
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the page's server did not answer within {PATIENCE} s")


@pytest.fixture
def page(server: str, browser: Any) -> Iterator[Any]:
    """A fresh page. Nothing but the server is reachable; an error in the page's scripts fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    context.route(
        "**/*",
        lambda route: route.continue_() if route.request.url.startswith((server, "data:")) else route.abort(),
    )
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server)
    page.wait_for_selector("#loratorio_txt2img_loras", state="attached")
    page.wait_for_function("window.updates >= 1")
    yield page
    context.close()
    assert errors == []
