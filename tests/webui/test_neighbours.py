"""Beside other extensions: composed as they would have it, or merged with a note; and the next picture without us is as before.

Each is skipped where the WebUI does not have the extension.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .client import Pictures, WebUI, psnr
from .scenarios import HIRES as HIRES_FIX
from .scenarios import INIT, INPAINT

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


@dataclass(frozen=True)
class Way:
    """A way to make pictures in which the WebUI, or an extension, touches rows, tokens or latents.

    Attributes:
        script: its name in the API, in small letters, or nothing. args: of that script.
        options: settings of the WebUI. fields: of the API call; with `init_images` it is img2img's.
        prompt: with {} for the LoRAs' tags.
    """

    script: str = ""
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    prompt: str = "a red circle {}"


LARGE = {"width": 128, "height": 128}
HIRES = {**HIRES_FIX, "hr_scale": 2, "hr_upscaler": "None"}
SAMPLERS = {"Euler": {}, "DDIM": {"sampler_name": "DDIM"}}
WAYS = {
    **{
        f"Tiled Diffusion, {method}, tile batch {count}, {name}": Way(
            "tiled diffusion", (True, method, False, True, 128, 128, 8, 8, 4, count), {}, {**LARGE, **fields}
        )
        for method in ("MultiDiffusion", "Mixture of Diffusers")
        for count in (1, 2, 4)
        for name, fields in {**SAMPLERS, "img2img": INIT, "inpainting": INPAINT, "hires fix": HIRES}.items()
    },
    **{
        f"Neo's {method}, tile batch {count}, {name}": Way(
            "multidiffusion integrated", (True, method, 64, 64, 32, count), {}, {"width": 128, **fields}
        )
        for method in ("MultiDiffusion", "Mixture of Diffusers")
        for count in (1, 2, 3)
        for name, fields in {"txt2img": {}, "img2img": INIT, "inpainting": INPAINT}.items()
    },
    **{
        f"Forge Couple, {regions} regions, {name}": Way(
            "forge couple", (True,), {}, {"width": 128, **fields},
            "\n".join(["a red circle {}", "a blue square", "green fields", "the sea"][:regions]),
        )
        for regions in (2, 3)
        for name, fields in {**SAMPLERS, "img2img": INIT, "hires fix": HIRES}.items()
    },
    **{
        f"StyleAlign at {strength}": Way("stylealign integrated", (True, strength)) for strength in (0.0, 0.5, 1.0)
    },
    "FreeU, A1111": Way("freeu", (True,)),
    "FreeU, Forge": Way("freeu integrated (sd 1.x, sd 2.x, sdxl)", (True, 1.1, 1.2, 0.9, 0.5, 0.0, 1.0)),
    "Kohya HRFix, A1111": Way("kohya hires.fix", (True,), {}, LARGE),
    "Kohya HRFix, Forge": Way("kohya hrfix integrated", (True, 1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"), {}, LARGE),
    "Never OOM": Way("never oom integrated", (True, True)),
    "Dynamic thresholding": Way("dynamicthresholding (cfg-fix) integrated", (True,)),
    "hypertile": Way(options={"hypertile_enable_unet": True, "hypertile_max_tile_unet": 64}, fields=LARGE),
    "token merging": Way(options={"token_merging_ratio": 0.5}),
    "token merging, img2img": Way(options={"token_merging_ratio": 0.5}, fields=INIT),
    "no neighbour": Way(),
}  # fmt: skip


@pytest.fixture
def twins(webui: WebUI, loras: list[str]) -> Iterator[tuple[str, str]]:
    """A LoRA, and the same as another file."""
    path = next(Path(each["path"]) for each in webui.call("loras") if each["name"] == loras[0])
    if not path.is_file():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    twin = path.with_name(f"{path.stem}-twin{path.suffix}")
    shutil.copy(path, twin)
    webui.call("refresh-loras", {})
    yield loras[0], twin.stem
    twin.unlink()
    webui.call("refresh-loras", {})


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", WAYS)
def test_the_same_lora_as_two_files(
    webui: WebUI, twins: tuple[str, str], name: str, pictures: int, record_property: Any
) -> None:
    """Composed it is the WebUI's own picture with the LoRA once: whatever goes to another row shows.

    The LoRA's text encoder part is left out, since regions' text is made with all LoRAs at once.
    """
    way = WAYS[name]
    kind = "img2img" if "init_images" in way.fields else "txt2img"
    if way.script and way.script not in webui.call("scripts")[kind]:
        pytest.skip(f"the WebUI has no {way.script} in {kind}")
    known: dict[str, Any] = webui.call("options")
    if any(option not in known for option in way.options):
        pytest.skip("the WebUI has no such option")

    def run(knobs: dict[str, Any] | None, *names: str) -> Pictures:
        return (webui.img2img if kind == "img2img" else webui.txt2img)(
            knobs,
            prompt=way.prompt.format(" ".join(f"<lora:{each}:0:1>" for each in names)),
            scripts={way.script: list(way.args)} if way.script else {},
            override_settings=way.options,
            **{"batch_size": pictures, "cfg_scale": 4.0, **way.fields},
        )

    try:
        run(
            None, twins[0]
        )  # the first picture after a job of another kind differs from the next in some WebUIs
        own, ours = run(None, twins[0]), run({**ALONE, "method": "loratorio", "top_k": 0}, *twins)
    finally:
        webui.call("options", {option: known[option] for option in way.options})
    likeness = [psnr(*pair) for pair in zip(own.images, ours.images, strict=True)]
    record_property("dB", ", ".join(f"{each:.1f}" for each in likeness))
    print(f"\nPSNR {name}, {pictures}: {', '.join(f'{each:.1f}' for each in likeness)} dB")
    assert "LoRAtorio LoRAs" in ours.infotext
    assert "LoRAtorio note" not in ours.infotext
    assert min(likeness) >= 75
