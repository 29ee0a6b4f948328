"""Places and own words in the running WebUI, by API and on its page."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .client import SIZE, Pictures, Refused, WebUI, psnr
from .scenarios import HIRES, INIT, INPAINT
from .test_page import page as page
from .test_scenarios import upscaled

pytestmark = pytest.mark.timeout(900)

WIDE = {"width": 2 * SIZE, "height": SIZE}


def tag(name: str, option: str = "", strength: float = 1.0) -> str:
    return f"<lora:{name}{':' + option if option else ''}:{strength}>"


@pytest.mark.parametrize("text", ["a red circle", "a red circle AND a green field :0.6"])
def test_own_words_are_a_longer_prompt_for_the_loras_rows(webui: WebUI, loras: list[str], text: str) -> None:
    """With one LoRA at λ = 0 it is the WebUI's own picture of that prompt."""
    words = "blue, a hat, "
    own = webui.txt2img({"recentre": 0.0}, prompt=f"{text} {tag(loras[0], 'words=blue, a hat')}")
    wanted = words + text.replace("AND ", f"AND {words}")
    assert psnr(own.image, webui.txt2img(prompt=f"{wanted} {tag(loras[0])}").image) >= 70
    assert not np.array_equal(own.image, webui.txt2img(prompt=f"{text} {tag(loras[0])}").image)


def test_places_that_are_the_picture_are_none(webui: WebUI, loras: list[str]) -> None:
    plain = webui.txt2img({}, prompt=f"a {tag(loras[0])}{tag(loras[1])}")
    placed = webui.txt2img({}, prompt=f"a {tag(loras[0], 'at=0,0,1,1')}{tag(loras[1], 'at=left+right')}")
    assert (plain.image == placed.image).all()


def in_way(webui: WebUI, way: str, fields: dict[str, Any]) -> tuple[Callable[..., Pictures], dict[str, Any]]:
    """The call that makes a picture in this way, and its fields."""
    if way == "hires fix":
        return webui.txt2img, upscaled(webui, {**fields, **HIRES, "hr_upscaler": "Lanczos"})
    if way == "txt2img":
        return webui.txt2img, dict(fields)
    masked = {"inpaint_full_res": way == "only masked", "inpaint_full_res_padding": 8}
    return webui.img2img, {**fields, **(INIT if way == "img2img" else INPAINT), **masked}


@pytest.mark.parametrize("way", ["txt2img", "hires fix", "img2img", "inpainting", "only masked"])
def test_places_in_every_way(webui: WebUI, loras: list[str], way: str) -> None:
    """Another picture than without, the same again, in the infotext, and unticked afterwards nothing is left."""
    call, fields = in_way(webui, way, WIDE)
    free = f"a red circle {tag(loras[0])}{tag(loras[1])}"
    placed = f"a red circle {tag(loras[0], 'at=left')}{tag(loras[1], 'at=right')}"

    def twice(composed: Any, prompt: str) -> Pictures:
        # A picture's noise may come from the generator as the job before left it: the second is the same each time.
        call(composed, prompt=prompt, **fields)
        return call(composed, prompt=prompt, **fields)

    plain = twice(None, free)
    first = twice({"weight_maps": True}, placed)
    assert " at left" in first.infotext
    assert "note" not in first.infotext
    assert (twice({}, placed).image == first.image).all()
    assert not (twice({}, free).image == first.image).all()
    assert (twice(None, free).image == plain.image).all()
    assert len(call({}, prompt=placed, batch_size=4, **fields).images) >= 4


@pytest.mark.parametrize("way", ["txt2img", "hires fix"])
def test_where_places_leave_no_room_all_read_the_words(webui: WebUI, loras: list[str], way: str) -> None:
    """If both places have the same words, every LoRA and the base read what they read of a longer prompt."""
    call, fields = in_way(webui, way, WIDE)
    left, right, everywhere = loras[:3]

    def placed(text: str, words: str) -> str:
        return f"{text} {tag(left, f'at=left{words}')}{tag(right, f'at=right{words}')}{tag(everywhere)}"

    own = call({}, prompt=placed("a red circle", ":words=a hat"), **fields)
    assert psnr(own.image, call({}, prompt=placed("a hat, a red circle", ""), **fields).image) >= 70
    assert psnr(own.image, call({}, prompt=placed("a red circle", ""), **fields).image) < 60


@pytest.fixture
def called(webui: WebUI, loras: list[str]) -> Iterator[list[Path]]:
    """Copies of two LoRAs with activation texts, sks and wug."""
    paths = {each["name"]: Path(each["path"]) for each in webui.call("loras")}
    if not paths[loras[0]].is_file():
        pytest.skip("the WebUI's LoRA folder is not on this machine")
    made = []
    for name, word in zip(loras, ("sks", "wug"), strict=False):
        made.append(paths[name].with_name(f"called-{uuid.uuid4().hex[:8]}.safetensors"))
        shutil.copy(paths[name], made[-1])
        made[-1].with_suffix(".json").write_text(json.dumps({"activation text": word}))
    webui.call("refresh-loras", {})
    yield made
    for file in made:
        file.unlink()
        file.with_suffix(".json").unlink()
    webui.call("refresh-loras", {})


@pytest.mark.parametrize("way", ["txt2img", "hires fix", "batch"])
def test_common_words_are_read_by_their_own_lora(webui: WebUI, called: list[Path], way: str) -> None:
    """At λ = 0 each half is its own LoRA's alone, so the same text as own words gives the same picture."""
    fields: dict[str, Any] = {**WIDE, "batch_size": 4 if way == "batch" else 1}
    if way == "hires fix":
        fields = upscaled(webui, {**fields, **HIRES, "hr_upscaler": "Lanczos"})
    left, right = (file.stem for file in called)
    knobs = {"recentre": 0.0, "share": 0.0, "reuse": 1}
    prompt = f"sks, a (wug:1.2) {tag(left, 'at=left~0')}{tag(right, 'at=right~0')}"
    own = f"{tag(left, 'at=left~0:words=sks, a')}{tag(right, 'at=right~0:words=, a (wug:1.2)')}"
    composed = webui.txt2img(knobs, prompt=prompt, **fields)
    wanted = webui.txt2img(knobs, prompt=own, **fields)
    for one, other in zip(composed.images, wanted.images, strict=True):
        assert psnr(one, other) >= 60
    assert f"{left}:1 at left~0 without wug, {right}:1 at right~0 without sks" in composed.infotext
    off = webui.txt2img({**knobs, "own_words": False}, prompt=prompt, **fields)
    assert psnr(off.image, composed.image) < 50
    assert "LoRAtorio own words: False" in off.infotext
    # The texts can be edited while the WebUI runs.
    for file in called:
        file.with_suffix(".json").write_text("{}")
    edited = webui.txt2img(knobs, prompt=prompt, **fields)
    assert (edited.image == off.image).all()


def test_the_page_learns_what_a_lora_does_not_read(webui: WebUI, called: list[Path]) -> None:
    left, right = (file.stem for file in called)
    prompt = f"sks, a (wug:1.2) {tag(left, 'at=left')}{tag(right, 'at=right')}"
    said = f"{left} reads the prompt without wug; {right} reads the prompt without sks."
    assert webui.call("/loratorio/found", {"prompt": prompt})["reads"] == said


WORDS = [word.strip() for word in os.environ.get("LORATORIO_WEBUI_WORDS", "").split(",")]
WIDE_FIGURES = {**WIDE, "steps": 8, "cfg_scale": 3.0, "negative_prompt": ""}


def auto(loras: list[str]) -> str:
    """A prompt with both LoRAs' words in common and places that are to be found."""
    sides = (f"{word} on the {side}" for word, side in zip(WORDS, ("left", "right"), strict=False))
    return f"{', '.join([*sides, 'sky background'])} {tag(loras[0], 'at=auto')}{tag(loras[1], 'at=auto')}"


def places_of(infotext: str) -> dict[str, list[float]]:
    """The found places by LoRA, as a picture's infotext has them."""
    field = re.search(r'LoRAtorio places: ("(?:[^"\\]|\\.)*")', infotext)
    listed = re.findall(r"(?:^|, )(.+?) at ((?:[\d.]+,){3}[\d.]+)", json.loads(field[1])) if field else []
    return {name: [float(side) for side in place.split(",")] for name, place in listed}


@pytest.mark.parametrize("way", ["txt2img", "hires fix", "img2img", "inpainting", "only masked"])
def test_places_that_are_found_in_every_way(webui: WebUI, loras: list[str], way: str) -> None:
    """Another picture than without; the same again from its own infotext's prompt; unticked afterwards nothing is left."""
    call, fields = in_way(webui, way, WIDE_FIGURES)
    free = re.sub(":at=auto", "", auto(loras))

    def twice(composed: Any, prompt: str) -> Pictures:
        call(composed, prompt=prompt, **fields)
        return call(composed, prompt=prompt, **fields)

    plain = twice(None, free)
    first = twice({"weight_maps": True}, auto(loras))
    found = places_of(first.infotext)
    said = "One figure was found" in first.infotext
    assert " at auto" in first.infotext
    assert sorted(found) == ([] if said else sorted(loras[:2]))
    if not said:
        one, other = (found[name] for name in loras[:2])
        assert one[2] == other[0] or one[0] == other[2] or one[3] == other[1] or one[1] == other[3]
    again = first.infotext.split("\n")[0]
    assert (twice({}, again).image == first.image).all()
    assert not (twice({}, free).image == first.image).all()
    assert (twice(None, free).image == plain.image).all()


def test_each_picture_of_a_batch_has_its_own_places(webui: WebUI, loras: list[str]) -> None:
    """Of two batches of two, each is the picture that its seed makes alone."""
    fields = {**WIDE_FIGURES, "prompt": auto(loras)}
    batch = webui.txt2img({}, **fields, batch_size=2, n_iter=2)
    first = len(batch.images) - 4  # the WebUI may put a grid first
    for number in range(4):
        alone = webui.txt2img({}, **fields, seed=7 + number)
        assert psnr(batch.images[first + number], alone.image) > 35
        own, single = places_of(batch.infotexts[first + number]), places_of(alone.infotext)
        assert own.keys() == single.keys()
        for name in own:
            assert own[name] == pytest.approx(single[name], abs=0.01)
    assert len({str(places_of(text)) for text in batch.infotexts[first:]}) > 1


def test_the_hires_pass_goes_on_with_the_first_passs_places(webui: WebUI, loras: list[str]) -> None:
    fields = upscaled(webui, {**WIDE_FIGURES, **HIRES, "hr_upscaler": "Lanczos"})
    low = webui.txt2img({}, prompt=auto(loras), **WIDE_FIGURES)
    high = webui.txt2img({}, prompt=auto(loras), **fields)
    assert places_of(low.infotext)
    assert places_of(high.infotext) == places_of(low.infotext)


def test_bad_places_are_sentences(webui: WebUI, loras: list[str]) -> None:
    for option, knobs, words in (
        ("at=lefft", {}, "did you mean left"),
        ("at=left", {"method": "merge"}, "do not work with Merge"),
        ("at=left", {"end": 0.5}, "every step"),
        ("at=auto:role=style", {}, "finds the place of a character"),
    ):
        with pytest.raises(Refused, match=words) as refused:
            webui.txt2img(knobs, prompt=f"a {tag(loras[0], option)}{tag(loras[1])}")
        assert refused.value.status == 422


def test_cards_and_keys_know_tags_with_options(page: Any, loras: list[str]) -> None:
    """On the WebUI's own page: a click on a LoRA's card takes its tag out, Ctrl+Up changes its strength."""
    page.wait_for_function(
        "typeof opts.keyedit_precision_extra === 'number'"
    )  # the page fetches its options late
    area = page.locator("#txt2img_prompt textarea")
    for written, changed in (
        (tag(loras[0], "at=left", 0.8), f"<lora:{loras[0]}:at=left:0.85>"),
        (f"<lora:{loras[0]}:0.8:at=left>", f"<lora:{loras[0]}:0.85:at=left>"),
    ):
        area.fill(f"a fox {written}")
        area.evaluate("area => { area.focus(); area.setSelectionRange(10, 10); }")
        page.keyboard.press("Control+ArrowUp")
        page.wait_for_function(
            "text => document.querySelector('#txt2img_prompt textarea').value === text",
            arg=f"a fox {changed}",
        )
        page.evaluate("name => cardClicked('txt2img', `<lora:${name}:1>`, '', false)", loras[0])
        page.wait_for_function(
            "() => !document.querySelector('#txt2img_prompt textarea').value.includes('<lora')"
        )
