"""Beside other extensions: composed as they would have it, or merged with a note; and the next picture without us is as before.

Each is skipped where the WebUI does not have the extension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from .client import Pictures, WebUI, psnr

PLAIN = {"sampler_name": "DDIM", "steps": 8, "cfg_scale": 4.0, "negative_prompt": ""}

ALONE = {"recentre": 0.0, "share": 0.0, "reuse": 1}
"""With one LoRA the composed picture is the merged one."""


@dataclass(frozen=True)
class Neighbour:
    """One way to use an extension.

    Attributes:
        script: its name in the API, in small letters. args: of that script.
        prompt: with {0}, {1} for LoRAs' names.
        knobs: ours, with which the picture is the one without us.
        note: what the infotext says, where the extension has the LoRAs merged; the picture is then equal in every bit.
        strength: what the infotext says of the first LoRA.
    """

    script: str
    args: tuple[Any, ...]
    prompt: str
    knobs: dict[str, Any] = field(default_factory=lambda: dict(ALONE))
    fields: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    strength: str = ""


MERGE = {"method": "merge"}
BLOCKS = ",".join(["1"] * 6 + ["0.3"] * 11)
WEIGHT = ("lora block weight", ("", True))
NEIGHBOURS = {
    **{
        f"LoRA Block Weight, {tag[:5]}, {name}": Neighbour(*WEIGHT, prompt.format("{0}", "{1}", tag=tag), knobs, {}, "", strength)
        for tag, strength in (("start=4", "0 to 1"), ("stop=4", "0 to 1"), ("step=2-6", "0 to 1"), (f"lbw={BLOCKS}", "1"))
        for name, prompt, knobs in (
            ("one", "<lora:{0}:1:{tag}>", ALONE),
            ("two merged", "<lora:{0}:1:{tag}> <lora:{1}:0.8>", MERGE),
        )
    },
    "LoRA Block Weight, a batch": Neighbour(
        *WEIGHT, "<lora:{0}:1:stop=4> <lora:{1}:0.8>", MERGE, {"batch_size": 2, "n_iter": 2}
    ),
    "LoRA Block Weight, hires": Neighbour(
        *WEIGHT, "<lora:{0}:1:stop=4> <lora:{1}:0.8>", MERGE,
        {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7},
    ),
    "NegPiP, one": Neighbour("negpip", (True,), "(blur:-1.0) <lora:{0}:1>", ALONE, {}, "negpip replaces the model's attention"),
    "NegPiP, two in a batch": Neighbour(
        "negpip", (True,), "(blur:-1.0) <lora:{0}:1> <lora:{1}:1>", {}, {"batch_size": 2}, "negpip replaces the model's attention"
    ),
    "NegPiP without a negative weight": Neighbour("negpip", (True,), "blur <lora:{0}:1>"),
    "loractl, one": Neighbour("dynamic lora weights", (True,), "<lora:{0}:1@0,0@1>", ALONE, {}, "", "0.167 to 1"),
    "loractl, two merged": Neighbour("dynamic lora weights", (True,), "<lora:{0}:0@0,1@1> <lora:{1}:1>", MERGE, {}, "", "0 to 0.833"),
    "FreeU": Neighbour("freeu", (True,), "<lora:{0}:1>"),
    "Kohya hires fix": Neighbour("kohya hires.fix", (True,), "<lora:{0}:1>", ALONE, {"width": 128, "height": 128}),
    "Tiled Diffusion": Neighbour(
        "tiled diffusion", (True, "MultiDiffusion", False, True, 128, 128, 8, 8, 4, 2), "<lora:{0}:1>", ALONE,
        {"width": 128, "height": 128},
    ),
    "Dynamic Prompts": Neighbour("dynamic prompts v2.17.1", (True,), "{{red|blue}} <lora:{0}:1>", ALONE, {"n_iter": 2}),
    "Forge Couple": Neighbour("forge couple", (True,), "left <lora:{0}:1>\nright", ALONE, {"width": 128}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_beside_another_extension(webui: WebUI, loras: list[str], name: str, record_property: Any) -> None:
    neighbour = NEIGHBOURS[name]
    if neighbour.script not in webui.call("scripts")["txt2img"]:
        pytest.skip(f"the WebUI has no {neighbour.script}")
    plain = f"a red circle <lora:{loras[0]}:1> <lora:{loras[1]}:0.8>"
    prompt = f"a red circle {neighbour.prompt.format(*loras)}"

    def run(knobs: dict[str, Any] | None) -> Pictures:
        return webui.txt2img(
            knobs,
            prompt=prompt,
            scripts={neighbour.script: list(neighbour.args)},
            **{**PLAIN, **neighbour.fields},
        )

    before = webui.txt2img(prompt=plain, **PLAIN)
    run(None)  # some extensions' first picture after a job without them differs from their next
    own, ours = run(None), run(neighbour.knobs)
    after = webui.txt2img(prompt=plain, **PLAIN)
    assert (before.image == after.image).all()
    likeness = [psnr(*pair) for pair in zip(own.images, ours.images, strict=True)]
    record_property("dB", ", ".join(f"{each:.1f}" for each in likeness))
    print(f"\nPSNR {name}: {', '.join(f'{each:.1f}' for each in likeness)} dB")
    if neighbour.note:
        assert neighbour.note in ours.infotext
        assert min(likeness) == float("inf")
        assert "LoRAtorio LoRAs" not in ours.infotext
    else:
        assert "LoRAtorio LoRAs" in ours.infotext
        assert "LoRAtorio note" not in ours.infotext
        assert min(likeness) >= 50
    if neighbour.strength:
        assert f"{loras[0]}:{neighbour.strength}" in ours.infotext
