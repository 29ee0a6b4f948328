"""Checkpoints in few bits in a running Forge: ours against the host's own LoRAs on the very same weights.

LORATORIO_WEBUI_EXTRA names them: "gguf=NAME" (`tests/forge_neo/quantised_checkpoint.py` writes such files).
`pytest -rP` prints the figures of docs/lab/HOSTS.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .client import WebUI, psnr

pytestmark = pytest.mark.timeout(1200)

FIELDS = {"steps": 6, "sampler_name": "DDIM", "cfg_scale": 4.0, "negative_prompt": ""}


@pytest.fixture
def quantised(webui: WebUI, extra: dict[str, tuple[str, list[str]]]) -> Iterator[str]:
    """A GGUF checkpoint, loaded. On such a one Forge Neo has LoRAs act "on the fly", whatever its options say."""
    if "gguf" not in extra:
        pytest.skip("no gguf checkpoint in LORATORIO_WEBUI_EXTRA")
    before = webui.call("options")["sd_model_checkpoint"]
    webui.call("options", {"sd_model_checkpoint": extra["gguf"][0]})
    yield extra["gguf"][0]
    webui.call("options", {"sd_model_checkpoint": before})


def test_one_lora_and_two_are_what_the_host_itself_makes_of_them(
    webui: WebUI, loras: list[str], quantised: str
) -> None:
    one = f"a red circle <lora:{loras[0]}:0.9>"
    two = f"{one} <lora:{loras[1]}:0.8>"
    bare = webui.txt2img(prompt="a red circle", **FIELDS)
    for prompt, knobs in (
        (one, {"recentre": 0.0, "share": 0.0, "reuse": 1}),
        (two, {"method": "merge"}),
    ):
        own = webui.txt2img(prompt=prompt, **FIELDS)
        assert psnr(own.image, bare.image) < 40
        ours = webui.txt2img(knobs, prompt=prompt, **FIELDS)
        assert "LoRAtorio LoRAs" in ours.infotext
        assert "LoRAtorio note" not in ours.infotext
        print(f"{quantised}, {len(prompt.split('<')) - 1} LoRA: {psnr(own.image, ours.image):.1f} dB")
        assert psnr(own.image, ours.image) >= 70
        assert (webui.txt2img(prompt=prompt, **FIELDS).image == own.image).all()


def test_composed_and_unticked_again(webui: WebUI, loras: list[str], quantised: str) -> None:
    prompt = "a red circle " + " ".join(f"<lora:{name}:0.8>" for name in loras)
    before = webui.txt2img(prompt=prompt, **FIELDS)
    composed = webui.txt2img({}, prompt=prompt, **FIELDS)
    assert psnr(composed.image, before.image) < 60
    assert (webui.txt2img(prompt=prompt, **FIELDS).image == before.image).all()
    assert (webui.txt2img({}, prompt=prompt, **FIELDS).image == composed.image).all()
