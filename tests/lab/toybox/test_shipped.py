"""The files that ship: there, small enough, readable, and right about what they claim."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from loratorio import toybox
from loratorio_lab.toybox.classifier import classify, features, probabilities
from loratorio_lab.toybox.world import random_beside, random_elements, random_scene, render, render_beside

MEGABYTE = 1_000_000


def test_all_is_there_and_below_25_megabytes() -> None:
    assert toybox.CHECKPOINT.exists()
    assert toybox.CONFIG.exists()
    trained = [*toybox.FOLDER.rglob("*.safetensors"), *toybox.THUMBNAIL_DIR.glob("*.png")]
    assert sum(file.stat().st_size for file in trained) <= 25 * MEGABYTE
    for element in toybox.ELEMENTS:
        assert toybox.lora_file(element).exists()
        with Image.open(toybox.thumbnail_file(element)) as picture:
            assert picture.size == (128, 128)


@pytest.mark.parametrize("element", toybox.ELEMENTS, ids=lambda e: e.name)
def test_loras_are_finite_and_reach_both_networks(element) -> None:
    weights = load_file(toybox.lora_file(element))
    assert all(torch.isfinite(value.float()).all() for value in weights.values())
    assert any(key.startswith("lora_unet_") for key in weights)
    assert any(key.startswith("lora_te_text_model_") for key in weights)
    with safe_open(toybox.lora_file(element), "pt") as opened:
        assert opened.metadata()["modelspec.trigger_phrase"] == element.trigger


def test_classifier_knows_rendered_scenes() -> None:
    rng = random.Random(77)
    scenes = [random_scene(rng, *random_elements(rng, i % 6)) for i in range(60)]
    found = classify([render(scene) for scene in scenes])
    right = [
        {name for name, there in row.items() if there} == set(s.elements())
        for row, s in zip(found, scenes, strict=True)
    ]
    assert np.mean(right) >= 0.95


def test_classifier_knows_each_half_of_two_figures_beside_each_other() -> None:
    rng = random.Random(7)
    for left, right in permutations(["robot", "cat", "alien"], 2):
        for more in ([], ["night"], ["checks"], ["rays"], ["ink"], ["ember"]):
            scenes = random_beside(rng, left, right, *more)
            assert scenes[0].plain_colour == scenes[1].plain_colour
            picture = render_beside(*scenes)
            assert picture.shape == (64, 128, 3)
            halves = classify(np.split(picture, 2, axis=1))
            for found, scene in zip(halves, scenes, strict=True):
                assert {name for name, there in found.items() if there} == set(scene.elements())


def test_classifier_takes_pil_arrays_and_other_sizes() -> None:
    picture = render(random_scene(random.Random(1), "ink"))
    large = Image.fromarray(picture).resize((128, 128))
    assert probabilities([large])[0]["ink"] > 0.5
    assert features(np.stack([picture, picture])).shape == (2, 128)


def test_text_encoder_output_has_a_mean() -> None:
    """A mean of exactly zero would be 0/0 in a WebUI's "Original" emphasis."""
    pytest.importorskip("diffusers")
    from transformers import CLIPTokenizer

    from loratorio_lab.toybox.pipeline import load_text_encoder
    from loratorio_lab.train.diffusion import tokenise

    tokenizer = CLIPTokenizer.from_pretrained(str(toybox.TEXT_DIR))
    with torch.no_grad():
        state = load_text_encoder()(
            tokenise(tokenizer, ["", "a doll in red, white background"])
        ).last_hidden_state
    assert (state.mean(dim=(1, 2)).abs() > 1e-4).all()
