"""LoRA files of every kind against the same weights merged by diffusers' and lycoris' own code."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lycoris import create_lycoris, create_lycoris_from_weights
from lycoris.wrapper import LycorisNetwork
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, LowRank
from loratorio.errors import LoratorioError
from loratorio.prompt.lora_folder import LoraFolder
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.lora_files import load_lora
from loratorio.standalone.lora_lookup import find_lora
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sd(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def model(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sdxl(tmp_path_factory.mktemp("model") / "xl"))


def run_unet(unet: nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        rows = torch.randn(2, 4, 8, 8, generator=random)
        tokens = torch.randn(2, 77, unet.config.cross_attention_dim, generator=random)
        return unet(rows, 500, tokens).sample


def run_text(encoder: nn.Module) -> Tensor:
    with torch.no_grad():
        return encoder(torch.arange(77).unsqueeze(0).remainder(60)).last_hidden_state


def routed(adapter: Adapter, module: nn.Module, run: Callable[[nn.Module], Tensor], rows: int) -> Tensor:
    bank = Bank([adapter])
    with bank.attached(dict(module.named_modules())), bank.routed([(1.0,)] * rows):
        return run(module)


def assert_same_change(ours: Tensor, theirs: Tensor, plain: Tensor, tolerance: float = 1e-4) -> None:
    """Both differ from the plain model, and from each other only by `tolerance` of the output."""
    assert (theirs - plain).norm() > 1e-2 * plain.norm()
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_kohya_against_diffusers(model: Checkpoint, folder: Path, tmp_path: Path) -> None:
    file = tiny.save_kohya(tmp_path / "k.safetensors", model.unet, model.text_encoders[0])
    ours = load_lora(file, "k", model, te=0.5, unet=0.7)
    assert all(isinstance(delta, LowRank) for each in ours.unet.deltas.values() for delta in each)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_lora_weights(str(file))
    pipe.set_adapters(["default_0"], [{"unet": 0.7, "text_encoder": 0.5}])
    assert_same_change(routed(ours.unet, model.unet, run_unet, 2), run_unet(pipe.unet), run_unet(model.unet))


def test_kohya_text_encoder_against_the_formula(model: Checkpoint, tmp_path: Path) -> None:
    """Not against diffusers 0.42, which with transformers 5 leaves out the text encoder's attention layers."""
    encoder = model.text_encoders[0]
    file = tiny.save_kohya(tmp_path / "k.safetensors", model.unet, encoder)
    tensors, merged = load_file(file), copy.deepcopy(encoder)
    for path, layer in merged.named_modules():
        key = f"lora_te_text_model_{path}".replace(".", "_")
        if f"{key}.alpha" in tensors:
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            layer.weight.data += 0.5 * tensors[f"{key}.alpha"] / len(down) * (up @ down)
    ours = load_lora(file, "k", model, te=0.5)
    assert_same_change(routed(ours.text[0], encoder, run_text, 1), run_text(merged), run_text(encoder))


@pytest.mark.parametrize("kind", ["plain", "alpha", "rslora", "dora", "patterns"])
def test_peft_against_diffusers(model: Checkpoint, tmp_path: Path, kind: str) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha={"plain": 4}.get(kind, 7),
        target_modules=["to_q", "to_v", "ff.net.0.proj", "conv1"],
        init_lora_weights=False,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        alpha_pattern={"to_v": 2} if kind == "patterns" else {},
    )
    torch.manual_seed(0)
    theirs = copy.deepcopy(model.unet)
    assert isinstance(theirs, UNet2DConditionModel)
    theirs.add_adapter(config)
    if kind == "dora":
        # PEFT starts at magnitudes that change the weight's direction alone; trained ones differ.
        for name, value in theirs.named_parameters():
            if "magnitude" in name:
                value.data.mul_(1.2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs),
        weight_name="p.safetensors",
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": list(config.target_modules)},
    )
    ours = load_lora(tmp_path / "p.safetensors", "p", model)
    assert_same_change(routed(ours.unet, model.unet, run_unet, 2), run_unet(theirs), run_unet(model.unet))


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon-tucker": {"algo": "locon", "use_tucker": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora-per-input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-full-matrix": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr-tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr-unbalanced": {"algo": "lokr", "unbalanced_factorization": True},
    "lokr-decompose-both": {"algo": "lokr", "factor": 4, "decompose_both": True},
    "lokr-unbalanced-tucker": {"algo": "lokr", "unbalanced_factorization": True, "use_tucker": True},
    "full": {"algo": "full", "train_norm": True},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft-rescaled": {"algo": "diag-oft", "rescaled": True, "constraint": 0.01},
    "boft": {"algo": "boft"},
    "boft-rescaled": {"algo": "boft", "rescaled": True, "constraint": 0.01},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_against_lycoris(model: Checkpoint, tmp_path: Path, kind: str) -> None:
    theirs = copy.deepcopy(model.unet)
    torch.manual_seed(1)
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    made = create_lycoris(theirs, 1.0, linear_dim=4, linear_alpha=2, preset="full", **LYCORIS[kind])
    made.apply_to()
    # What it would save, with random numbers where training starts at nothing.
    weights = {
        name.replace("lycoris_", "lora_unet_", 1): shaken(name, value)
        for name, value in made.state_dict().items()
    }
    file = tmp_path / "l.safetensors"
    save_file(weights, file)
    ours = load_lora(file, "l", model)

    merged = copy.deepcopy(model.unet)
    lycoris_names = {
        name.replace("lora_unet_", "lycoris_", 1): value for name, value in load_file(file).items()
    }
    if kind == "dora-per-input":
        merge_per_input(merged, lycoris_names)
    elif kind.startswith(("lokr", "ia3")):
        # The trained network itself: reading its own files again, lycoris guesses how LoKr's are factored, and cannot read (IA)³'s.
        made.load_state_dict(lycoris_names)
        merged = theirs
    else:
        # Its forward, as it trains: its merging of LoHa and LoKr has alpha/rank twice.
        network, _ = create_lycoris_from_weights(1.0, "", merged, weights_sd=lycoris_names)
        network.apply_to()
    assert_same_change(routed(ours.unet, model.unet, run_unet, 2), run_unet(merged), run_unet(model.unet))


def shaken(name: str, value: Tensor) -> Tensor:
    if name.endswith(("alpha", "on_input")):
        return value.detach().clone()
    random = torch.Generator().manual_seed(len(name))
    noise = torch.randn(value.shape, generator=random) * 0.1
    return (value.detach() * (1 + noise) + (0 if name.endswith("dora_scale") else noise)).contiguous()


def merge_per_input(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    """DoRA with magnitudes per input, as files of older versions have it; lycoris itself reads only those per output."""
    for path, layer in unet.named_modules():
        key = f"lycoris_{path}".replace(".", "_")
        if f"{key}.dora_scale" in weights:
            up, down = weights[f"{key}.lora_up.weight"], weights[f"{key}.lora_down.weight"]
            change = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape) * 2 / 4
            merged = layer.weight.data + change
            norm = merged.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (merged.ndim - 2))
            layer.weight.data = merged / norm * weights[f"{key}.dora_scale"]


def test_sdxl_both_text_encoders(xl: Checkpoint, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix in ("lora_te1_", "lora_te2_"):
        layer = f"{prefix}text_model_encoder_layers_1_self_attn_q_proj"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, tiny.WIDTH, generator=random)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(tiny.WIDTH, 2, generator=random)
    save_file(tensors, tmp_path / "t.safetensors")
    loaded = load_lora(tmp_path / "t.safetensors", "t", xl)
    assert [list(each.deltas) for each in loaded.text] == [
        ["encoder.layers.1.self_attn.q_proj"],
        ["text_model.encoder.layers.1.self_attn.q_proj"],
    ]
    assert not loaded.unet.deltas


def test_old_diffusers_names(model: Checkpoint, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{layer}.processor.to_{place}_lora.{part}.weight": torch.randn(32, 2)
        if part == "up"
        else torch.randn(2, 32)
        for place in ("q", "out")
        for part in ("up", "down")
    }
    save_file(tensors, tmp_path / "o.safetensors")
    loaded = load_lora(tmp_path / "o.safetensors", "o", model)
    assert sorted(loaded.unet.deltas) == [f"{layer}.to_out.0", f"{layer}.to_q"]


# What cannot be used, each with its sentence.


def test_for_another_architecture(xl: Checkpoint, model: Checkpoint, tmp_path: Path) -> None:
    file = tiny.save_kohya(tmp_path / "xl.safetensors", xl.unet)
    lora = load_lora(file, "forxl", model)
    with (
        pytest.raises(
            LoratorioError, match=r"LoRA forxl does not fit the layer .*: its matrices are .*×.*weight"
        ),
        Bank([lora.unet]).attached(dict(model.unet.named_modules())),
    ):
        pass


def test_for_another_architecture_in_full(xl: Checkpoint, model: Checkpoint, tmp_path: Path) -> None:
    save_file(
        {"lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.diff": torch.ones(32, 64)},
        tmp_path / "f.safetensors",
    )
    with pytest.raises(LoratorioError, match=r"LoRA f does not fit the layer .*32×32.*diff 32×64"):
        load_lora(tmp_path / "f.safetensors", "f", model)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
            "layer double_blocks_0_img_attn_proj of the unet",
        ),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "of the text encoder 2"),
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q"),
        ("bundle_emb.x.string_to_param.*", "names like bundle_emb"),
        ("model.weight", "names like model.weight"),
    ],
)
def test_layers_that_the_model_does_not_have(model: Checkpoint, tmp_path: Path, key: str, says: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file({key: torch.ones(2, 5)}, file)
    with pytest.raises(LoratorioError, match="LoRA x") as raised:
        load_lora(file, "x", model)
    assert says in str(raised.value)


def test_a_kind_that_nobody_reads(model: Checkpoint, tmp_path: Path) -> None:
    save_file({"lora_unet_conv_in.strange_a": torch.ones(2, 5)}, tmp_path / "s.safetensors")
    with pytest.raises(LoratorioError, match=r"LoRA s is of an unsupported kind: .*strange_a"):
        load_lora(tmp_path / "s.safetensors", "s", model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity(model: Checkpoint, tmp_path: Path, bad: float) -> None:
    file = tiny.save_kohya(tmp_path / "n.safetensors", model.unet)
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("up.weight"))
    tensors[key].view(-1)[3] = bad
    save_file(tensors, file)
    with pytest.raises(LoratorioError, match="LoRA n contains NaN or infinite"):
        load_lora(file, "n", model)


@pytest.mark.parametrize("size", [0, 5, 200, -100])
def test_cut_short(model: Checkpoint, tmp_path: Path, size: int) -> None:
    file = tiny.save_kohya(tmp_path / "c.safetensors", model.unet)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(LoratorioError, match=r"LoRA c cannot be read: .* damaged or incomplete"):
        load_lora(file, "c", model)


def test_header_that_lies(model: Checkpoint, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [9999], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "h.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(LoratorioError, match="LoRA h cannot be read"):
        load_lora(tmp_path / "h.safetensors", "h", model)


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ".PT"])
def test_pickles_are_never_opened(
    model: Checkpoint, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"evil{ending}").write_bytes(b"\x80\x04.")

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(LoratorioError, match="is a pickle"):
        load_lora(find_lora(LoraFolder(tmp_path), "evil")[0], "evil", model)


def test_not_found(model: Checkpoint, tmp_path: Path) -> None:
    tiny.save_kohya(tmp_path / "more" / "watercolour.safetensors", model.unet)
    assert find_lora(LoraFolder(tmp_path), "Watercolour")[0].stem == "watercolour"
    with pytest.raises(LoratorioError, match=r"LoRA watercolor is not in .* closest names are: watercolour"):
        find_lora(LoraFolder(tmp_path), "watercolor")
    with pytest.raises(LoratorioError, match="no LoRA folder"):
        LoraFolder(tmp_path / "none")
