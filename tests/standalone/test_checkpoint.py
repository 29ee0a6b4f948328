"""Checkpoints in every layout give the same model; what cannot be used is refused with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import load_checkpoint
from loratorio_lab.toybox.ldm import TEXT_NAME, config_yaml, to_ldm, unet_key, vae_key
from loratorio_lab.toybox.models import new_unet, new_vae
from loratorio_lab.toybox.world import World
from loratorio_lab.train.base import new_base
from loratorio_lab.train.diffusion import new_schedule
from tests import tiny


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = {"sd": tiny.save_sd, "sdxl": tiny.save_sdxl}[request.param]
    return save(tmp_path_factory.mktemp("model") / request.param)


def single_file(folder: Path, out: Path) -> Path:
    """A diffusers folder as one file with the parts' names in front."""
    tensors = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for file in (folder / part).glob("*.safetensors"):
            tensors |= {f"{part}.{key}": value for key, value in load_file(file).items()}
    save_file(tensors, out)
    return out


def only_configuration(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


def test_one_file_in_diffusers_layout(folder: Path, tmp_path: Path) -> None:
    file = single_file(folder, tmp_path / "m.safetensors")
    only_configuration(folder, tmp_path / "m")  # beside the file, under its name
    one, other = load_checkpoint(file), load_checkpoint(folder)
    assert one.is_sdxl == other.is_sdxl
    assert one.native_size == other.native_size == 64
    assert one.schedule == other.schedule
    for a, b in zip(
        (one.unet, one.vae, *one.text_encoders), (other.unet, other.vae, *other.text_encoders), strict=True
    ):
        weights = b.state_dict()
        assert weights.keys() == a.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in a.state_dict().items())


@pytest.fixture(scope="module")
def ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toybox's shapes with random weights, in the layout of SD 1, with its .yaml and text folder beside it."""
    out = tmp_path_factory.mktemp("ldm")
    torch.manual_seed(0)
    _, text, _ = new_base(World(), out / TEXT_NAME, "cpu")
    unet, vae = new_unet(), new_vae()
    weights = to_ldm(unet.state_dict(), vae.state_dict(), text.state_dict(), new_schedule().alphas_cumprod)
    save_file(weights, out / "box.safetensors")
    (out / "box.yaml").write_text(config_yaml(0.5, 64))
    torch.save((unet.state_dict(), vae.state_dict(), text.state_dict()), out / "expected.pt")
    return out


def test_one_file_with_its_yaml(ldm: Path) -> None:
    loaded = load_checkpoint(ldm / "box.safetensors")
    expected = torch.load(ldm / "expected.pt", weights_only=True)
    for module, weights in zip((loaded.unet, loaded.vae, loaded.text_encoders[0]), expected, strict=True):
        got = module.state_dict()
        assert all(
            torch.equal(got[name], value.half().float()) for name, value in weights.items() if name in got
        )
        assert got.keys() == weights.keys()
    assert loaded.native_size == 64
    assert loaded.vae.config.scaling_factor == 0.5


OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CLIPTextModelWithProjection under open_clip's names: q, k and v in one matrix."""
    made = {
        "positional_embedding": text["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": text["text_model.embeddings.token_embedding.weight"],
        "text_projection": text["text_projection.weight"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        made[f"ln_final.{kind}"] = text[f"text_model.final_layer_norm.{kind}"]
        for number in range(2):
            theirs, ours = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
            for name, other in OPEN_CLIP.items():
                made[f"{ours}.{other}.{kind}"] = text[f"{theirs}.{name}.{kind}"]
            parts = [text[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            made[f"{ours}.attn.in_proj_{kind}"] = torch.cat(parts)
    return made


def test_sdxl_in_its_original_layout(tmp_path: Path) -> None:
    """One file as Stability AI laid SDXL out: sgm's names, the second text encoder by open_clip."""
    folder = tiny.save_sdxl(tmp_path / "folder", layers_per_block=2)
    parts = {
        part: next(iter(load_file(file) for file in (folder / part).glob("*.safetensors")))
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    sizes = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    tensors = {}
    for key, value in parts["unet"].items():
        module, kind = key.rsplit(".", 1)
        name = f"{sizes[module]}.{kind}" if module in sizes else unet_key(key)
        tensors[f"model.diffusion_model.{name}"] = value
    for key, value in parts["vae"].items():
        name = vae_key(key, levels=4)
        square = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if square else value
    for key, value in parts["text_encoder"].items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"conditioner.embedders.0.transformer.{name}"] = value
    tensors |= {
        f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(parts["text_encoder_2"]).items()
    }
    save_file(tensors, tmp_path / "xl.safetensors")
    loaded = load_checkpoint(tmp_path / "xl.safetensors", only_configuration(folder, tmp_path / "config"))
    expected = load_checkpoint(folder)
    for one, other in zip(
        (loaded.unet, loaded.vae, *loaded.text_encoders),
        (expected.unet, expected.vae, *expected.text_encoders),
        strict=True,
    ):
        weights = other.state_dict()
        assert one.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def test_v_prediction_is_read_from_the_yaml(ldm: Path, tmp_path: Path) -> None:
    yaml = ldm / "v.yaml"
    yaml.write_text(config_yaml(0.5, 64).replace("    timesteps:", "    parameterization: v\n    timesteps:"))
    assert load_checkpoint(ldm / "box.safetensors", yaml).prediction_type == "v_prediction"


def test_dtype(folder: Path) -> None:
    assert load_checkpoint(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_checkpoint_that_lacks_weights(ldm: Path, tmp_path: Path) -> None:
    tensors = load_file(ldm / "box.safetensors")
    tensors.pop("model.diffusion_model.out.2.weight")
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(LoratorioError, match=r"cut\.safetensors"):
        load_checkpoint(tmp_path / "cut.safetensors", ldm / "box.yaml")


def test_a_checkpoint_without_configuration_and_network(
    ldm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ldm / "box.safetensors", tmp_path / "alone.safetensors")

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(LoratorioError, match=r"contains only weights.*--config"):
        load_checkpoint(tmp_path / "alone.safetensors")


def test_not_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(LoratorioError, match="is a pickle"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(LoratorioError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(LoratorioError, match="does not contain a Stable Diffusion UNet"):
        load_checkpoint(tmp_path / "lora.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(LoratorioError, match="damaged or incomplete"):
        load_checkpoint(tmp_path / "junk.safetensors")
    with pytest.raises(LoratorioError, match=r"without model_index\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(LoratorioError, match="is a FluxPipeline"):
        load_checkpoint(tmp_path)


def test_a_folder_with_pickled_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = only_configuration(folder, tmp_path / "pickled")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (copy / part).is_dir():
            (copy / part / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
            (copy / part / "pytorch_model.bin").write_bytes(b"\x80\x04.")

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(torch, "load", opened)
    with pytest.raises(LoratorioError, match="cannot be loaded as a diffusers model"):
        load_checkpoint(copy)
