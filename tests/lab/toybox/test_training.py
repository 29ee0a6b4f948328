"""Every part of the training runs, on a few pictures, and writes files that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from loratorio_lab import worlds
from loratorio_lab.toybox.ldm import unet_key, vae_key
from loratorio_lab.toybox.models import new_unet, new_vae
from loratorio_lab.train import classifier, loras, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A toybox after one step of everything."""
    folder = tmp_path_factory.mktemp("toybox")
    patch = pytest.MonkeyPatch()
    patch.setattr(worlds.Dolls, "scenes", 8)
    patch.setattr(worlds.Dolls, "own_pictures", 4)
    patch.setattr(loras, "SCENES", 4)
    patch.setattr(classifier, "POOL", 8)
    patch.setattr(classifier, "HELD_OUT", 4)
    common = ["--work", str(folder / "work"), "--out", str(folder), "--steps", "1", "--batch", "2"]
    for part in ("vae", "classifier", "base", "export"):
        train.main([part, *common])
    for part in ("unregularised", "loras"):
        train.main([part, *common, "--only", "cat", "--unregularised", str(folder / "lora_unregularised")])
    patch.undo()
    return folder


def test_names_are_ldm_s_and_distinct() -> None:
    unet = [unet_key(key) for key in new_unet().state_dict()]
    assert len(set(unet)) == len(unet)
    assert {
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "middle_block.1.norm.weight",
        "out.2.bias",
    } <= set(unet)
    assert "output_blocks.2.1.conv.weight" in unet
    vae = [vae_key(key, 4) for key in new_vae().state_dict()]
    assert len(set(vae)) == len(vae)
    assert {"encoder.mid.attn_1.q.weight", "decoder.up.3.block.0.conv1.weight", "quant_conv.weight"} <= set(
        vae
    )


def test_checkpoint_reads_back_as_the_same_networks(trained) -> None:
    from loratorio_lab.toybox.pipeline import load_pipeline

    model = trained / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    state = torch.load(trained / "work" / "base.pt", weights_only=True)["average"]
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, state[f"unet.{key}"].half().float())
    for key, value in pipeline.text_encoder.state_dict().items():
        torch.testing.assert_close(value, state[f"text.{key}"].half().float())
    vae = torch.load(trained / "work" / "vae_fine.pt", weights_only=True)["average"]
    for key, value in pipeline.vae.state_dict().items():
        torch.testing.assert_close(value, vae[key].half().float())
    pictures = pipeline("a doll", num_inference_steps=2, height=64, width=64).images
    assert pictures[0].size == (64, 64)


def test_lora_has_kohya_s_names_and_says_its_trigger(trained) -> None:
    file = trained / "lora" / "cat.safetensors"
    weights = load_file(file)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in weights
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in weights
    assert "lora_unet_mid_block_resnets_0_conv1.alpha" in weights
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.trigger_phrase"] == "mimsy"


def test_diffusers_reads_the_lora(trained) -> None:
    from loratorio_lab.toybox.pipeline import load_pipeline

    model = trained / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    pipeline.load_lora_weights(str(trained / "lora"), weight_name="cat.safetensors", adapter_name="cat")
    layers = [name for name, _ in pipeline.unet.named_modules() if name.endswith("lora_A.cat")]
    texts = [name for name, _ in pipeline.text_encoder.named_modules() if name.endswith("lora_A.cat")]
    stored = [
        key for key in load_file(trained / "lora" / "cat.safetensors") if key.endswith("lora_down.weight")
    ]
    assert len(layers) + len(texts) == len(stored)


def test_a_stopped_run_goes_on(trained) -> None:
    before = torch.load(trained / "work" / "vae_coarse.pt", weights_only=True)["step"]
    train.main(
        [
            "vae_coarse",
            "--work",
            str(trained / "work"),
            "--out",
            str(trained),
            "--steps",
            str(before + 1),
            "--batch",
            "2",
        ]
    )
    assert torch.load(trained / "work" / "vae_coarse.pt", weights_only=True)["step"] == before + 1
