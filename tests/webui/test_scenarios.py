"""Every way in which the WebUI makes pictures, composed: equal to the WebUI's own picture where theory says so, different
where it says so, and without a trace afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from .client import PLAIN, SIZE, Pictures, WebUI, note, psnr
from .scenarios import HIRES, KINDS, SCENARIOS, Scenario

ALONE = {"recentre": 0.0}
"""One LoRA, no re-centring: exactly the picture that the WebUI makes with that LoRA."""

TOGETHER = {"preset": "paper", "patch_size": 2, "temperature": 0.01, "top_k": 0}
"""As published, so that the slow reference can follow."""


def tagged(text: str, loras: list[str], strengths: tuple[float, ...] = (1.0, 0.8, 0.9)) -> str:
    """The text, the LoRAs' words before it where they are known, and their tags behind it."""
    called = [word.strip() for word in os.environ.get("LORATORIO_WEBUI_WORDS", "").split(",") if word]
    tags = [f"<lora:{name}:{strength}>" for name, strength in zip(loras, strengths, strict=False)]
    return " ".join([", ".join([*called[: len(loras)], text]), *tags])


def upscaled(webui: WebUI, fields: dict[str, Any]) -> dict[str, Any]:
    """A job's fields with an upscaler that the WebUI has: not every host has one for latents, or Lanczos."""
    known = {each["name"] for kind in ("upscalers", "latent-upscale-modes") for each in webui.call(kind)}
    lacking = "hr_upscaler" in fields and fields["hr_upscaler"] not in known
    return {**fields, "hr_upscaler": "None"} if lacking else fields


class Player:
    """Plays one scenario with any LoRAs and knobs."""

    def __init__(self, webui: WebUI, scenario: Scenario, extra: dict[str, Any], loras: list[str]) -> None:
        self.webui, self.scenario, self.loras = webui, scenario, loras
        self.fields = upscaled(webui, dict(scenario.fields))
        options = dict(scenario.options)
        if scenario.checkpoint:
            if scenario.checkpoint not in extra:
                pytest.skip(f"no checkpoint for {scenario.checkpoint!r} in LORATORIO_WEBUI_EXTRA")
            checkpoint, own = extra[scenario.checkpoint]
            self.loras = own or loras
            if scenario.checkpoint == "refiner":
                self.fields["refiner_checkpoint"] = checkpoint
            else:
                options["sd_model_checkpoint"] = checkpoint
        self.fields["override_settings"] = options

    def __call__(self, count: int, composed: Any = None, **fields: Any) -> Pictures:
        prompt = tagged(self.scenario.text, self.loras[:count])
        both = {**self.fields, "prompt": prompt, **fields}
        if self.scenario.second_pass:
            both["hr_prompt"] = tagged("a blue field", self.loras[-count:])
        make = self.webui.txt2img if self.scenario.kind == "txt2img" else self.webui.img2img
        return make(composed, **both)


@pytest.fixture
def options(webui: WebUI) -> Iterator[dict[str, Any]]:
    """The WebUI's settings. Whatever of them a job overrides is as before afterwards.

    The WebUI itself restores only settings that are in its configuration file.
    """
    before: dict[str, Any] = webui.call("options")
    yield before
    now = webui.call("options")
    changed = {name: value for name, value in before.items() if now.get(name) != value}
    if changed:
        webui.call("options", changed)


Record = Callable[[str, Any], None]
"""Writes a figure into pytest's report (`--junitxml=FILE`)."""


def worst(some: Pictures, others: Pictures) -> float:
    """The lowest PSNR of the pictures of two jobs, in dB."""
    return min(psnr(one, other) for one, other in zip(some.images, others.images, strict=True))


FOUND_STYLE = re.compile(
    r"[^.]+ changes? the whole picture evenly, and acts? as (a style|styles), in all passes\. "
    r"To compose (it|them) instead, write role=content into the tag\."
)


def is_composed(pictures: Pictures, *, styles_may_be_found: bool = False) -> bool:
    """Whether LoRAs were composed, with nothing to say to it; a found style may be said, and nothing else, if that is allowed."""
    return all(
        "LoRAtorio: True" in text
        and ("LoRAtorio note" not in text or (styles_may_be_found and FOUND_STYLE.fullmatch(note(text))))
        for text in pictures.infotexts
    )


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_composes(
    scenario: Scenario,
    webui: WebUI,
    options: dict[str, Any],
    extra: dict[str, Any],
    loras: list[str],
    record_property: Record,
) -> None:
    unknown = [name for name in scenario.options if name not in options]
    if unknown:
        pytest.skip(f"this WebUI has no option {unknown[0]}")
    play = Player(webui, scenario, extra, loras)
    # The WebUI draws the noise of the VAE's encoder from torch's global generator, as the job before left it. With random
    # weights that is seen (34 dB); a trained VAE's encoder has next to none.
    if scenario.kind == "img2img" or scenario.checkpoint:
        play(1)
    own = play(1)
    alone = play(1, ALONE)
    assert is_composed(alone)
    record_property("one LoRA, dB", worst(own, alone))
    assert worst(own, alone) >= 50 or not scenario.exact

    merged = play(2)
    routed = play(2, {"method": "merge"})
    assert is_composed(routed)
    record_property("two LoRAs merged, dB", worst(merged, routed))
    assert worst(merged, routed) >= 45 or not scenario.exact

    composed = play(2, TOGETHER)
    assert is_composed(composed)
    assert all(psnr(theirs, ours) < 45 for theirs, ours in zip(merged.images, composed.images, strict=True))

    again = play(2)
    assert all((a == b).all() for a, b in zip(merged.images, again.images, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "knobs",
    [
        *({"preset": preset} for preset in ("paper", "balanced", "fast")),
        *({"method": method} for method in ("merge", "switch", "klora", "lego")),
    ],
    ids=lambda knobs: next(iter(knobs.values())),
)
def test_a_batch_is_the_one_made_alone(
    webui: WebUI, loras: list[str], kind: str, knobs: dict[str, Any], record_property: Record
) -> None:
    """The second of two batches, by its seed, is the picture that a job of one batch gives."""
    fields = {**KINDS[kind], "prompt": tagged("a red circle", loras[:2]), "batch_size": 2}

    def make(**more: int) -> Pictures:
        # The encoder's noise comes from a generator that the job before left where it was: the same job each time.
        webui.txt2img()
        return (webui.img2img if KINDS[kind] else webui.txt2img)(knobs, **fields, **more)

    make()
    both = make(n_iter=2)
    alone = make(seed=PLAIN["seed"] + 2)
    assert is_composed(both, styles_may_be_found=True)
    assert is_composed(alone, styles_may_be_found=True)
    near = [psnr(one, other) for one, other in zip(both.images[2:], alone.images, strict=True)]
    record_property("dB", min(near))
    assert min(near) >= 50


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_matrix(webui: WebUI, loras: list[str], kind: str, record_property: Record) -> None:
    make = webui.img2img if KINDS[kind] else webui.txt2img
    matrix = {"script_name": "prompt matrix", "script_args": [False, False, "positive", "comma", 0]}
    fields = {**KINDS[kind], **matrix}

    def play(count: int, composed: Any = None) -> Pictures:
        made = make(composed, **fields, prompt=tagged("", loras[:count]) + " a red circle|blue|in the rain")
        return Pictures(made.images[1:], made.infotexts[1:], made.seconds)  # the first is the grid

    play(1)
    one, two = worst(play(1), play(1, ALONE)), worst(play(2), play(2, {"method": "merge"}))
    record_property("one LoRA, two merged, dB", f"{one:.1f} {two:.1f}")
    assert one >= 50
    assert two >= 45


def test_samplers(webui: WebUI, loras: list[str], record_property: Record) -> None:
    """Every sampler of the WebUI's list: one LoRA composed equals the WebUI's own picture."""
    found: dict[str, float] = {}
    for sampler in webui.call("samplers"):
        fields = {"prompt": tagged("a red circle", loras[:1]), "sampler_name": sampler["name"]}
        own, alone = webui.txt2img(**fields), webui.txt2img(ALONE, **fields)
        assert is_composed(alone), sampler
        found[sampler["name"]] = psnr(own.image, alone.image)
        record_property(sampler["name"], found[sampler["name"]])
    assert {name: value for name, value in found.items() if value < 50} == {}


@pytest.mark.parametrize(("count", "method"), [(2, "loratorio"), (3, "loratorio"), (3, "relative")])
@pytest.mark.parametrize("fields", [
    {}, {"sampler_name": "DDIM"}, {"sampler_name": "Heun"}, {"batch_size": 2}, {"cfg_scale": 1.0},
    {"width": SIZE + 24, "height": SIZE + 8}, {"negative_prompt": "word " * 90},
    {"text": "a (red:1.3) [circle:square:0.5] AND a green field :0.7"},
], ids=str)  # fmt: skip
def test_equals_the_slow_reference(
    webui: WebUI,
    loras: list[str],
    has_reference: bool,
    fields: dict[str, Any],
    count: int,
    method: str,
    record_property: Record,
) -> None:
    if not has_reference:
        pytest.skip("tests/webui/reference_extension is not installed in this WebUI")
    fields = dict(fields)
    prompt = tagged(fields.pop("text", "a red circle"), loras[:count])
    knobs = {**TOGETHER, "method": method, "patch_size": 3, "top_k": 2 if count == 3 else 0}
    if method == "relative":
        del knobs["temperature"]
        knobs["find_styles"] = False  # the reference looks for none
    slow = webui.txt2img(
        prompt=prompt, scripts={"LoRAtorio slow reference": [{**knobs, "recentre": 0.5}]}, **fields
    )
    ours = webui.txt2img(knobs, prompt=prompt, **fields)
    assert is_composed(ours)
    record_property("dB", worst(slow, ours))
    assert worst(slow, ours) >= 45


def test_second_pass_names_its_own_loras(webui: WebUI, loras: list[str]) -> None:
    pictures = webui.txt2img(
        TOGETHER, **upscaled(webui, HIRES), prompt=tagged("a", loras[:2]), hr_prompt=tagged("a", loras[1:])
    )
    assert all(name in pictures.infotext for name in loras)


def test_unticked_leaves_no_trace(webui: WebUI, loras: list[str]) -> None:
    """Pictures from before and after composing are equal byte for byte, with LoRAs and without."""
    prompts = [PLAIN["prompt"], tagged("a red circle", loras[:1]), tagged("a red circle", loras)]
    before = [webui.txt2img(prompt=prompt) for prompt in prompts]
    for knobs in (
        TOGETHER,
        {**TOGETHER, "weight_maps": True},
        {"method": "composite"},
        {"start": 0.3, "end": 0.6},
    ):
        webui.txt2img(knobs, prompt=prompts[-1])
    after = [webui.txt2img(prompt=prompt) for prompt in prompts]
    for one, other in zip(before, after, strict=True):
        assert (one.image == other.image).all()
        assert "LoRAtorio" not in re.sub(r"Lora hashes: \"[^\"]*\"", "", other.infotext)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "Heun"])
@pytest.mark.parametrize("preset", ["paper", "balanced", "fast"])
def test_presets_stay_near_themselves_without_reuse(
    webui: WebUI, loras: list[str], preset: str, sampler: str, record_property: Record
) -> None:
    """Three LoRAs and 20 steps, four pictures, of which single ones may turn; hires fix too, whose second pass begins anew."""
    if sampler not in {each["name"] for each in webui.call("samplers")}:
        pytest.skip(f"this WebUI has no sampler {sampler}")
    fields = {
        "prompt": tagged("a red circle", loras[:3]),
        "steps": 20,
        "sampler_name": sampler,
        "batch_size": 4,
    }
    for name, more in {"": {}, "hires, ": upscaled(webui, HIRES)}.items():
        own = webui.txt2img({"preset": preset}, **fields, **more)
        whole = webui.txt2img({"preset": preset, "reuse": 1}, **fields, **more)
        assert is_composed(own, styles_may_be_found=True)
        # Equal pictures, which are infinitely near, must not make up for others.
        each = [min(99.0, psnr(one, other)) for one, other in zip(own.images, whole.images, strict=True)]
        record_property(f"{name}dB, mean and least", f"{np.mean(each):.1f} {min(each):.1f}")
        if preset == "paper":
            assert min(each) >= 90
        else:
            assert np.mean(each) >= 25
