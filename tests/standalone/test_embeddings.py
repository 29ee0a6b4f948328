"""Words that LoRA files bring along (``bundle_emb``): read, put into the prompt, and said where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratorio.prompt.admission import Admitted
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.embeddings import Embedding, cut_by_words
from loratorio.standalone.generate import Request, generate
from loratorio.standalone.lora_files import LoadedLora
from loratorio.standalone.lora_set import conditioner, load_loras
from loratorio.standalone.prompt import split_loras
from loratorio.standalone.request import whole
from tests import tiny

TOKEN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sdxl(tmp_path_factory.mktemp("model") / "xl"))


def vectors(model: Checkpoint, letters: str, number: int = 0) -> Tensor:
    """What the text encoder has for these letters, each a token of its own."""
    ids = model.tokenizers[number](" ".join(letters), add_special_tokens=False).input_ids
    return model.text_encoders[number].get_input_embeddings().weight[ids].clone()  # type: ignore[operator, no-any-return]


def save(folder: Path, bundled: dict[str, Tensor], name: str = "x") -> None:
    # A LoRA that adds nothing, so that the word alone makes the difference.
    lora = {
        f"{TOKEN}.lora_up.weight": torch.zeros(32, 2),
        f"{TOKEN}.lora_down.weight": torch.full((2, 32), 1e-3),
    }
    lora[f"{TOKEN}.lora_up.weight"][0, 0] = 1e-6
    save_file(
        lora | {f"bundle_emb.{key}": tensor for key, tensor in bundled.items()},
        folder / f"{name}.safetensors",
    )


def loaded(model: Checkpoint, folder: Path, prompt: str) -> Admitted[LoadedLora]:
    return load_loras(whole(Request(prompt), model), folder, model)


def conditioning(
    model: Checkpoint, folder: Path, prompt: str, mix: tuple[float, ...] = (1.0,)
) -> tuple[Tensor, Tensor | None]:
    text, _ = split_loras(prompt)
    loras = loaded(model, folder, prompt).loras
    with torch.inference_mode():
        (found,) = conditioner(model, loras, [text]).of([(text, mix)])
    return found.tokens, found.pooled


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params", "clip_l", "<zorb>"])
@pytest.mark.parametrize(
    ("prompt", "same_as"),
    [
        ("zorb", "q w"),
        ("e zorb r", "e q w r"),
        ("e, (ZORB:1.3) r", "e, (q w:1.3) r"),
        ("zorb zorb", "q w q w"),
        ("e " * 74 + "zorb r", "e " * 74 + "BREAK q w r"),
        ("zorbs xzorb", "zorbs xzorb"),
    ],
)
def test_a_word_stands_for_its_vectors(
    model: Checkpoint, tmp_path: Path, key: str, prompt: str, same_as: str
) -> None:
    save(tmp_path, {f"zorb.{key}": vectors(model, "qw")})
    found, _ = conditioning(model, tmp_path, f"{prompt} <lora:x:1>")
    expected, _ = conditioning(model, tmp_path, f"{same_as} <lora:x:1>")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_both_of_sdxls_text_encoders(xl: Checkpoint, tmp_path: Path) -> None:
    bundled = {"zorb.clip_l": vectors(xl, "qw", 0), "zorb.clip_g": vectors(xl, "qw", 1)}
    save(tmp_path, bundled)
    found, expected = (conditioning(xl, tmp_path, f"{text} <lora:x:1>") for text in ("e zorb r", "e q w r"))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bundled", "says"),
    [
        ({"clip_g": torch.ones(2, 32)}, "no vectors for one of"),
        ({"string_to_param.*": torch.ones(2, 33)}, "2×33"),
        ({"string_to_param.*": torch.ones(32)}, "32"),
        ({"string_to_param.*": torch.ones(0, 32)}, "0×32"),
        ({"string_to_param.*": torch.ones(76, 32)}, "76×32"),
        ({"string_to_param.*": torch.full((1, 32), float("nan"))}, "contains NaN or infinite numbers"),
    ],
)
def test_a_word_that_does_not_fit_is_left_out_and_said(
    model: Checkpoint, tmp_path: Path, bundled: dict[str, Tensor], says: str
) -> None:
    save(tmp_path, {f"zorb.{key}": each for key, each in bundled.items()})
    request = Request("a zorb <lora:x:1>", steps=1, width=64, height=64)
    outcome = generate(model, tmp_path, request)
    assert any("'zorb'" in note and says in note for note in outcome.notes), outcome.notes


def test_a_second_encoder_of_another_length_is_left_out(xl: Checkpoint, tmp_path: Path) -> None:
    save(tmp_path, {"zorb.clip_l": vectors(xl, "qw", 0), "zorb.clip_g": vectors(xl, "q", 1)})
    loras = loaded(xl, tmp_path, "<lora:x:1>")
    assert any("numbers of vectors for this model's text encoders differ" in note for note in loras.notes)


def test_words_are_found_whole_and_the_longest_first() -> None:
    short, long, other = (Embedding(word, (torch.ones(1, 2),)) for word in ("a-b", "a-b-c", "A-B"))
    assert list(cut_by_words("x a-b-c, a-b.", [short, long, other])) == ["x ", long, ", ", short, "."]
    assert list(cut_by_words("xa-b a-bx (", [short])) == ["xa-b a-bx ("]
    assert list(cut_by_words("", [])) == [""]


def test_a_word_is_known_where_its_lora_is_in_the_mix(model: Checkpoint, tmp_path: Path) -> None:
    save(tmp_path, {"zorb.emb_params": vectors(model, "qw")}, "x")
    save(tmp_path, {"blip.emb_params": vectors(model, "t" * 72)}, "y")
    prompt = "e zorb blip <lora:x:1> <lora:y:1>"
    for mix, same_as in (
        ((0.0, 0.0), "e zorb blip"),
        ((1.0, 0.0), "e q w blip"),
        ((0.0, 1.0), "e zorb BREAK" + " t" * 72),
        ((0.5, 0.5), "e q w" + " t" * 72),
    ):
        found, _ = conditioning(model, tmp_path, prompt, mix)
        expected, _ = conditioning(model, tmp_path, f"{same_as} <lora:x:1> <lora:y:1>", (0.0, 0.0))
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=0)


def test_a_lora_that_only_brings_a_word_counts(model: Checkpoint, tmp_path: Path) -> None:
    save(tmp_path, {"zorb.emb_params": vectors(model, "qw")})
    assert len(loaded(model, tmp_path, "<lora:x:1>").loras) == 1
    assert not loaded(model, tmp_path, "<lora:x:0>").loras
    request = Request("a zorb <lora:x:1>", steps=2, width=64, height=64)
    other = Request("a q w <lora:x:1>", steps=2, width=64, height=64)
    merge = {"method": "merge"}
    pictures = [
        generate(model, tmp_path, replace(each, settings=each.settings.with_values(merge)))
        .images[0]
        .tobytes()
        for each in (request, other)
    ]
    assert pictures[0] == pictures[1]
