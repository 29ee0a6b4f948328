"""The files that ship: there, small enough, readable, and right about what they claim."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from loratorio import toybox
from loratorio_lab.toybox.classifier import classify, features, probabilities

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


@pytest.mark.parametrize("element", toybox.ELEMENTS, ids=lambda e: e.name)
def test_classifier_knows_what_each_card_shows(element) -> None:
    with Image.open(toybox.thumbnail_file(element)) as picture:
        card = picture.convert("RGB")
    large = card.resize((256, 256))
    assert all(found[element.name] for found in classify([card]))
    assert probabilities([large])[0][element.name] > 0.5
    assert features([card, card]).shape == (2, 128)


def test_text_encoder_output_has_a_mean() -> None:
    """A mean of exactly zero would be 0/0 in a WebUI's "Original" emphasis."""
    pytest.importorskip("diffusers")
    from transformers import CLIPTokenizer

    from loratorio_lab.toybox.pipeline import load_text_encoder
    from loratorio_lab.train.diffusion import tokenise

    tokenizer = CLIPTokenizer.from_pretrained(str(toybox.TEXT_DIR))
    with torch.no_grad():
        state = load_text_encoder()(tokenise(tokenizer, ["", "a bear, white background"])).last_hidden_state
    assert (state.mean(dim=(1, 2)).abs() > 1e-4).all()
