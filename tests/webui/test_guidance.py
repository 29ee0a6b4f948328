"""Beside what changes guidance and attention: built-in extensions of the Forges, and Forge Neo's own settings.

Each acts on the composed picture as on the host's: one LoRA at λ = 0, and the same LoRA as two identical files, against the host with it
once. What the WebUI does not have is skipped: Forge's extensions run in Forge Neo's `extensions`, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .client import Pictures, Refused, WebUI, encoded, psnr
from .scenarios import HIRES as HIRES_FIX
from .scenarios import INPAINT
from .test_scenarios import upscaled

KNOBS = {"recentre": 0.0, "share": 0.0, "reuse": 1, "top_k": 0}
FIELDS = {"steps": 2, "cfg_scale": 4.0}
LARGER = {"width": 128, "height": 128}
"""At 64 px the middle of an SD 1 model has a single token, and nothing that changes attention there acts."""
HIRES = {**HIRES_FIX, "hr_cfg": 3.0}


@dataclass(frozen=True)
class Guide:
    """One way to use an extension.

    Attributes:
        script: its name in the API, in small letters; empty: it is a setting. args: of that script.
        settings: of the WebUI.
        fields: of the job; with a mask it is one of img2img.
        acts: whether the host's picture is another with it.
    """

    script: str = ""
    args: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    acts: bool = True


THRESHOLDING = (True, 3.0, 0.9, "Constant", 0.0, "Constant", 0.0, 1.0, "enable", "MEAN", "AD", 1.0)
HRFIX = (True, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")
PAG = "perturbedattentionguidance integrated"
SAG = "selfattentionguidance integrated (sd 1.x, sd 2.x, sdxl)"


def latent_modifier(**changes: Any) -> tuple[Any, ...]:
    """Sharpness, tone mapping and contrast, which need no noise of their own."""
    return (
        True, 8.0, "gaussian", 0.8, "reinhard", 100.0, 2.0, "subtract", 0.0, 0.4, "gaussian", "add", 0.0, 100, 127, 0.0,
        "hard_clamp", 5.0, 0.0, "None", "None",
    )  # fmt: skip


GUIDES = {
    "Perturbed attention": Guide(PAG, (True, 3.0, 0.0, 0.0, 1.0), fields=LARGER),
    "Perturbed attention, scale 10, in part of the steps": Guide(
        PAG, (True, 10.0, 5.0, 0.2, 0.8), fields={**LARGER, "steps": 4}
    ),
    "Perturbed attention, hires fix": Guide(PAG, (True, 3.0, 0.0, 0.0, 1.0), fields={**LARGER, **HIRES}),
    "Perturbed attention, CFG 1": Guide(PAG, (True, 3.0, 0.0, 0.0, 1.0), fields={"cfg_scale": 1.0, **LARGER}),
    "Perturbed attention, AND": Guide(
        PAG, (True, 3.0, 0.0, 0.0, 1.0), fields={"prompt": "a red circle {} AND a green square :0.6", **LARGER}
    ),
    "Self-attention guidance": Guide(SAG, (True, 1.0, 2.0, 0.5), fields=LARGER),
    "Self-attention guidance, hires fix": Guide(SAG, (True, 1.0, 2.0, 0.5), fields={**LARGER, **HIRES}),
    "Dynamic thresholding": Guide("dynamicthresholding (cfg-fix) integrated", THRESHOLDING),
    "Latent modifier": Guide("latentmodifier integrated", latent_modifier()),
    "FreeU": Guide("freeu integrated (sd 1.x, sd 2.x, sdxl)", (True, 1.3, 1.4, 0.9, 0.2, 0.0, 1.0)),
    "HRFix": Guide("kohya hrfix integrated", HRFIX),
    "StyleAlign": Guide("stylealign integrated", (True, 1.0), fields={"batch_size": 2}),
    "StyleAlign, half": Guide("stylealign integrated", (True, 0.5), fields={"batch_size": 2}),
    "Never OOM, UNet": Guide("never oom integrated", (True, False), acts=False),
    "Never OOM, VAE": Guide("never oom integrated", (False, True), acts=False),
    "MaHiRo": Guide("mahiro", (True,)),
    "MaHiRo, reForge's": Guide("mahiro cfg for reforge", (True,)),
    "Rescale CFG": Guide("rescalecfg", (0.7,)),
    "Epsilon scaling": Guide(settings={"scaling_factor": 1.05}),
    "Token merging": Guide(settings={"token_merging_ratio": 0.5}),
    "Soft inpainting": Guide("soft inpainting", (True, 1.0, 0.5, 4.0, 0.0, 0.5, 2.0), fields=INPAINT),
    "Perturbed and self-attention together, FreeU": Guide(PAG, (True, 3.0, 0.0, 0.0, 1.0), fields=LARGER),
}  # fmt: skip
TOGETHER = {
    SAG: (True, 1.0, 2.0, 0.5),
    "freeu integrated (sd 1.x, sd 2.x, sdxl)": (True, 1.3, 1.4, 0.9, 0.2, 0.0, 1.0),
}


@pytest.fixture(scope="module")
def twin(webui: WebUI, loras: list[str]) -> Iterator[str]:
    """The first LoRA once more, under another name."""
    path = next(Path(each["path"]) for each in webui.call("loras") if each["name"] == loras[0])
    if not path.is_file():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    copied = path.with_name(f"{path.stem}-twin{path.suffix}")
    shutil.copy(path, copied)
    webui.call("refresh-loras", {})
    yield copied.stem
    copied.unlink()
    webui.call("refresh-loras", {})


Plain = dict[str, tuple[Pictures, Callable[[], Pictures]]]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """By the fields of a job, its picture without an extension, unticked, and how to make it again."""
    return {}


@pytest.mark.parametrize("name", GUIDES)
def test_guidance(
    webui: WebUI, loras: list[str], twin: str, plain: Plain, name: str, record_property: Any
) -> None:
    guide = GUIDES[name]
    make = webui.img2img if "mask" in guide.fields else webui.txt2img
    listed, known = webui.call("scripts")[make.__name__], webui.call("options")
    scripts: dict[str, Any] = {guide.script: list(guide.args)} if guide.script else {}
    if "together" in name:
        scripts |= {script: list(args) for script, args in TOGETHER.items()}
    if not (scripts.keys() <= set(listed) and guide.settings.keys() <= known.keys()):
        pytest.skip(f"the WebUI has no {name}")

    def run(knobs: dict[str, Any] | None, on: bool, *names: str) -> Pictures:
        tags = " ".join(f"<lora:{each}:1>" for each in names)
        fields = upscaled(webui, {**FIELDS, **guide.fields})
        fields["prompt"] = str(fields.get("prompt", "a red circle {}")).format(tags)
        if on and guide.settings:
            webui.call("options", guide.settings)
        try:
            return make(knobs, scripts=scripts if on else {}, **fields)
        finally:
            if on and guide.settings:
                webui.call("options", {name: known[name] for name in guide.settings})

    key = repr(guide.fields)
    if key not in plain:
        if "mask" in guide.fields:
            run(None, False, loras[0])  # the first picture after one of txt2img differs from the next
        plain[key] = (run(None, False, loras[0]), partial(run, None, False, loras[0]))
    own = run(None, True, loras[0])
    one, two = run(KNOBS, True, loras[0]), run(KNOBS, True, loras[0], twin)
    figures = {
        "effect": likeness(own, plain[key][0]),
        "one": likeness(own, one),
        "two": likeness(own, two),
    }
    said = ", ".join(f"{what} {figure:.1f}" for what, figure in figures.items())
    record_property("dB", said)
    print(f"\n{name}: {said} dB")
    assert guide.acts == (figures["effect"] < 65)
    for pictures in (one, two):
        assert "LoRAtorio LoRAs" in pictures.infotext
        assert "LoRAtorio note" not in pictures.infotext
    assert min(figures["one"], figures["two"]) >= 70


def likeness(one: Pictures, other: Pictures) -> float:
    """The least of the pictures', in dB."""
    return min(psnr(*pair) for pair in zip(one.images, other.images, strict=True))


def test_unticked_pictures_are_as_before(plain: Plain) -> None:
    if not plain:
        pytest.skip("no picture was made before")
    for before, again in plain.values():
        again()  # warm, as the first one was
        assert likeness(before, again()) == float("inf")


def test_an_evaluation_inside_another_is_refused(webui: WebUI, loras: list[str]) -> None:
    """ControlNet's reference_only has the model look at its picture first, in every step."""
    if "controlnet" not in webui.call("scripts")["txt2img"]:
        pytest.skip("the WebUI has no controlnet")
    seen = np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8)
    unit = {"enabled": True, "module": "reference_only", "model": "None", "image": encoded(seen)}
    fields = {**FIELDS, **LARGER, "prompt": f"a red circle <lora:{loras[0]}:1>"}
    before = webui.txt2img(**fields)
    # The WebUI shows its picture, too.
    assert psnr(before.image, webui.txt2img(scripts={"controlnet": [unit]}, **fields).image) < 65
    with pytest.raises(Refused, match="calls the model without LoRAtorio") as caught:
        webui.txt2img(KNOBS, scripts={"controlnet": [unit]}, **fields)
    assert caught.value.status == 422
    assert likeness(before, webui.txt2img(**fields)) == float("inf")
