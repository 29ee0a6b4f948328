"""Roles, pools and W-Composite's weights on the standalone host, with a model of random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.describe import describe
from loratorio.standalone.generate import Outcome, Request, generate
from tests import tiny
from tests.published import paper


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


@pytest.fixture(scope="module")
def loras(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Lora")
    for i, name in enumerate(("cat", "ink", "lcm-lora", "hats/red", "hats/blue", "hats/sd_turbo_lora")):
        tiny.save_kohya(folder / f"{name}.safetensors", model.unet, model.text_encoders[0], seed=i)
    (folder / "hats" / "broken.safetensors").write_bytes(b"not a LoRA")
    return folder


def make(model: Checkpoint, loras: Path, prompt: str, cfg: float = 3.0, **knobs: object) -> Outcome:
    settings = paper(enabled=True).with_values(knobs)
    request = Request(prompt, settings=settings, steps=4, cfg=cfg, width=64, height=64)
    return generate(model, loras, request)


def differ(first: Image.Image, second: Image.Image) -> bool:
    return not np.array_equal(np.asarray(first), np.asarray(second))


def test_a_lora_twice_is_one_at_both_strengths(model: Checkpoint, loras: Path) -> None:
    twice = make(model, loras, "a <lora:cat> <lora:ink> <lora:Cat:0.5:0.25>", method="merge")
    once = make(model, loras, "a <lora:cat:1.5:1.25> <lora:ink>", method="merge")
    assert twice.composed == ["cat", "ink"]
    assert not differ(twice.images[0], once.images[0])
    placed = make(model, loras, "a <lora:cat:at=left> <lora:cat:0.5:at=right> <lora:cat:1:at=left>")
    same = make(model, loras, "a <lora:cat:2:at=left> <lora:cat:0.5:at=right>")
    assert placed.composed == ["cat", "cat"]
    assert not differ(placed.images[0], same.images[0])
    assert differ(
        placed.images[0], make(model, loras, "a <lora:cat:2:at=left> <lora:cat:2:at=right>").images[0]
    )


def test_a_place_smaller_than_a_latent_pixel_is_said(model: Checkpoint, loras: Path) -> None:
    assert any(
        "almost no effect" in note
        for note in make(model, loras, "<lora:cat:at=0,0,.1,.1~0> <lora:ink>").notes
    )
    assert make(model, loras, "<lora:cat:at=0,0,.2,.2~0> <lora:ink>").notes == ()


def test_own_words_may_have_emphasis(model: Checkpoint, loras: Path) -> None:
    with_it = make(model, loras, "a <lora:cat:words=(hat:1.4)> <lora:ink>")
    without = make(model, loras, "a <lora:cat:words=(hat)> <lora:ink>")
    assert differ(with_it.images[0], without.images[0])


def test_only_the_texts_of_the_rows_are_encoded(model: Checkpoint, loras: Path) -> None:
    rows: list[int] = []
    hook = model.text_encoders[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        make(model, loras, "a <lora:cat:words=hat> <lora:ink:words=wig>")
    finally:
        hook.remove()
    # The base's text and the two LoRAs', each with its own words; the negative prompt for all three.
    assert sum(rows) == 3 + 3


def test_common_words_are_read_by_their_own_lora(model: Checkpoint, loras: Path, tmp_path: Path) -> None:
    """At λ = 0 each half is its own LoRA's alone, so the same text as own words makes the same picture."""
    for name, word in (("cat", "mimsy"), ("ink", "sea")):
        shutil.copy(loras / f"{name}.safetensors", tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps({"activation text": word}))

    def made(prompt: str, **knobs: object) -> Outcome:
        return make(model, tmp_path, prompt, recentre=0.0, **knobs)

    tags = "<lora:cat:at=left~0> <lora:ink:at=right~0>"
    common = made(f"mimsy, (sea:1.3) {tags}")
    own = made("<lora:cat:at=left~0:words=mimsy,> <lora:ink:at=right~0:words=, (sea:1.3)>")
    assert not differ(common.images[0], own.images[0])
    assert "cat:1 at left~0 without sea, ink:1 at right~0 without mimsy" in describe(model, common, 0)
    off = made(f"mimsy, (sea:1.3) {tags}", own_words=False)
    assert differ(off.images[0], common.images[0])
    assert "without" not in describe(model, off, 0)
    assert "LoRAtorio own words: False" in describe(model, off, 0)


def test_roles_change_the_picture(model: Checkpoint, loras: Path) -> None:
    plain = make(model, loras, "a <lora:cat> <lora:ink>")
    style = make(model, loras, "a <lora:cat> <lora:ink:1:role=style>")
    always = make(model, loras, "a <lora:cat> <lora:ink:1:role=always>")
    assert plain.composed == style.composed == ["cat", "ink"]
    assert always.composed == ["cat"]
    assert differ(plain.images[0], style.images[0])
    assert differ(plain.images[0], always.images[0])


def test_a_speed_lora_acts_on_every_row_unless_told_otherwise(model: Checkpoint, loras: Path) -> None:
    recognised = make(model, loras, "a <lora:cat> <lora:ink> <lora:lcm-lora>")
    assert recognised.composed == ["cat", "ink"]
    assert any("lcm-lora looks like a speed LoRA" in note for note in recognised.notes)
    told = make(model, loras, "a <lora:cat> <lora:ink> <lora:lcm-lora:1:role=content>")
    assert told.composed == ["cat", "ink", "lcm-lora"]
    assert not told.notes


def test_speed_loras_alone(model: Checkpoint, loras: Path) -> None:
    composed = make(model, loras, "a <lora:lcm-lora>")
    merged = make(model, loras, "a <lora:lcm-lora:1:role=content>", method="merge")
    assert not differ(composed.images[0], merged.images[0])


def test_an_unknown_role(model: Checkpoint, loras: Path) -> None:
    with pytest.raises(LoratorioError, match="role of LoRA ink"):
        make(model, loras, "a <lora:ink:1:role=styles>")


def test_a_pool_beside_a_named_lora(model: Checkpoint, loras: Path) -> None:
    outcome = make(model, loras, "a <lora:cat:0.8> <pool:hats:0.7>", pool_size=1, weight_maps=True)
    assert outcome.composed == ["cat", "blue", "red"]
    assert [lora.strength for lora in outcome.loras] == [0.8, 0.7, 0.7]
    assert any("broken" in note and "sd_turbo_lora" in note for note in outcome.notes)
    for weights in outcome.history.weights:
        assert weights.shape[0] == 3  # those that are not run at a step count by their last word
        assert (weights.float().sum(dim=0) - 1).abs().max() < 1e-2


def test_a_pool_of_everything_scored_always_is_the_named_loras_picture(
    model: Checkpoint, loras: Path
) -> None:
    # At CFG 1 nothing tells which of them the prompt calls: all stay.
    named = make(model, loras, "a <lora:blue> <lora:red>", cfg=1.0)
    pooled = make(model, loras, "a <pool:blue,red>", cfg=1.0, pool_size=2, pool_interval=1)
    pictures = [np.asarray(each.images[0]).astype(int) for each in (named, pooled)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("prompt", ["a <pool:../..>", "a <pool:nothing>"])
def test_pools_that_name_nothing(model: Checkpoint, loras: Path, prompt: str) -> None:
    with pytest.raises(LoratorioError, match="pool"):
        make(model, loras, prompt)


@pytest.mark.parametrize("method", ["cmlora", "klora", "frequency", "w_composite"])
def test_every_method_makes_a_picture_of_its_own(model: Checkpoint, loras: Path, method: str) -> None:
    assert differ(
        make(model, loras, "a cat <lora:cat> <lora:ink>", method=method).images[0],
        make(model, loras, "a cat <lora:cat> <lora:ink>", method="merge").images[0],
    )


def test_w_composite_weighs_by_the_trigger_words(model: Checkpoint, loras: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name, words in (("cat", "mimsy"), ("ink", "inkash")):
        tensors = load_file(loras / f"{name}.safetensors")
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"modelspec.trigger_phrase": words})
    tags = "<lora:cat> <lora:ink>"
    both = make(model, tmp_path, f"mimsy, inkash {tags}", method="w_composite")
    assert differ(
        both.images[0], make(model, tmp_path, f"mimsy, inkash {tags}", method="composite").images[0]
    )
    alone = make(model, tmp_path, f"nothing {tags}", method="w_composite")
    assert not differ(alone.images[0], make(model, tmp_path, f"nothing {tags}", method="composite").images[0])


def test_guidance_rescale_and_softer_patches(model: Checkpoint, loras: Path) -> None:
    plain = make(model, loras, "a <lora:cat> <lora:ink>").images[0]
    for knobs in ({"rescale": 0.7}, {"blend": "overlapping"}, {"blend": "interpolated"}, {"adaptive": True}):
        assert differ(plain, make(model, loras, "a <lora:cat> <lora:ink>", **knobs).images[0])


def test_a_lora_without_effect_takes_no_weight(model: Checkpoint, loras: Path) -> None:
    plain = make(model, loras, "a <lora:cat> <lora:ink>")
    idle = make(model, loras, "a <lora:cat> <lora:red:0> <lora:ink>")
    assert not differ(plain.images[0], idle.images[0])
    assert idle.composed == ["cat", "ink"]
    assert any("LoRA red has no effect" in note for note in idle.notes)
    none = make(model, loras, "a <lora:cat:0>")
    assert not differ(none.images[0], make(model, loras, "a").images[0])


def test_the_prompt_chooses_from_the_toyboxs_pool() -> None:
    """Two of seventeen, by their trigger words: the picture of naming them, pixel for pixel."""
    checkpoint = load_checkpoint(toybox.CHECKPOINT)

    def made(tags: str) -> Outcome:
        request = Request(f"boolio, lunara background {tags}", settings=paper(enabled=True), steps=3, cfg=3.0)
        return generate(checkpoint, toybox.LORA_DIR, replace(request, width=64, height=64, seed=2))

    pooled, named = made("<pool:*>"), made("<lora:ghost> <lora:night>")
    assert (np.asarray(pooled.images[0]) == np.asarray(named.images[0])).all()
    assert pooled.composed == ["ghost", "night"]
    assert pooled.notes == (
        "Chosen from the pool by their trigger words: ghost (boolio), night (lunara). 15 with other trigger words were not used.",
    )
