"""The toybox in SD 1.5's widths computes what the toybox computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio.prompt.trigger_words import words_of
from loratorio_lab.toybox import widen
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.toybox.world import words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of SD 1.5's size with the words that its own has, and none of the triggers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    triggers = {element.trigger for element in toybox.ELEMENTS}
    known = [word for word in words() if word not in triggers]
    known += [",", ".", "and", *(element.name for element in toybox.ELEMENTS)]
    tokens = [f"{word}</w>" for word in dict.fromkeys(known)]
    tokens = (
        [f"token {i}" for i in range(49406 - len(tokens))] + tokens + ["<|startoftext|>", "<|endoftext|>"]
    )
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


@pytest.fixture(scope="module")
def wide(tokenizer: Path) -> widen.Wide:
    return widen.Wide(tokenizer)


@pytest.fixture(scope="module")
def small() -> Any:
    return load_pipeline()


def filled(network: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    made: Any = network.to_empty(device="cpu")
    made.load_state_dict(weights, strict=False)
    return made.eval()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 1e-4 * other.norm())


@torch.no_grad()
def test_the_unet_predicts_the_same(wide: widen.Wide, small: Any) -> None:
    unet = filled(widen.new_networks()[0], wide.unet_weights())
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 96)
    times = torch.tensor([801.0, 33.0])
    wide_text = text @ widen.repeated(96, widen.TEXT_WIDTH).T
    assert close(unet(latents, times, wide_text).sample, small.unet(latents, times, text).sample)


@torch.no_grad()
def test_the_vae_codes_and_decodes_the_same_in_sd_15s_scale(wide: widen.Wide, small: Any) -> None:
    vae = filled(widen.new_networks()[1], wide.vae_weights())
    pictures, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    own = small.vae.config.scaling_factor
    coded = vae.encode(pictures).latent_dist.mean * widen.VAE_SCALE
    assert close(coded, small.vae.encode(pictures).latent_dist.mean * own)
    assert close(vae.decode(latents / widen.VAE_SCALE).sample, small.vae.decode(latents / own).sample)


@torch.no_grad()
def test_a_word_that_stands_for_a_trigger_reads_as_it(wide: widen.Wide, small: Any) -> None:
    network = widen.new_networks()[2]
    weights = wide.text_weights()
    text = filled(network, {**weights, **{k: v for k, v in network.state_dict().items() if k not in weights}})
    for module in text.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    words_there = ["octopus", "on", "the", "left", ",", "night", "background"]
    words_here = ["oktavo", "on", "the", "left", ",", "lunara", "background"]
    here = small.tokenizer.get_vocab()

    def row(tokens: Mapping[str, int], chosen: list[str]) -> Tensor:
        own = [tokens["<|startoftext|>"], *(tokens[f"{word}</w>"] for word in chosen)]
        return torch.tensor([own + [tokens["<|endoftext|>"]] * (77 - len(own))])

    there = text(row(wide.tokens, words_there)).last_hidden_state
    expected = small.text_encoder(row(here, words_here)).last_hidden_state
    assert close(there, expected @ widen.repeated(96, widen.TEXT_WIDTH).T)


def test_a_lora_changes_the_wide_weights_as_it_changes_the_small_ones(wide: widen.Wide, small: Any) -> None:
    old = load_file(toybox.lora_file(toybox.ELEMENTS[0]))
    new = wide.lora(old)
    weights = {**small.unet.state_dict(), **small.text_encoder.state_dict()}
    checked = 0
    for layer, (name, old_shape, new_shape, maps) in wide._layers.items():
        if f"{layer}.lora_up.weight" not in old:
            continue
        before, after = (
            torch.tensordot(
                file[f"{layer}.lora_up.weight"].float().flatten(1),
                file[f"{layer}.lora_down.weight"].float(),
                dims=1,
            )
            for file in (old, new)
        )
        assert before.shape == weights[name].shape
        assert after.shape == new_shape
        expected = widen.applied(before, *maps(name, old_shape, new_shape))
        assert (after - expected).norm() < 2e-3 * expected.norm()
        checked += 1
    assert checked == len(old) // 3


@pytest.mark.parametrize("element", toybox.ELEMENTS, ids=lambda element: element.name)
def test_a_loras_name_is_its_trigger_word(element: toybox.Element) -> None:
    with safe_open(toybox.lora_file(element), "pt") as opened:
        metadata = opened.metadata()
    assert words_of(metadata) == [element.trigger]
    made = widen.with_its_name(metadata, element)
    assert words_of(made) == [element.name]
    assert made.keys() == metadata.keys()
    assert element.trigger not in str(made)


def test_a_folder_that_is_no_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoratorioError, match=r"no vocab\.json"):
        widen.vocabulary(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a</w>": 0}')
    with pytest.raises(LoratorioError, match="has no token for"):
        widen.vocabulary(tmp_path)
