"""The many spellings of one LoRA: where alpha stands or does not count, DoRA's magnitudes, OFT, names of adapters and of parts.

Each against the formula in float64, with numbers that were drawn for the test.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft as peft_library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratorio.adapters.delta import fit_all
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.lora_files import LoadedLora, load_lora
from tests import tiny
from tests.lora_kinds import formula, weights_of
from tests.standalone.test_lora_strengths import (
    CONV,
    LINEAR,
    NAMINGS,
    NORM,
    assert_equal,
    change_of,
    kohya,
    layer_of,
    peft,
    read,
)

ZERO = torch.zeros(32, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sdxl(tmp_path_factory.mktemp("model") / "xl"))


def weight_of(model: Checkpoint, path: str) -> Tensor:
    weight: Tensor = layer_of(model, path).weight  # type: ignore[assignment]
    return weight.detach()


def with_header(
    model: Checkpoint, tensors: dict[str, Tensor], header: dict[str, str], tmp_path: Path
) -> LoadedLora:
    file = tmp_path / "x.safetensors"
    save_file({key: each.contiguous() for key, each in tensors.items()}, file, header)
    return load_lora(file, "x", model)


# Alpha where it does not count.

ODD_ALPHAS = {
    "infinite, as LyCORIS saves its 'full' in half precision": torch.tensor(100_000.0).half(),
    "not a number": torch.tensor(math.nan),
    "0": torch.tensor(0.0),
    "3": torch.tensor(3.0),
    "four": torch.ones(4),
    "none": torch.ones(0),
}


@pytest.mark.parametrize("alpha", ODD_ALPHAS)
@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize(
    "kind", ["lokr-full", "lokr-full-dora", "diff", "diff-dora", "ia3", "ia3-input", "oft_diag"]
)
def test_alpha_is_not_looked_at_where_it_does_not_count(
    model: Checkpoint, tmp_path: Path, alpha: str, path: str, kind: str
) -> None:
    before = weight_of(model, path).double()
    own, expected = whole(kind, before)
    loaded = read(model, kohya(path, {**own, "alpha": ODD_ALPHAS[alpha]}), tmp_path)
    assert_equal(change_of(loaded, model, path), expected)
    assert not loaded.notes


def whole(kind: str, before: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors of a kind without a rank, and what they add."""
    shape = before.shape
    base = kind.removesuffix("-dora")
    if base == "lokr-full":
        own = {"lokr_w1": torch.randn(4, 8), "lokr_w2": torch.randn(8, shape[1] // 8, *shape[2:])}
        first = own["lokr_w1"].double().reshape(4, 8, *[1] * len(shape[2:]))
        change = torch.kron(first, own["lokr_w2"].double())
    elif base == "diff":
        own = {"diff": torch.randn(shape)}
        change = own["diff"].double()
    elif base == "oft_diag":
        own = {"oft_diag": torch.linalg.qr(torch.randn(8, 4, 4))[0].contiguous()}
        turned = torch.block_diag(*own["oft_diag"].double()).T @ before.flatten(1)
        change = turned.reshape(shape) - before
    else:
        side = 1 if base == "ia3-input" else 0
        factors = torch.randn(shape[side])
        kept = factors if len(shape) == 2 else factors.reshape(1, -1, 1, 1)
        own = {"weight": kept, "on_input": torch.tensor(side)}
        places = [-1 if axis == side else 1 for axis in range(len(shape))]
        change = before * factors.double().reshape(places)
    if kind.endswith("-dora"):
        own["dora_scale"] = torch.rand(len(before), *[1] * (len(shape) - 1)) + 0.5
        merged = before + change
        norm = merged.flatten(1).norm(dim=1).reshape(own["dora_scale"].shape)
        change = merged / norm * own["dora_scale"].double() - before
    return own, change


@pytest.mark.parametrize("alpha", ODD_ALPHAS)
@pytest.mark.parametrize("tails", [("w_norm", "b_norm"), ("diff", "diff_b")])
def test_alpha_beside_a_norm(model: Checkpoint, tmp_path: Path, alpha: str, tails: tuple[str, str]) -> None:
    own = {tail: torch.randn(32) for tail in tails}
    loaded = read(model, kohya(NORM, {**own, "alpha": ODD_ALPHAS[alpha]}), tmp_path)
    fitted = fit_all(loaded.unet.deltas[NORM], layer_of(model, NORM))
    assert fitted.dense is not None
    torch.testing.assert_close(fitted.dense.weight, own[tails[0]])
    torch.testing.assert_close(fitted.dense.bias, own[tails[1]])
    assert not loaded.notes


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr-one-factored"])
def test_an_infinite_alpha_that_counts_is_a_sentence(model: Checkpoint, tmp_path: Path, kind: str) -> None:
    own = {**weights_of(kind, (32, 32), 4, None, torch.float32), "alpha": torch.tensor(math.inf)}
    with pytest.raises(LoratorioError, match="alpha"):
        read(model, kohya(LINEAR, own), tmp_path)


@pytest.mark.parametrize("dim", [3, 4, 7])
@pytest.mark.parametrize(
    ("module_of", "more"),
    [
        *((LokrModule, {"full_matrix": True}), (LokrModule, {"factor": 4}), (LokrModule, {"factor": 2})),
        *((GLoRAModule, {}), (LohaModule, {}), (LoConModule, {})),
    ],
)
def test_lycoris_rank_stabilised(
    model: Checkpoint, tmp_path: Path, module_of: type[Any], more: dict[str, Any], dim: int
) -> None:
    """As LyCORIS trains in kohya's scripts with rs_lora; its own reader takes whole LoKr and GLoRA at 1/√rank of that."""
    layer = copy.deepcopy(layer_of(model, LINEAR))
    module = module_of("to_q", layer, 1.0, dim, 2, rs_lora=True, **more)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
        rows = torch.randn(5, 32)
        before = layer(rows)
        module.apply_to()
        theirs = (layer(rows) - before).double()
    own = {tail: value.detach() for tail, value in module.state_dict().items()}
    header = {"ss_network_args": json.dumps({**more, "rs_lora": "True"}), "ss_network_dim": str(dim)}
    loaded = with_header(model, kohya(LINEAR, own), header, tmp_path)
    assert_equal(rows.double() @ change_of(loaded, model, LINEAR).T, theirs)
    if "full_matrix" in more:
        # In half precision a large alpha is infinite; then the header's rank counts.
        own["alpha"] = torch.tensor(math.inf)
        loaded = with_header(model, kohya(LINEAR, own), header, tmp_path)
        assert_equal(rows.double() @ change_of(loaded, model, LINEAR).T, theirs)


# Alpha in the header, and in a configuration beside the file.

HEADERS: dict[str, Callable[[float, int], dict[str, str]]] = {
    "flat": lambda alpha, rank: {"lora_alpha": str(alpha), "r": str(rank)},
    "flat, alpha alone": lambda alpha, rank: {"lora_alpha": str(alpha)},
    "flat, with its part": lambda alpha, rank: {"unet.lora_alpha": str(alpha), "unet.r": str(rank)},
    "flat, network_alpha": lambda alpha, rank: {"network_alpha": str(alpha)},
    "flat, alpha and rank": lambda alpha, rank: {"alpha": str(alpha), "rank": str(rank)},
    "flat, with another part's": lambda alpha, rank: {
        "unet.lora_alpha": str(alpha),
        "text_encoder.lora_alpha": "77",
        "lora_alpha": "88",
    },
    "JSON": lambda alpha, rank: {"lora_adapter_metadata": json.dumps({"lora_alpha": alpha, "r": rank})},
    "JSON, with its part": lambda alpha, rank: {
        "lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha, "unet.r": rank})
    },
    "a pattern": lambda alpha, rank: {"lora_alpha": "99", "alpha_pattern": json.dumps({"attn1.to_q": alpha})},
}
PEFT_LIKE = {
    "PEFT's": peft,
    "one model": lambda path, own: peft(path, own, "base_model.model."),
    "without a part": lambda path, own: peft(path, own, ""),
    "ComfyUI's": lambda path, own: peft(path, own, "diffusion_model."),
    "kohya's": kohya,
    "before PEFT": NAMINGS["diffusers' of before PEFT"],
}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    spelling=st.sampled_from(sorted(HEADERS)),
    naming=st.sampled_from(sorted(PEFT_LIKE)),
    alpha=st.floats(0.125, 64, width=32),
    rank=st.integers(1, 9),
    rslora=st.sampled_from([None, "True", "true", "False"]),
)
def test_alpha_in_the_header(
    model: Checkpoint, tmp_path: Path, spelling: str, naming: str, alpha: float, rank: int, rslora: str | None
) -> None:
    header = HEADERS[spelling](alpha, rank)
    if rslora is not None and "lora_adapter_metadata" not in header:
        header["use_rslora"] = rslora
    stabilised = header.get("use_rslora", "").lower() == "true"
    own = weights_of("lora", (32, 32), rank, None, torch.float32)
    loaded = with_header(model, PEFT_LIKE[naming](LINEAR, own), header, tmp_path)
    strength = alpha / (rank**0.5 if stabilised else rank)
    assert_equal(change_of(loaded, model, LINEAR), strength * formula(own, ZERO))
    # What a layer's own tensor says is nearer.
    told = {**own, "alpha": torch.tensor(3.0)}
    loaded = with_header(model, PEFT_LIKE[naming](LINEAR, told), header, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(told, ZERO))


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-full", "lokr-one-factored"])
@pytest.mark.parametrize("place", ["header", "beside"])
def test_alpha_of_factors_beside_the_tensors(
    model: Checkpoint, tmp_path: Path, kind: str, place: str
) -> None:
    own = weights_of(kind, (32, 32), 4, None, torch.float32)
    values = {"alpha": 6, "r": 4}
    header = {key: str(value) for key, value in values.items()} if place == "header" else {}
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    loaded = with_header(model, NAMINGS["dotted"](LINEAR, own), header, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), 6 / 4 * formula(own, ZERO))


def test_kohyas_header_is_not_an_alpha(model: Checkpoint, tmp_path: Path) -> None:
    """Converted files keep it, and have alpha in their matrices."""
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    header = {"ss_network_alpha": "1.0", "ss_network_dim": "4", "modelspec.title": "x", "format": "pt"}
    loaded = with_header(model, peft(LINEAR, own), header, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, ZERO))


def test_the_configuration_beside_the_only_file(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 4}))
    alone = read(model, peft(LINEAR, own), tmp_path, "my-style")
    assert_equal(change_of(alone, model, LINEAR), 4 * formula(own, ZERO))
    assert not alone.notes
    # Beside another it may be either's.
    second = read(model, peft(LINEAR, own), tmp_path, "second")
    assert_equal(change_of(second, model, LINEAR), formula(own, ZERO))
    (note,) = second.notes
    assert "adapter_config.json next to LoRA second was not used" in note
    # Where each layer has its alpha, it makes no difference.
    told = read(model, peft(LINEAR, {**own, "alpha": torch.tensor(2.0)}), tmp_path, "third")
    assert not told.notes
    # It is adapter_model's where there is one.
    read(model, peft(LINEAR, own), tmp_path, "adapter_model")
    assert not read(model, peft(LINEAR, own), tmp_path, "second").notes


# DoRA's magnitudes.

MAGNITUDES = (
    *("magnitude", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    *(
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.my_style",
        "lora_magnitude_vector.default.weight",
    ),
)


@pytest.mark.parametrize("tail", MAGNITUDES)
@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize(
    "naming",
    ["kohya's, LDM layers", "lycoris_", "ComfyUI's, in full", "dotted", "PEFT's", "PEFT's, one model"],
)
def test_magnitudes_under_every_name(
    model: Checkpoint, tmp_path: Path, tail: str, path: str, naming: str
) -> None:
    before = weight_of(model, path)
    own = weights_of("lora-dora", tuple(before.shape), 3, 2.0, torch.float32, seed=len(tail))
    tensors = NAMINGS[naming](path, {key: each for key, each in own.items() if key != "dora_scale"})
    layer = next(iter(tensors)).rpartition(".lora_")[0]
    tensors[f"{layer}.{tail}"] = own["dora_scale"].flatten()
    loaded = read(model, tensors, tmp_path)
    assert_equal(change_of(loaded, model, path), formula(own, before))
    assert not loaded.notes


@pytest.mark.parametrize("shape", [(), (1,), (31,), (64,), (32, 32)])
@pytest.mark.parametrize("tail", ["magnitude", "dora_scale"])
def test_magnitudes_of_another_layer_are_a_sentence(
    model: Checkpoint, tmp_path: Path, shape: tuple[int, ...], tail: str
) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    with pytest.raises(LoratorioError, match="does not fit the layer"):
        read(model, kohya(LINEAR, {**own, tail: torch.ones(shape)}), tmp_path)


# OFT.


@pytest.mark.parametrize("prefix", ["oft_unet_", "lora_unet_", "lycoris_", "unet.", "diffusion_model."])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("path", [LINEAR, CONV])
@pytest.mark.parametrize("alpha", [None, 0.01, 10.0])
def test_oft_of_any_number_of_blocks(
    model: Checkpoint, tmp_path: Path, prefix: str, count: int, path: str, alpha: float | None
) -> None:
    before = weight_of(model, path)
    blocks = torch.randn(count, 32 // count, 32 // count) * 0.3
    own = {"oft_blocks": blocks, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}
    named = (
        {f"{prefix}{path}.{tail}": each for tail, each in own.items()}
        if prefix.endswith(".")
        else kohya(path, own, prefix)
    )
    loaded = read(model, named, tmp_path)
    assert_equal(change_of(loaded, model, path), formula(own, before))
    assert not loaded.notes


@pytest.mark.parametrize("shape", [(4, 7, 7), (3, 8, 8), (8, 8), (4, 8, 4), (1, 4, 7, 7)])
@pytest.mark.parametrize("tail", ["oft_blocks", "oft_diag"])
def test_blocks_of_another_layer_are_a_sentence(
    model: Checkpoint, tmp_path: Path, shape: tuple[int, ...], tail: str
) -> None:
    with pytest.raises(LoratorioError, match="does not fit the layer"):
        read(model, kohya(LINEAR, {tail: torch.randn(shape)}), tmp_path)


# Names of adapters and of parts.


@pytest.mark.parametrize("adapter", ["default", "my_style", "0", "lora_A", "Größe", "a-b c"])
@pytest.mark.parametrize(
    "prefix", ["unet.", "base_model.model.", "unet.base_model.model.", "base_model.model.unet.", ""]
)
@pytest.mark.parametrize("kind", ["lora", "lora-dora", "loha", "lokr"])
def test_adapters_of_any_name_under_every_prefix(
    model: Checkpoint, tmp_path: Path, adapter: str, prefix: str, kind: str
) -> None:
    before = weight_of(model, LINEAR)
    own = weights_of(kind, (32, 32), 3, None, torch.float32)
    named = {
        key.removesuffix(".weight") + f".{adapter}" + (".weight" if key.endswith(".weight") else ""): each
        for key, each in peft(LINEAR, own, prefix).items()
    }
    loaded = read(model, named, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, before))
    assert not loaded.notes


def test_several_adapters_in_one_file_are_a_sentence(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 3, None, torch.float32)
    tensors = {
        key.replace(".weight", f".{adapter}.weight"): each.clone()
        for adapter in ("one", "two")
        for key, each in peft(LINEAR, own).items()
    }
    with pytest.raises(LoratorioError, match="several adapters"):
        read(model, tensors, tmp_path)
    # And one layer under two prefixes that mean the same, of which one would be lost.
    with pytest.raises(LoratorioError, match="several adapters"):
        read(model, kohya(LINEAR, own) | kohya(LINEAR, copy.deepcopy(own), "lycoris_"), tmp_path)


TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


def text_change(loaded: LoadedLora, model: Checkpoint, number: int) -> Tensor:
    ((path, deltas),) = loaded.text[number].deltas.items()
    assert path.endswith("encoder.layers.1.self_attn.q_proj")
    fitted = fit_all(deltas, model.text_encoders[number].get_submodule(path))
    assert fitted.low_rank is not None
    return fitted.low_rank.dense().double()


@pytest.mark.parametrize(
    ("prefix", "number"),
    [
        *(("text_encoders.clip_l.transformer.", 0), ("text_encoders.clip_l.", 0), ("clip_l.transformer.", 0)),
        *(("text_encoders.clip_g.transformer.", 1), ("text_encoder_2.base_model.model.", 1)),
        *(("base_model.model.text_encoder.", 0), ("base_model.model.text_encoder_2.", 1)),
    ],
)
@pytest.mark.parametrize("kohyas", [False, True])
def test_text_encoders_under_every_prefix(
    xl: Checkpoint, tmp_path: Path, prefix: str, number: int, kohyas: bool
) -> None:
    side = (16, 32)[number]
    own = weights_of("lora", (side, side), 3, 2.0, torch.float32)
    tensors = (
        {f"{prefix}{TEXT}.{tail}": each for tail, each in own.items()} if kohyas else peft(TEXT, own, prefix)
    )
    loaded = read(xl, tensors, tmp_path)
    assert_equal(text_change(loaded, xl, number), formula(own, torch.zeros(side, side)))
    assert not loaded.text[1 - number].deltas
    assert not loaded.unet.deltas
    assert not loaded.notes


@pytest.mark.parametrize("number", [0, 1])
def test_pefts_folder_of_a_text_encoder(xl: Checkpoint, tmp_path: Path, number: int) -> None:
    wrapped = peft_library.get_peft_model(
        copy.deepcopy(xl.text_encoders[number]),
        peft_library.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path)
    loaded = load_lora(tmp_path / "adapter_model.safetensors", "te", xl)
    assert not loaded.unet.deltas
    assert not loaded.notes
    assert len(loaded.text[number].deltas) == 2
    layers = dict(wrapped.base_model.model.named_modules())
    for path, deltas in loaded.text[number].deltas.items():
        fitted = fit_all(deltas, xl.text_encoders[number].get_submodule(path))
        assert fitted.low_rank is not None
        theirs = layers[path].get_delta_weight("default").detach().double()
        assert_equal(fitted.low_rank.dense().double(), theirs)


def test_a_text_encoders_folder_by_its_shape(xl: Checkpoint, model: Checkpoint, tmp_path: Path) -> None:
    """Without a class in the configuration: the encoder whose layers have these sides."""
    wide = Checkpoint(**{**vars(xl), "text_encoders": (xl.text_encoders[0], _widened(xl.text_encoders[1]))})
    own = weights_of("lora", (48, 48), 3, 2.0, torch.float32)
    loaded = read(wide, peft(TEXT, own, "base_model.model."), tmp_path)
    assert_equal(text_change(loaded, wide, 1), formula(own, torch.zeros(48, 48)))


def _widened(encoder: nn.Module) -> nn.Module:
    wide = copy.deepcopy(encoder)
    attention = wide.get_submodule("text_model.encoder.layers.1.self_attn")
    attention.q_proj = nn.Linear(48, 48)
    return wide


@pytest.mark.parametrize("order", [1, -1])
def test_a_wrong_models_weights_are_named(model: Checkpoint, tmp_path: Path, order: int) -> None:
    own = weights_of("lora", (5, 3), 2, 1.0, torch.float32)
    tensors = kohya("double_blocks.0.img_attn.proj", dict(list(own.items())[::order]))
    with pytest.raises(LoratorioError) as told:
        read(model, tensors, tmp_path)
    assert "lora_down.weight 2×3" in str(told.value)
    assert "lora_up.weight 5×2" in str(told.value)
    assert "one number" not in str(told.value)
    assert "alpha" not in str(told.value)


def test_what_peft_itself_saves_of_another_adapter(model: Checkpoint, tmp_path: Path) -> None:
    """The tensors of PEFT's model as they are called in it, saved without its own function."""
    holder = nn.Module()
    holder.to_q = copy.deepcopy(layer_of(model, LINEAR))
    config = peft_library.LoraConfig(
        r=3, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False, use_dora=True
    )
    wrapped = peft_library.get_peft_model(holder, config, adapter_name="mine")
    above = LINEAR.rpartition(".")[0]
    named = {
        key.replace("base_model.model.", f"base_model.model.{above}."): each
        for key, each in wrapped.state_dict().items()
        if "lora_" in key
    }
    loaded = read(model, named, tmp_path)
    rows = torch.randn(5, 32)
    with torch.no_grad():
        theirs = wrapped.base_model.model.to_q(rows) - layer_of(model, LINEAR)(rows)
    assert_equal(rows.double() @ change_of(loaded, model, LINEAR).T, theirs.double())
    assert load_file(tmp_path / "x.safetensors").keys() == named.keys()
