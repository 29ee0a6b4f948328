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

from .client import Refused, WebUI, psnr
from .scenarios import HIRES
from .test_scenarios import upscaled

KNOBS = {"reuse": 1}
NO_LORA = "names no LoRA"


def note(infotext: str) -> str:
    """The note, or nothing."""
    found = re.search(r'LoRAtorio note: ("(?:[^"\\]|\\.)*"|[^,]*)', infotext)
    return found[1].strip('"') if found else ""


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
    assert note(first.infotext).startswith("Hires pass: The prompt names no LoRA")
    second = webui.txt2img(KNOBS, prompt="a hill", hr_prompt=f"a {tag}", **hires)
    assert f'LoRAtorio hires LoRAs: "{loras[0]}:1"' in second.infotext
    assert note(second.infotext).startswith("First pass: The prompt names no LoRA")


def test_a_lora_at_strength_0_takes_no_weight(webui: WebUI, loras: list[str]) -> None:
    alone = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{loras[0]}:1>")
    beside = webui.txt2img(KNOBS, prompt=f"a red circle <lora:{loras[0]}:1> <lora:{loras[1]}:0>")
    assert psnr(alone.image, beside.image) > 80
    assert composed(beside.infotext) == f"{loras[0]}:1"
    assert f"LoRA {loras[1]} changes nothing here" in note(beside.infotext)


def test_missing_loras_and_unknown_words_are_said(webui: WebUI, loras: list[str]) -> None:
    prompt = f"a <lora:{loras[0]}:1:rolle=style> <lora:{loras[1]}:1>"
    plain = webui.txt2img(KNOBS, prompt=prompt.replace(":rolle=style", ""))
    made = webui.txt2img(KNOBS, prompt=f"{prompt} <lora:no such lora:1>")
    if "reforge" not in webui.url:
        assert "LoRA no such lora is not in the picture" in note(made.infotext)
    assert f"rolle= of LoRA {loras[0]} (did you mean role?)" in note(made.infotext)
    assert psnr(plain.image, made.image) > 80
    missing = webui.txt2img(KNOBS, prompt="a <lora:no such lora:1>")
    assert NO_LORA not in note(missing.infotext)
    assert "no such lora is not in the picture" in note(missing.infotext)


def test_strengths_that_are_no_numbers_are_refused(webui: WebUI, loras: list[str]) -> None:
    with pytest.raises(Refused, match=r"(must be|is not) a number") as refused:
        webui.txt2img(KNOBS, prompt=f"a <lora:{loras[0]}:nan> <lora:{loras[1]}:1>")
    assert refused.value.status == 422


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
        assert name in note(made.infotext).split("not in the picture")[0]
        # A Forge that meets a damaged file takes none of the prompt's LoRAs.
        assert composed(made.infotext) in (f"{loras[1]}:1", "")
        assert bool(composed(made.infotext)) is (loras[1] not in note(made.infotext))
    made = webui.txt2img(KNOBS, prompt=f"a red circle <lora:partly:1> <lora:{loras[1]}:1>")
    assert re.search(r"Of LoRA partly \d+ of \d+ layers were used", note(made.infotext))
    with pytest.raises(Refused, match=r"LoRA huge changes layer .* by numbers as large as") as refused:
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
