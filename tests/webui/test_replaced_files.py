"""A LoRA's file that is replaced while the WebUI runs, as whoever trains one does it: the new file is read, and whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import WebUI, psnr

KNOBS = {"recentre": 0.5, "share": 0.0, "reuse": 1}


@pytest.fixture
def made(webui: WebUI, loras: list[str]) -> Iterator[tuple[Path, Path, Path]]:
    """Where a LoRA is to be, whose file is the first one's, and where the first and the second one's files are."""
    paths = {each["name"]: Path(each["path"]) for each in webui.call("loras")}
    first, second = paths[loras[0]], paths[loras[1]]
    if not first.is_file():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    trained = first.with_name(f"trained-{uuid.uuid4().hex[:8]}.safetensors")
    shutil.copy(first, trained)
    webui.call("refresh-loras", {})
    yield trained, first, second
    trained.unlink()
    webui.call("refresh-loras", {})


def replace(old: Path, new: Path) -> None:
    """Put a copy of `new` in the place of `old`, in one go."""
    copied = new.with_name(f"{old.name}.part")
    shutil.copyfile(new, copied)
    os.replace(copied, old)


def test_a_replaced_file_is_read_whole(webui: WebUI, loras: list[str], made: tuple[Path, Path, Path]) -> None:
    trained, _, second = made
    prompt = "a red circle <lora:{}:1>"
    webui.txt2img(prompt=prompt.format(trained.stem))
    before = webui.txt2img(KNOBS, prompt=prompt.format(trained.stem))
    replace(trained, second)
    composed = webui.txt2img(KNOBS, prompt=prompt.format(trained.stem))
    own = webui.txt2img(prompt=prompt.format(trained.stem))
    again = webui.txt2img(KNOBS, prompt=prompt.format(trained.stem))
    expected = webui.txt2img(KNOBS, prompt=prompt.format(loras[1]))
    expected_own = webui.txt2img(prompt=prompt.format(loras[1]))
    figures = [
        psnr(one.image, other.image)
        for one, other in ((composed, before), (composed, expected), (again, expected), (own, expected_own))
    ]
    print(f"\nreplaced: to the old picture {figures[0]:.1f}, to the new one {figures[1:]} dB")
    assert figures[0] < 40
    assert min(figures[1:]) >= 70
    if "has changed on disk" in composed.infotext:  # A1111 reads it again by itself
        assert "has changed on disk" not in again.infotext
