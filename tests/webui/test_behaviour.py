"""What the WebUI answers: knobs by position and by name, bad ones, no LoRA, interruption, weight maps."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from loratorio.settings import KNOBS, Settings

from .client import Pictures, Refused, WebUI, psnr
from .test_scenarios import HIRES, TOGETHER, is_composed, tagged, upscaled


def test_positional_arguments_equal_named_ones(webui: WebUI, loras: list[str]) -> None:
    prompt = tagged("a red circle", loras[:2])
    settings = Settings.from_mapping({"enabled": True, **TOGETHER})
    # All of them: what is not named has the default of the WebUI's settings page.
    values = {knob.name: getattr(settings, knob.name) for knob in KNOBS}
    by_place = webui.txt2img(list(values.values()), prompt=prompt)
    by_name = webui.txt2img(values, prompt=prompt)
    assert (by_place.image == by_name.image).all()
    assert by_place.infotext == by_name.infotext


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"patchsize": 2}, "patch_size"), ({"temperature": -1}, "temperature"), ({"method": "lora"}, "method"), ({"top_k": "many"}, "top_k")],
)  # fmt: skip
def test_bad_knobs_are_refused_with_a_sentence(
    webui: WebUI, loras: list[str], knobs: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refused, match=words) as refused:
        webui.txt2img(knobs, prompt=tagged("a", loras[:2]))
    assert refused.value.status == 422
    assert webui.txt2img().image.size  # and the WebUI goes on


def test_without_a_lora_nothing_happens_and_it_says_so(webui: WebUI) -> None:
    plain, ticked = webui.txt2img(), webui.txt2img(TOGETHER)
    assert (plain.image == ticked.image).all()
    assert "names no LoRA" in ticked.infotext


def test_an_unknown_lora_is_left_out_as_the_webui_does(webui: WebUI, loras: list[str]) -> None:
    """That one alone; in reForge, because of an error of its own, every LoRA of the prompt."""
    prompt = tagged("a", loras[:1]) + "<lora:no such lora:1>"
    own, ours = webui.txt2img(prompt=prompt), webui.txt2img({"recentre": 0.0}, prompt=prompt)
    assert psnr(own.image, ours.image) >= 50


def test_no_lora_stays_in_memory(webui: WebUI, loras: list[str], has_reference: bool) -> None:
    if not has_reference:
        pytest.skip("tests/webui/reference_extension is not installed in this WebUI")
    for more in ({}, upscaled(webui, HIRES), {"n_iter": 2}):
        assert is_composed(webui.txt2img(TOGETHER, prompt=tagged("a red circle", loras), **more))
        assert webui.call("slow-reference-held") == 0


def test_interrupted_at_once(webui: WebUI, loras: list[str]) -> None:
    """Before the first batch, before the first step, or later: the infotext has LoRAs, or says that nothing was composed."""
    done: list[Pictures] = []
    fields = {"prompt": tagged("a red circle", loras[:2]), "steps": 60, "n_iter": 2}
    job = threading.Thread(target=lambda: done.append(webui.txt2img(TOGETHER, **fields)))
    job.start()
    while not webui.call("progress?skip_current_image=true")["state"]["job"] and job.is_alive():
        time.sleep(0.01)
    webui.call("interrupt", {})
    job.join()
    assert done[0].infotexts
    for text in done[0].infotexts:
        assert ("LoRAtorio LoRAs" in text) != ("interrupted before the first step" in text), text


@pytest.mark.parametrize("call", ["interrupt", "skip"])
def test_interruption(webui: WebUI, loras: list[str], call: str) -> None:
    """The job ends early with a picture, and the next one is as if nothing had been."""
    prompt = tagged("a red circle", loras[:2])
    before = webui.txt2img(prompt=prompt)
    done: list[Pictures] = []
    job = threading.Thread(target=lambda: done.append(webui.txt2img(TOGETHER, prompt=prompt, steps=60)))
    job.start()
    while webui.call("progress?skip_current_image=true")["state"]["sampling_step"] < 1 and job.is_alive():
        time.sleep(0.1)
    webui.call(call, {})
    job.join()
    assert done
    assert done[0].images
    assert (webui.txt2img(prompt=prompt).image == before.image).all()


def test_weight_maps_follow_the_pictures(webui: WebUI, loras: list[str]) -> None:
    prompt = tagged("a red circle", loras)
    summaries = webui.txt2img({**TOGETHER, "weight_maps": True}, prompt=prompt, batch_size=2)
    assert len(summaries.images) in (4, 5)
    pictures = webui.txt2img(
        {**TOGETHER, "weight_maps": True, "single_maps": True}, prompt=prompt, batch_size=2
    )
    assert is_composed(pictures)
    # Two pictures (and perhaps their grid), and for each one map of all LoRAs and one per LoRA.
    assert len(pictures.images) in (2 + 2 * 4, 3 + 2 * 4)
    maps = pictures.images[-8:]
    assert all(each.shape[0] > pictures.image.shape[0] for each in maps)


def test_outside_of_its_part_of_the_steps_the_loras_are_merged(webui: WebUI, loras: list[str]) -> None:
    prompt = tagged("a red circle", loras[:2])
    never = webui.txt2img({**TOGETHER, "start": 1.0}, prompt=prompt)
    merged = webui.txt2img({"method": "merge"}, prompt=prompt)
    assert (never.image == merged.image).all()


@pytest.mark.parametrize("method", [name for name, _ in next(k for k in KNOBS if k.name == "method").choices])
def test_every_method_makes_a_picture(webui: WebUI, loras: list[str], method: str) -> None:
    pictures = webui.txt2img({"method": method}, prompt=tagged("a red circle", loras))
    assert is_composed(pictures)


def test_roles_and_pools(webui: WebUI, loras: list[str]) -> None:
    styled = webui.txt2img(TOGETHER, prompt=f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1:role=style>")
    plain = webui.txt2img(TOGETHER, prompt=f"a <lora:{loras[0]}:1> <lora:{loras[1]}:1>")
    assert is_composed(styled)
    assert (styled.image != plain.image).any()
    with pytest.raises(Refused, match="role") as refused:
        webui.txt2img(TOGETHER, prompt=f"a <lora:{loras[0]}:1:role=stile>")
    assert refused.value.status == 422
    pool = webui.txt2img({**TOGETHER, "top_k": 2}, prompt=f"a <pool:{','.join(loras)}:0.8>")
    assert "LoRAtorio LoRAs" in pool.infotext
    assert "the pool" in pool.infotext  # the note on what was taken of it
    assert "<pool:" in pool.infotext
    with pytest.raises(Refused, match="pool"):
        webui.txt2img(TOGETHER, prompt="a <pool:../secret:1>")
