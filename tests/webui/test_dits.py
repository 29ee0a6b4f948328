"""DiTs in a whole Forge Neo: small random ones, which `tests/forge_neo/small_checkpoint.py` writes, and LoRAs in their trainers' formats.

LORATORIO_WEBUI_EXTRA names those that are there: "flux=small-flux.safetensors, z_image=small-z_image.safetensors"; their LoRAs are
MODEL-FORMAT.
`pytest -rP` prints the figures of docs/lab/HOSTS.md.

The largest need less than 24 GB only where the host stores them as they are in the file (`--bf16-unet --bf16-text-enc --fp32-vae`) and
merges LoRAs on the fly, unrounded ("Diffusion in Low Bits": "Automatic (fp16 LoRA)").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .client import Pictures, WebUI, encoded, psnr

pytestmark = pytest.mark.timeout(1800)

MODELS = ("flux", "z_image", "lumina", "qwen_image", "krea", "flux2", "chroma", "anima")
FORMATS = ("kohya", "comfy", "lokr", "diffusers")
NOT_BY_DIFFUSERS = {
    "lumina": "Forge Neo's own loader takes q, k and v for equally wide, which Lumina's are not, and fails",
    "anima": "Forge Neo's own loader knows none of the names, and loads nothing",
}
"""Models of which the host itself cannot read LoRAs as diffusers names them."""
FIELDS = {"steps": 2, "cfg_scale": 1.0, "negative_prompt": "", "sampler_name": "Euler"}
ALONE = {"recentre": 0.0, "share": 0.0, "reuse": 1}
PAPER = {"preset": "paper", "patch_size": 2, "temperature": 0.01}
LEAST = 70.0
"""Decibels that count as equal: the sampler's own numbers are rounded to the host's order of summing."""


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, webui: WebUI, extra: dict[str, tuple[str, list[str]]]
) -> Iterator[str]:
    """A model that is there, loaded."""
    if request.param not in extra:
        pytest.skip(f"no {request.param} in LORATORIO_WEBUI_EXTRA")
    before = webui.call("options")["sd_model_checkpoint"]
    webui.call("options", {"sd_model_checkpoint": extra[request.param][0]})
    yield request.param
    webui.call("options", {"sd_model_checkpoint": before})


def prompt(model: str, *tags: str) -> str:
    return " ".join(["a red circle", *(f"<lora:{model}-{tag}>" for tag in tags)])


def worst(some: Pictures, others: Pictures) -> float:
    assert len(some.images) == len(others.images)
    return min(psnr(one, other) for one, other in zip(some.images, others.images, strict=True))


def is_composed(pictures: Pictures) -> bool:
    return all("LoRAtorio LoRAs" in text and "LoRAtorio note" not in text for text in pictures.infotexts)


@pytest.mark.parametrize("form", FORMATS)
def test_one_lora_is_what_the_host_makes_of_it(webui: WebUI, model: str, form: str) -> None:
    if form == "diffusers" and model in NOT_BY_DIFFUSERS:
        pytest.skip(NOT_BY_DIFFUSERS[model])
    bare = webui.txt2img(prompt="a red circle", **FIELDS)
    own = webui.txt2img(prompt=prompt(model, f"{form}:0.9"), **FIELDS)
    ours = webui.txt2img(ALONE, prompt=prompt(model, f"{form}:0.9"), **FIELDS)
    assert is_composed(ours)
    print(f"{model} {form}: {worst(own, ours):.1f} dB; with and without the LoRA {worst(own, bare):.1f}")
    assert worst(own, bare) < 40
    assert worst(own, ours) >= LEAST
    again = webui.txt2img(prompt=prompt(model, f"{form}:0.9"), **FIELDS)
    assert worst(own, again) == float("inf")


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "batch": {"batch_size": 2},
    "CFG 4": {"cfg_scale": 4.0, "negative_prompt": "blurry"},
    "96×64": {"width": 96},
    "hires fix": {
        "enable_hr": True,
        "hr_scale": 1.5,
        "hr_upscaler": "None",
        "denoising_strength": 0.7,
        "hr_additional_modules": ["Use same choices"],
    },
    "img2img": {"denoising_strength": 0.8},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_make_pictures(webui: WebUI, model: str, way: str) -> None:
    fields = {**FIELDS, **WAYS[way]}
    make = webui.txt2img
    if way == "img2img":
        make = webui.img2img
        fields["init_images"] = [encoded(webui.txt2img(prompt="a blue field", **FIELDS).image)]
    one, two = prompt(model, "kohya:0.9"), prompt(model, "kohya:0.9", "lokr:0.7")
    make(prompt=one, **fields)  # the host's own first picture after a change of ways may differ from its next
    own, ours = make(prompt=one, **fields), make(ALONE, prompt=one, **fields)
    merged, by_rows = make(prompt=two, **fields), make({"method": "merge"}, prompt=two, **fields)
    composed = make(PAPER, prompt=two, **fields)
    print(f"{model} {way or 'plain'}: one {worst(own, ours):.1f} dB, two merged {worst(merged, by_rows):.1f}")
    assert is_composed(ours)
    assert is_composed(by_rows)
    assert is_composed(composed)
    assert worst(own, ours) >= LEAST
    assert worst(merged, by_rows) >= LEAST
    assert worst(merged, composed) < 60
    assert worst(merged, make(prompt=two, **fields)) == float("inf")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_several_equal_the_slow_reference(webui: WebUI, model: str, has_reference: bool, cfg: float) -> None:
    if not has_reference:
        pytest.skip("tests/webui/reference_extension is not installed in this WebUI")
    fields = {**FIELDS, "cfg_scale": cfg}
    third = "comfy" if model in NOT_BY_DIFFUSERS else "diffusers"
    for tags in (("kohya:0.9", "lokr:0.7"), ("kohya:0.9", "lokr:0.7", f"{third}:1.1")):
        knobs = {**PAPER, "top_k": 0}
        if len(tags) == 3:
            knobs = {"preset": "paper", "method": "relative", "patch_size": 2, "top_k": 0}
        slow = webui.txt2img(
            prompt=prompt(model, *tags),
            scripts={"LoRAtorio slow reference": [{**knobs, "recentre": 0.5}]},
            **fields,
        )
        ours = webui.txt2img(knobs, prompt=prompt(model, *tags), **fields)
        print(f"{model} CFG {cfg:g}, {len(tags)} LoRAs to the slow reference: {worst(slow, ours):.1f} dB")
        assert is_composed(ours)
        assert worst(slow, ours) >= LEAST


def test_places_and_reuse(webui: WebUI, model: str) -> None:
    fields = {**FIELDS, "cfg_scale": 4.0, "width": 96}
    everywhere = webui.txt2img(PAPER, prompt=prompt(model, "kohya:0.9", "lokr:0.7"), **fields)
    whole = webui.txt2img(
        PAPER, prompt=prompt(model, "kohya:at=0,0,1,1:0.9", "lokr:at=0,0,1,1:0.7"), **fields
    )
    assert worst(everywhere, whole) == float("inf")
    halves = webui.txt2img(PAPER, prompt=prompt(model, "kohya:at=left:0.9", "lokr:at=right:0.7"), **fields)
    assert is_composed(halves)
    assert worst(everywhere, halves) < 60
    long = {**fields, "steps": 12}
    full = webui.txt2img(
        {"preset": "balanced", "reuse": 1}, prompt=prompt(model, "kohya:0.9", "lokr:0.7"), **long
    )
    reused = webui.txt2img({"preset": "balanced"}, prompt=prompt(model, "kohya:0.9", "lokr:0.7"), **long)
    print(f"{model} Balanced to its own reuse 1, 12 steps: {worst(full, reused):.1f} dB")
    assert is_composed(reused)
    assert worst(full, reused) >= 20


def test_places_that_are_found(webui: WebUI, model: str) -> None:
    fields = {**FIELDS, "cfg_scale": 4.0, "width": 128, "steps": 8}
    everywhere = webui.txt2img(PAPER, prompt=prompt(model, "kohya:0.9", "lokr:0.7"), **fields)
    sought = webui.txt2img(PAPER, prompt=prompt(model, "kohya:at=auto:0.9", "lokr:at=auto:0.7"), **fields)
    print(
        f"{model} at=auto: {worst(everywhere, sought):.1f} dB to everywhere; {sought.infotexts[0].splitlines()[-1]}"
    )
    if "LoRAtorio places" in sought.infotexts[0]:
        assert is_composed(sought)
        assert worst(everywhere, sought) < 60
    else:
        assert "figure was found" in sought.infotexts[0]
        assert worst(everywhere, sought) == float("inf")
    # All of the picture is its place.
    alone = webui.txt2img(PAPER, prompt=prompt(model, "kohya:at=auto:0.9", "lokr:0.7"), **fields)
    assert worst(everywhere, alone) == float("inf")
