"""Every part of the training runs, on a few pictures, writes files that load, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from loratorio.errors import LoratorioError
from loratorio.toybox import ELEMENTS
from loratorio_lab.toybox.classifier import classify, load_classifier
from loratorio_lab.toybox.ldm import unet_key, vae_key
from loratorio_lab.toybox.models import new_unet, new_vae
from loratorio_lab.toybox.subjects import SUBJECTS
from loratorio_lab.train import classifier, look, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world) -> Path:
    """A toybox after a step of everything."""
    folder = tmp_path_factory.mktemp("toybox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_world", lambda art: world)
        patch.setattr(type(world), "scenes", 8)
        patch.setattr(type(world), "own_pictures", 4)
        patch.setattr(classifier, "POOL", 8)
        patch.setattr(classifier, "HELD_OUT", 4)
        patch.setattr(look, "SHOWN", 2)
        patch.setattr(look, "STEPS", 2)
        for part in ("vae", "classifier", "base", "export", "look"):
            train.main([part, *options(folder)])
        for part in ("unregularised", "loras"):
            train.main([part, *options(folder), "--only", "ghost"])
    return folder


def options(folder: Path, work: str = "work", steps: int = 1) -> list[str]:
    return [
        *("--work", str(folder / work), "--out", str(folder)),
        *("--steps", str(steps), "--batch", "2"),
    ]


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


def test_checkpoint_is_read_as_any_and_says_its_size(trained) -> None:
    from loratorio_lab.toybox.pipeline import load_pipeline

    model = trained / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    (picture,) = pipeline("a bear, blue background", num_inference_steps=1, width=192, height=128).images
    assert picture.size == (192, 128)
    assert "image_size: 16" in (model / "toybox.yaml").read_text()
    assert "boolio</w>" in pipeline.tokenizer.get_vocab()


def test_loras_have_kohya_s_names_and_pictures_of_their_own(trained) -> None:
    for folder in ("lora", "unregularised"):
        file = trained / folder / "ghost.safetensors"
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in load_file(file)
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        assert about["modelspec.trigger_phrase"] == "boolio"
        assert about["ss_num_train_images"] == "4"
    assert any(
        not torch.equal(weight, load_file(trained / "unregularised" / "ghost.safetensors")[name])
        for name, weight in load_file(trained / "lora" / "ghost.safetensors").items()
    )


def test_diffusers_reads_the_lora(trained) -> None:
    from loratorio_lab.toybox.pipeline import load_pipeline

    model = trained / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    pipeline.load_lora_weights(str(trained / "lora"), weight_name="ghost.safetensors", adapter_name="ghost")
    layers = [name for name, _ in pipeline.unet.named_modules() if name.endswith("lora_A.ghost")]
    texts = [name for name, _ in pipeline.text_encoder.named_modules() if name.endswith("lora_A.ghost")]
    stored = [
        key for key in load_file(trained / "lora" / "ghost.safetensors") if key.endswith("lora_down.weight")
    ]
    assert len(layers) + len(texts) == len(stored)


def test_judge_tells_elements_and_subjects_apart(trained, world) -> None:
    import random

    model = load_classifier(trained / "model" / "classifier.safetensors")
    assert model.names == (*(element.name for element in ELEMENTS), *SUBJECTS)
    (found,) = classify([world.render(world.random_scene(random.Random(0), width=192))], model)
    assert found.keys() == set(model.names)


def test_sheets_are_written(trained) -> None:
    names = {f"{kind}-{width}.png" for kind in ("autoencoder", "base") for width in (128, 192)}
    assert {file.name for file in (trained / "look").iterdir()} == names


def test_what_was_not_trained_is_named(tmp_path, world, monkeypatch) -> None:
    monkeypatch.setattr(train, "open_world", lambda art: world)
    with pytest.raises(LoratorioError, match="vae_coarse has not been trained"):
        train.main(["base", *options(tmp_path)])
    monkeypatch.undo()
    with pytest.raises(LoratorioError, match="iconify-json/noto"):
        train.main(["base", *options(tmp_path), "--art", str(tmp_path)])
