"""What a running WebUI's pictures say of themselves: notes, LoRAs and passes of each; files that are missing, damaged, or called alike."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratorio.webui.xyz import PREFIX

from .client import Refused, WebUI, note, psnr
from .scenarios import HIRES, INIT
from .test_scenarios import upscaled

KNOBS = {"reuse": 1}
NO_LORA = "names no LoRA"


def composed(infotext: str) -> str:
    """The LoRAs that were composed, or nothing."""
    found = re.search(r'LoRAtorio LoRAs: "([^"]*)"', infotext)
    return found[1] if found else ""


def test_an_infotext_says_only_what_matters(webui: WebUI, loras: list[str]) -> None:
    made = webui.txt2img({}, prompt=f"a <lora:{loras[0]}:1> <lora:{loras[1]}:0.8>")
    own = made.infotext[made.infotext.index("LoRAtorio") :]
    assert re.fullmatch(
        rf'LoRAtorio: True, LoRAtorio version: [\d.]+, LoRAtorio LoRAs: "{loras[0]}:1, {loras[1]}:0.8"(, Version: .*)?',
        own,
    )


def test_each_picture_of_a_prompt_matrix_has_its_own_notes(webui: WebUI, loras: list[str]) -> None:
    """The first combination has no LoRA, the second has one, …"""
    tags = [f"<lora:{name}:1>" for name in loras[:2]]
    made = webui.txt2img(
        KNOBS,
        prompt=f"a red circle|{tags[0]}|{tags[1]}",
        script_name="prompt matrix",
        script_args=[False, False, "positive", "comma", 0],
    )
    texts = [text for text in made.infotexts if "|" not in text]
    assert len(texts) >= 4
    seen = set()
    for text in texts:
        prompt = text.split("\n")[0]
        named = [name for name in loras[:2] if f"<lora:{name}" in prompt]
        assert composed(text) == ", ".join(f"{name}:1" for name in named)
        assert (NO_LORA in note(text)) is (not named)
        seen.add(tuple(named))
    assert len(seen) == 4


def test_a_pass_that_was_not_composed_says_which(webui: WebUI, loras: list[str]) -> None:
    hires = upscaled(webui, HIRES)
    tag = f"<lora:{loras[0]}:1>"
    both = webui.txt2img(KNOBS, prompt=f"a {tag}", **hires)
    assert note(both.infotext) == ""
    first = webui.txt2img(KNOBS, prompt=f"a {tag}", hr_prompt="a hill", **hires)
    assert composed(first.infotext) == f"{loras[0]}:1"
    assert note(first.infotext).startswith("Hires pass: LoRAtorio composed nothing: the prompt names no LoRA")
    second = webui.txt2img(KNOBS, prompt="a hill", hr_prompt=f"a {tag}", **hires)
    assert f'LoRAtorio hires LoRAs: "{loras[0]}:1"' in second.infotext
    assert note(second.infotext).startswith(
        "First pass: LoRAtorio composed nothing: the prompt names no LoRA"
    )


def test_a_lora_at_strength_0_takes_no_weight(webui: WebUI, loras: list[str]) -> None:
    alone = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{loras[0]}:1>")
    beside = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{loras[0]}:1> <lora:{loras[1]}:0>")
    assert psnr(alone.image, beside.image) > 80
    assert composed(beside.infotext) == f"{loras[0]}:1"
    assert f"LoRA {loras[1]} has no effect" in note(beside.infotext)


def test_missing_loras_and_unknown_words_are_said(webui: WebUI, loras: list[str]) -> None:
    prompt = f"a <lora:{loras[0]}:1:rolle=style> <lora:{loras[1]}:1>"
    plain = webui.txt2img(KNOBS, prompt=prompt.replace(":rolle=style", ""))
    made = webui.txt2img(KNOBS, prompt=f"{prompt} <lora:no such lora:1>")
    if "reforge" not in webui.url:
        assert "LoRA no such lora was not used" in note(made.infotext)
    assert f"rolle= of LoRA {loras[0]} (did you mean role?)" in note(made.infotext)
    assert psnr(plain.image, made.image) > 80
    missing = webui.txt2img(KNOBS, prompt="a <lora:no such lora:1>")
    assert NO_LORA not in note(missing.infotext)
    assert "no such lora was not used" in note(missing.infotext)


def test_strengths_that_are_no_numbers_are_refused(webui: WebUI, loras: list[str]) -> None:
    with pytest.raises(Refused, match=r"(must be|is not) a number") as refused:
        webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:nan> <lora:{loras[1]}:1>")
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<lora:{}:0,8>", "0,8 is not a number: write <lora:{}:0.8>"),
        ("<lora:{}:abc>", "abc is not a number: write <lora:{}:1>"),
        ("<lora:{}:1.0:5-15>", "5-15 is not a number: write <lora:{}:1.0>"),
    ],
)
def test_a_tag_that_the_webui_cannot_read_is_named(
    webui: WebUI, loras: list[str], tag: str, why: str
) -> None:
    """The WebUI itself would leave out all LoRAs of the prompt."""
    hires = upscaled(webui, HIRES)
    good = f"a <lora:{loras[0]}:1>"
    wrong = f"{good} {tag.format(loras[1])}"
    for fields in ({"prompt": wrong}, {"prompt": good, "hr_prompt": wrong, **hires}):
        with pytest.raises(Refused) as refused:
            webui.txt2img(KNOBS, **fields)
        assert refused.value.status == 422
        assert (
            f"The tag {tag.format(loras[1])} cannot be read: {why.format(loras[1])}" in refused.value.answer
        )


def test_own_words_may_have_emphasis(webui: WebUI, loras: list[str]) -> None:
    plain, emphasised = (
        webui.txt2img({**KNOBS, "recentre": 0}, prompt=f"a hill <lora:{loras[0]}:words={words}:0.8>")
        for words in ("red circle", "(red circle:1.4)")
    )
    assert composed(emphasised.infotext) == f"{loras[0]}:0.8"
    assert ":words=(red circle:1.4):0.8>" in emphasised.infotext
    direct = webui.txt2img({**KNOBS, "recentre": 0}, prompt=f"(red circle:1.4), a hill <lora:{loras[0]}:0.8>")
    assert psnr(emphasised.image, direct.image) > 70
    assert psnr(plain.image, direct.image) < 60


@pytest.mark.parametrize("strengths", [("1", "0.4"), ("0.6", "0.6")])
def test_the_same_lora_twice_acts_as_in_the_webui(
    webui: WebUI, loras: list[str], strengths: tuple[str, str]
) -> None:
    prompt = "a red circle " + " ".join(f"<lora:{loras[0]}:{each}>" for each in strengths)
    exact = {"reuse": 1, "recentre": 0, "share": 0, "top_k": 0}
    made = webui.txt2img(exact, prompt=prompt)
    assert psnr(made.image, webui.txt2img(prompt=prompt).image) > 70
    assert re.fullmatch(rf"{loras[0]}:[\d.]+", composed(made.infotext))
    both = webui.txt2img({"method": "merge"}, prompt=f"{prompt} <lora:{loras[1]}:1>")
    assert psnr(both.image, webui.txt2img(prompt=f"{prompt} <lora:{loras[1]}:1>").image) > 70


def test_the_same_lora_in_two_places_has_two_strengths(webui: WebUI, loras: list[str], folder: Path) -> None:
    """As two files with one content have."""
    shutil.copy(path_of(webui, loras[0]), folder / "its twin.safetensors")
    webui.call("refresh-loras", {})
    prompt = f"a red circle <lora:{loras[0]}:at=left:1> <lora:{{}}:at=right:0.4>"
    once, twins = (webui.txt2img(KNOBS, prompt=prompt.format(name)) for name in (loras[0], "its twin"))
    assert composed(once.infotext) == f"{loras[0]}:1 at left, {loras[0]}:0.4 at right"
    assert psnr(once.image, twins.image) > 70


def test_a_place_that_shows_nothing_is_said(webui: WebUI, loras: list[str]) -> None:
    made = webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:1:at=0,0,0.01,0.01~0> <lora:{loras[1]}:1>")
    assert f"LoRA {loras[0]} (at=0,0,0.01,0.01~0) has almost no effect" in note(made.infotext)


def test_places_are_refused_by_sd_upscale(webui: WebUI, loras: list[str]) -> None:
    listed = next(each for each in webui.call("script-info") if each["name"] == "sd upscale")
    args = []
    for arg in listed["args"]:
        value = 16 if "overlap" in arg["label"].lower() else arg["value"]
        args.append(arg["choices"].index("None") if arg["label"] == "Upscaler" else value)
    fields = {**INIT, "script_name": "sd upscale", "script_args": args}
    prompt = f"a <lora:{loras[0]}:1{{}}> <lora:{loras[1]}:1>"
    with pytest.raises(Refused, match=r"(?i)The script SD upscale samples the picture in parts") as refused:
        webui.img2img(KNOBS, prompt=prompt.format(":at=left"), **fields)
    assert refused.value.status == 422
    assert len(webui.img2img(KNOBS, prompt=prompt.format(""), **fields).images) == 1


def test_a_lora_that_changes_only_text_shows_that(webui: WebUI, loras: list[str]) -> None:
    tags = f"<lora:{loras[0]}:te=1:unet=0> <lora:{loras[1]}:1>"
    made = webui.txt2img({**KNOBS, "find_styles": False}, prompt=f"a {tags}")
    assert composed(made.infotext) in (f"{loras[0]}:0 text 1, {loras[1]}:1", f"{loras[1]}:1")
    assert (loras[0] in composed(made.infotext)) or f"LoRA {loras[0]} has no effect" in note(made.infotext)


@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_a_picture_without_a_step_says_that_nothing_was_composed(
    webui: WebUI, loras: list[str], kind: str
) -> None:
    fields: dict[str, Any] = {"prompt": f"a <lora:{loras[0]}:1>", "sampler_name": "DDIM"}
    fields |= {"steps": 1} if kind == "txt2img" else {**INIT, "denoising_strength": 0}
    made = getattr(webui, kind)(KNOBS, **fields)
    said = "nothing" in note(made.infotext) and "compose" in note(made.infotext)
    assert bool(composed(made.infotext)) is not said


def test_a_call_that_forgets_to_switch_it_on_is_told_so(webui: WebUI, loras: list[str]) -> None:
    prompt = f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1>"
    made = webui.txt2img([{"preset": "fast"}], prompt=prompt)
    assert "does not enable it" in made.infotext
    assert (made.image == webui.txt2img(prompt=prompt).image).all()


def test_loras_of_the_negative_prompt_are_said_to_be_text(webui: WebUI, loras: list[str]) -> None:
    made = webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:1>", negative_prompt=f"<lora:{loras[1]}:1>")
    assert "The LoRA tag in the negative prompt has no effect" in note(made.infotext)


def test_an_axis_without_values_is_a_sentence(webui: WebUI, loras: list[str]) -> None:
    info = next(
        each for each in webui.call("script-info") if each["name"] == "x/y/z plot" and not each["is_img2img"]
    )
    types = next(argument["choices"] for argument in info["args"] if argument["label"] == "X type")
    arguments = [argument["value"] for argument in info["args"]]
    for label in ("Preset", "Temperature"):
        arguments[:3] = types.index(PREFIX + label), "", []
        with pytest.raises(Refused, match="the axis has no values") as refused:
            webui.txt2img(
                KNOBS, prompt=f"a <lora:{loras[0]}:1>", script_name="x/y/z plot", script_args=arguments
            )
        assert refused.value.status == 422


def test_a_hires_checkpoint_that_loras_do_not_fit_is_said(
    webui: WebUI, loras: list[str], extra: dict[str, tuple[str, list[str]]]
) -> None:
    if "other" not in extra:
        pytest.skip("no other checkpoint in LORATORIO_WEBUI_EXTRA")
    fields = {**upscaled(webui, HIRES), "hr_checkpoint_name": extra["other"][0]}
    made = webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1>", **fields)
    assert composed(made.infotext) == f"{loras[0]}:1, {loras[1]}:1"
    assert "Hires pass: " in note(made.infotext)
    assert re.search("The hires pass (does not use it|uses the parts that match)", note(made.infotext))


def test_null_is_the_default(webui: WebUI, loras: list[str]) -> None:
    prompt = f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1>"
    one, other = (
        webui.txt2img({**KNOBS, **more}, prompt=prompt) for more in ({}, {"top_k": None, "preset": None})
    )
    assert (one.image == other.image).all()


def test_text_in_an_axis_of_numbers_is_a_sentence(webui: WebUI, loras: list[str]) -> None:
    info = next(
        each for each in webui.call("script-info") if each["name"] == "x/y/z plot" and not each["is_img2img"]
    )
    types = next(argument["choices"] for argument in info["args"] if argument["label"] == "X type")
    arguments = [argument["value"] for argument in info["args"]]
    for label in ("Temperature", "Patch size"):
        arguments[0], arguments[1] = types.index(PREFIX + label), "0.1, warm"
        with pytest.raises(Refused, match=f"X/Y/Z plot, .LoRAtorio. {label}") as refused:
            webui.txt2img(
                KNOBS, prompt=f"a <lora:{loras[0]}:1>", script_name="x/y/z plot", script_args=arguments
            )
        assert refused.value.status == 422


@pytest.fixture
def folder(webui: WebUI) -> Iterator[Path]:
    """A folder of our own among the WebUI's LoRAs, which must be on this machine."""
    listed = webui.call("loras")
    root = Path(listed[0]["path"]).parent if listed else Path("none")
    if not root.is_dir():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    own = root / f"notes-{uuid.uuid4().hex[:8]}"
    own.mkdir()
    yield own
    shutil.rmtree(own)
    webui.call("refresh-loras", {})


def path_of(webui: WebUI, name: str) -> Path:
    return next(Path(each["path"]) for each in webui.call("loras") if each["name"] == name)


def test_a_pool_finds_the_very_file_of_several_with_one_name(
    webui: WebUI, loras: list[str], folder: Path
) -> None:
    made = {}
    for number, name in enumerate(loras[:2]):
        (folder / f"sub{number}").mkdir()
        shutil.copy(path_of(webui, name), folder / f"sub{number}" / "twins.safetensors")
    webui.call("refresh-loras", {})
    for number, name in enumerate(loras[:2]):
        pool = f"<Pool:{folder.name}/sub{number}/*ins:1>"
        made[name] = webui.txt2img(KNOBS, prompt=f"a red circle {pool}")
        named = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{name}:1>")
        assert psnr(made[name].image, named.image) > 80, name
        assert "(100 %)" in composed(made[name].infotext)
        assert pool in made[name].infotext


def test_damaged_files_and_files_of_another_shape(webui: WebUI, loras: list[str], folder: Path) -> None:
    whole = load_file(path_of(webui, loras[0]))
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 100)
    (folder / "empty.safetensors").write_bytes(b"")
    save_file(
        {name: torch.cat([each, each]) if each.ndim else each for name, each in whole.items()},
        folder / "wide.safetensors",
    )
    save_file(
        {
            name: each * 1e30 if each.ndim else each
            for name, each in ((n, t.float()) for n, t in whole.items())
        },
        folder / "huge.safetensors",
    )
    save_file(
        {**whole, "lora_unet_elsewhere.lora_up.weight": torch.ones(3, 2)}, folder / "partly.safetensors"
    )
    shutil.copy(path_of(webui, loras[1]), folder / "good.safetensors")
    webui.call("refresh-loras", {})
    made = webui.txt2img(KNOBS, prompt=f"a red circle <pool:{folder.name}/*>")
    for name in ("wide", "huge", "damaged", "empty"):
        assert name in note(made.infotext)
    assert "good" in composed(made.infotext)
    for name in ("damaged", "empty"):
        made = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{name}:1> <lora:{loras[1]}:1>")
        assert name in note(made.infotext).split("not used: the WebUI found no such file")[0]
        # A Forge that meets a damaged file takes none of the prompt's LoRAs.
        assert composed(made.infotext) in (f"{loras[1]}:1", "")
        assert bool(composed(made.infotext)) is (loras[1] not in note(made.infotext))
    made = webui.txt2img(KNOBS, prompt=f"a red circle <lora:partly:1> <lora:{loras[1]}:1>")
    assert re.search(r"LoRA partly: only \d+ of \d+ layers match this model", note(made.infotext))
    with pytest.raises(Refused, match=r"LoRA huge changes the layer .* by values up to") as refused:
        webui.txt2img(KNOBS, prompt=f"a red circle <lora:huge:1> <lora:{loras[1]}:1>")
    assert refused.value.status == 422


def test_refused_or_not_the_next_unticked_picture_is_the_same(webui: WebUI, loras: list[str]) -> None:
    plain: dict[str, Any] = {"prompt": f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1>"}
    before = webui.txt2img(**plain)
    with pytest.raises(Refused):
        webui.txt2img({"temperature": "warm"}, **plain)
    with pytest.raises(Refused):
        webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:1:role=stile>")
    assert (webui.txt2img(**plain).image == before.image).all()
