"""At which strength a LoRA file is read: every kind, alpha, rank, dtype and naming, against the formulas in float64.

Not against a library's function for merging: lycoris 4.1.3's has LoHa's and LoKr's alpha/rank twice, its forward once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import peft as peft_library
import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import fit_all
from loratorio.errors import LoratorioError
from loratorio.standalone import lora_lookup
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.lora_files import LoadedLora, load_lora
from tests import tiny
from tests.lora_kinds import ALPHAS, DTYPES, KINDS, formula, weights_of

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
LDM = {
    LINEAR: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    CONV: "input_blocks.1.0.in_layers.2",
    NORM: "input_blocks.1.0.in_layers.0",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


def layer_of(model: Checkpoint, path: str) -> nn.Module:
    return model.unet.get_submodule(path)


def read(model: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path, name: str = "x") -> LoadedLora:
    file = tmp_path / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return load_lora(file, name, model)


def change_of(loaded: LoadedLora, model: Checkpoint, path: str) -> Tensor:
    """All that the LoRA adds to a layer's weight, float64."""
    fitted = fit_all(loaded.unet.deltas[path], layer_of(model, path))
    weight: Tensor = layer_of(model, path).weight  # type: ignore[assignment]
    total = torch.zeros(weight.shape, dtype=torch.float64)
    if fitted.low_rank is not None:
        total += fitted.low_rank.dense().double().reshape(total.shape)
    if fitted.dense is not None and fitted.dense.weight is not None:
        total += fitted.dense.weight.double()
    return total


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-3)


def kohya(path: str, own: dict[str, Tensor], prefix: str = "lora_unet_") -> dict[str, Tensor]:
    return {f"{prefix}{path.replace('.', '_')}.{tail}": tensor for tail, tensor in own.items()}


def peft(path: str, own: dict[str, Tensor], prefix: str = "unet.") -> dict[str, Tensor]:
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    named = {f"{prefix}{path}.{names.get(tail, tail)}": each for tail, each in own.items()}
    magnitudes = named.pop(f"{prefix}{path}.dora_scale", None)
    if magnitudes is not None:
        # Of a convolution PEFT keeps them as (1, out, 1, 1).
        own_shape = magnitudes.flatten() if magnitudes.ndim == 2 else magnitudes.transpose(0, 1)
        named[f"{prefix}{path}.lora_magnitude_vector.weight"] = own_shape
    return named


def old(path: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}
    return {f"unet.{path}.{names.get(tail, tail)}": tensor for tail, tensor in own.items()}


def dotted(layer: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{tail}": tensor for tail, tensor in own.items()}


NAMINGS: dict[str, Callable[[str, dict[str, Tensor]], dict[str, Tensor]]] = {
    "kohya's, diffusers' layers": kohya,
    "kohya's, LDM layers": lambda path, own: kohya(LDM[path], own),
    "lycoris_": lambda path, own: kohya(path, own, "lycoris_"),
    "ComfyUI's, LDM layers": lambda path, own: dotted(f"diffusion_model.{LDM[path]}", own),
    "ComfyUI's, in full": lambda path, own: dotted(f"model.diffusion_model.{LDM[path]}", own),
    "dotted": lambda path, own: dotted(f"unet.{path}", own),
    "PEFT's": peft,
    "PEFT's, one model": lambda path, own: peft(path, own, "base_model.model."),
    "PEFT's, with its adapter's name": lambda path, own: {
        key.replace(".weight", ".default.weight"): each for key, each in peft(path, own).items()
    },
    "diffusers' of before PEFT": old,
}
TABLE = [
    (kind, naming)
    for kind in KINDS
    for naming in NAMINGS
    # PEFT's names have these two, those before it only one.
    if kind == "lora" or "PEFT" not in naming or (kind == "lora-dora" and "before" not in naming)
]


@pytest.mark.parametrize(("kind", "naming"), TABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_is_read_at_its_strength(
    model: Checkpoint, tmp_path: Path, kind: str, naming: str, dtype: torch.dtype
) -> None:
    """Kind × naming × dtype × alpha × rank, for a linear layer and a convolution."""
    paths = [CONV] if "tucker" in kind else [LINEAR, CONV]
    for rank, alpha in product((1, 4, 8) if dtype == torch.float32 else (1, 4), ALPHAS):
        tensors, expected = {}, {}
        for path in paths:
            before = layer_of(model, path).weight.detach()  # type: ignore[operator]
            own = weights_of(kind, tuple(before.shape), rank, alpha, dtype)
            tensors |= NAMINGS[naming](path, own)
            expected[path] = formula(own, before)
        loaded = read(model, tensors, tmp_path)
        for path, change in expected.items():
            assert_equal(change_of(loaded, model, path), change)
        assert bool(loaded.notes) == (alpha == 0 and kind not in ("diff", "lokr-full"))


@pytest.mark.parametrize("naming", [each for each in NAMINGS if "PEFT" not in each])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_as_diff(model: Checkpoint, tmp_path: Path, naming: str, dtype: torch.dtype) -> None:
    own = {"diff": torch.randn(32).to(dtype), "diff_b": torch.randn(32).to(dtype)}
    loaded = read(model, NAMINGS[naming](NORM, own), tmp_path)
    fitted = fit_all(loaded.unet.deltas[NORM], layer_of(model, NORM))
    assert fitted.dense is not None
    assert torch.equal(fitted.dense.weight, own["diff"].float())  # type: ignore[arg-type]
    assert torch.equal(fitted.dense.bias, own["diff_b"].float())  # type: ignore[arg-type]
    assert not loaded.notes


@pytest.mark.parametrize(
    ("kind", "rank", "alpha"),
    [
        *(("loha", rank, alpha) for rank, alpha in ((4, 2.0), (8, 1.0), (32, 1.0), (2, 0.5))),
        # Of LoKr what lycoris itself makes of a layer of 32×32.
        *(("lokr-one-factored", rank, alpha) for rank, alpha in ((2, 1.0), (3, 0.5), (1, 2.0))),
    ],
)
def test_lycoris_own_forward(model: Checkpoint, tmp_path: Path, kind: str, rank: int, alpha: float) -> None:
    """As lycoris trains: the layer's output with its module in the place of the layer's forward."""
    layer = layer_of(model, LINEAR)
    own = weights_of(kind, (32, 32), rank, alpha, torch.float32)
    loaded = read(model, kohya(LINEAR, own), tmp_path)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    holder = nn.Module()
    holder.to_q = nn.Linear(32, 32)
    holder.to_q.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        before = holder.to_q(rows)
        network, _ = create_lycoris_from_weights(1.0, "", holder, weights_sd=kohya("to_q", own, "lycoris_"))
        network.apply_to()
        theirs = holder.to_q(rows) - before
    assert_equal(rows.double() @ change_of(loaded, model, LINEAR).T, theirs.double())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("naming", [peft, old])
def test_alphas_beside_pefts_and_diffusers_names(
    model: Checkpoint, tmp_path: Path, alpha: float | None, naming: object
) -> None:
    own = weights_of("lora", (32, 32), 4, alpha, torch.float32)
    loaded = read(model, naming(LINEAR, own), tmp_path)  # type: ignore[operator]
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_as_peft_saves_it(model: Checkpoint, tmp_path: Path, rslora: bool) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    config = {"lora_alpha": 16, "r": 4, "use_rslora": rslora, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = read(model, peft(LINEAR, own, "base_model.model."), tmp_path, "adapter_model")
    strength = 16 / 4**0.5 if rslora else 16 / 4
    assert_equal(change_of(loaded, model, LINEAR), strength * formula(own, torch.zeros(32, 32)))
    # Another file beside it is not PEFT's folder.
    other = read(model, peft(LINEAR, own), tmp_path, "other")
    assert_equal(change_of(other, model, LINEAR), formula(own, torch.zeros(32, 32)))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"lora_alpha": {}}', "[" * 100_000])
def test_a_folder_whose_config_is_nonsense(model: Checkpoint, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    tensors = peft(LINEAR, own, "base_model.model.")
    if "lora_alpha" in text:
        with pytest.raises(LoratorioError, match="alpha"):
            read(model, tensors, tmp_path, "adapter_model")
    else:
        loaded = read(model, tensors, tmp_path, "adapter_model")
        assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))


def test_of_two_patterns_the_first_counts(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    patterns = {"to_q": 32, "attn1.to_q": 4}
    config = {"lora_alpha": 1, "r": 4, "alpha_pattern": patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = read(model, peft(LINEAR, own, "base_model.model."), tmp_path, "adapter_model")
    assert_equal(change_of(loaded, model, LINEAR), 32 / 4 * formula(own, torch.zeros(32, 32)))


def test_pefts_bias_is_scaled_with_its_matrices(model: Checkpoint, tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    own = weights_of("lora", (32, 32), 4, 8.0, torch.float32)
    bias = torch.randn(32)
    loaded = read(model, {**peft(path, own), f"unet.{path}.lora_B.bias": bias}, tmp_path)
    fitted = fit_all(loaded.unet.deltas[path], layer_of(model, path))
    assert fitted.dense is not None
    assert fitted.dense.bias is not None
    torch.testing.assert_close(fitted.dense.bias, 2 * bias)


def test_two_names_for_one_layer_add_up(model: Checkpoint, tmp_path: Path) -> None:
    first, second = (weights_of("lora", (32, 32), 4, 2.0, torch.float32, seed) for seed in (1, 2))
    q = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = kohya(q, first, "lora_te_") | kohya(q, second, "lora_te1_")
    loaded = read(model, tensors, tmp_path)
    (path,) = loaded.text[0].deltas
    fitted = fit_all(loaded.text[0].deltas[path], model.text_encoders[0].get_submodule(path))
    assert fitted.low_rank is not None
    zero = torch.zeros(32, 32)
    assert_equal(fitted.low_rank.dense().double(), formula(first, zero) + formula(second, zero))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lora-dora"])
def test_what_lies_beside_a_kind_is_added(model: Checkpoint, tmp_path: Path, kind: str) -> None:
    """`diff` and `diff_b` of a layer that has another kind, too."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    before = layer_of(model, path).weight.detach()  # type: ignore[operator]
    own = weights_of(kind, (32, 32), 4, 2.0, torch.float32)
    more = {"diff": torch.randn(32, 32), "diff_b": torch.randn(32)}
    loaded = read(model, kohya(path, {**own, **more}), tmp_path)
    assert_equal(change_of(loaded, model, path), formula(own, before) + more["diff"].double())
    fitted = fit_all(loaded.unet.deltas[path], layer_of(model, path))
    assert fitted.dense is not None
    assert fitted.dense.bias is not None
    torch.testing.assert_close(fitted.dense.bias, more["diff_b"])


def test_a_magnitude_in_kohyas_names_is_doras(model: Checkpoint, tmp_path: Path) -> None:
    before = layer_of(model, LINEAR).weight.detach()  # type: ignore[operator]
    own = weights_of("lora-dora", (32, 32), 4, 2.0, torch.float32)
    renamed = {**own, "lora_magnitude_vector": own["dora_scale"].flatten()}
    del renamed["dora_scale"]
    loaded = read(model, kohya(LINEAR, renamed), tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, before))


def test_a_sparse_change_is_scaled_with_the_low_rank_one(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    sparse = torch.zeros(32, 32)
    sparse[3, 5], sparse[31, 0] = 1.5, -2.0
    packed = sparse.to_sparse().coalesce()
    more = {
        "bias_indices": packed.indices(),
        "bias_values": packed.values(),
        "bias_size": torch.tensor([32, 32]),
    }
    loaded = read(model, kohya(LINEAR, {**own, **more}), tmp_path)
    expected = formula(own, torch.zeros(32, 32)) + 2 / 4 * sparse.double()
    assert_equal(change_of(loaded, model, LINEAR), expected)


def test_what_is_not_read_is_named(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    loaded = read(model, kohya(LINEAR, {**own, "gate": torch.ones(1), "shift": torch.ones(1)}), tmp_path)
    (note,) = loaded.notes
    assert "LoRA x was read without 2 of its tensors" in note
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))


@pytest.mark.parametrize(
    "alpha", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones(4), torch.ones(0)]
)
def test_an_alpha_that_is_no_number_is_a_sentence(model: Checkpoint, tmp_path: Path, alpha: Tensor) -> None:
    for kind in ("lora", "loha", "lokr"):
        own = {**weights_of(kind, (32, 32), 4, None, torch.float32), "alpha": alpha}
        with pytest.raises(LoratorioError, match="alpha"):
            read(model, kohya(LINEAR, own), tmp_path)


def test_a_sparse_change_outside_of_the_weight_is_a_sentence(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    for indices, size in (([[99], [0]], [32, 32]), ([[0], [0]], [9999, 9999]), ([[-1], [0]], [32, 32])):
        more = {
            "bias_indices": torch.tensor(indices),
            "bias_values": torch.ones(1),
            "bias_size": torch.tensor(size),
        }
        with pytest.raises(LoratorioError, match="does not fit the layer"):
            read(model, kohya(LINEAR, {**own, **more}), tmp_path)


def test_both_ways_of_naming_in_one_file(model: Checkpoint, tmp_path: Path) -> None:
    first, second = (weights_of("lora", (32, 32), 4, 2.0, torch.float32, seed) for seed in (1, 2))
    other = LINEAR.replace("to_q", "to_k")
    loaded = read(model, kohya(LINEAR, first) | peft(other, second), tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(first, torch.zeros(32, 32)))
    assert_equal(change_of(loaded, model, other), formula(second, torch.zeros(32, 32)))


def test_what_does_not_fit_is_said_and_the_rest_is_used(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    more = kohya("label_emb_0_0", {tail: tensor.clone() for tail, tensor in own.items()})
    more |= {"something.else": torch.ones(2, 32)}
    more |= {"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(4.0)}
    loaded = read(model, kohya(LINEAR, own) | more, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))
    assert list(loaded.unet.deltas) == [LINEAR]
    assert any("only 1 of 2 layers match this model" in note for note in loaded.notes)
    assert any("something.else and 1 more tensors" in note for note in loaded.notes)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 2), (2, 8), (8, 8)])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
def test_pefts_loha_and_lokr_against_pefts_layer(
    model: Checkpoint, tmp_path: Path, kind: str, rank: int, alpha: int, conv: bool, patterns: bool
) -> None:
    """A folder as PEFT saves it, and what PEFT's own layer adds to the weight."""
    path = CONV if conv else LINEAR
    name = path.rpartition(".")[2]
    holder = nn.Module()
    holder.add_module(name, copy.deepcopy(layer_of(model, path)))
    more = {"alpha_pattern": {name: 3}, "rank_pattern": {name: 2}} if patterns else {}
    make = peft_library.LoHaConfig if kind == "loha" else peft_library.LoKrConfig
    config = make(r=rank, alpha=alpha, target_modules=[name], init_weights=False, **more)
    theirs = peft_library.get_peft_model(holder, config)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    above = path.rpartition(".")[0]
    renamed = {
        key.replace("base_model.model.", f"base_model.model.{above}."): each for key, each in saved.items()
    }
    loaded = read(model, renamed, tmp_path, "adapter_model")
    expected = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
    assert_equal(
        change_of(loaded, model, path), expected.detach().double().reshape(layer_of(model, path).weight.shape)
    )  # type: ignore[union-attr]
    assert not loaded.notes


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_rank_0_changes_nothing_and_is_said(model: Checkpoint, tmp_path: Path, kind: str) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    other = LINEAR.replace("to_q", "to_k")
    loaded = read(
        model, kohya(LINEAR, own) | kohya(other, weights_of(kind, (32, 32), 0, 2.0, torch.float32)), tmp_path
    )
    assert list(loaded.unet.deltas) == [LINEAR]
    assert any("rank 0" in note for note in loaded.notes)
    alone = read(model, kohya(other, weights_of(kind, (32, 32), 0, 2.0, torch.float32)), tmp_path)
    assert alone.changes_nothing


@pytest.mark.parametrize(
    "layer", ["down_blocks_0", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out", "mid_block"]
)
@pytest.mark.parametrize("tail", ["diff", "lora_magnitude_vector", "diff_b", "lora_down.weight"])
def test_a_key_that_names_no_layer_but_a_container(
    model: Checkpoint, tmp_path: Path, layer: str, tail: str
) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    stray = {f"lora_unet_{layer}.{tail}": torch.ones(32, 32)}
    loaded = read(model, kohya(LINEAR, own) | stray, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))
    assert any("only 1 of 2 layers match this model" in note for note in loaded.notes)
    with pytest.raises(LoratorioError, match="which this model does not have"):
        read(model, stray, tmp_path)


def used(model: Checkpoint, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Read and attached, which is where shapes meet the layer."""
    with Bank([read(model, tensors, tmp_path).unet]).attached(dict(model.unet.named_modules())):
        pass


@pytest.mark.parametrize(
    ("tail", "shape"),
    [
        *(("lora_up.weight", shape) for shape in ((), (4,), (32, 5), (5, 4), (4, 32, 1, 1, 1), (32, 4, 3))),
        *(("lora_down.weight", shape) for shape in ((), (4,), (5, 32), (4, 31), (32, 4, 1), (4, 32, 3, 3))),
    ],
)
def test_matrices_that_do_not_belong_together(
    model: Checkpoint, tmp_path: Path, tail: str, shape: tuple[int, ...]
) -> None:
    own = {**weights_of("lora", (32, 32), 4, 2.0, torch.float32), tail: torch.ones(shape)}
    with pytest.raises(LoratorioError, match="LoRA x"):
        used(model, kohya(LINEAR, own), tmp_path)


@pytest.mark.parametrize("alpha", ["two", [1], {}, "", "1e", "0x4"])
@pytest.mark.parametrize("place", ["unet.lora_alpha", "unet.alpha_pattern"])
def test_metadata_whose_alpha_is_no_number(
    model: Checkpoint, tmp_path: Path, alpha: object, place: str
) -> None:
    values = {place: {"to_q": alpha} if "pattern" in place else alpha}
    file = tmp_path / "x.safetensors"
    own = peft(LINEAR, weights_of("lora", (32, 32), 4, None, torch.float32))
    save_file(own, file, {"lora_adapter_metadata": json.dumps(values)})
    with pytest.raises(LoratorioError, match=r"configuration of LoRA x gives the layer .*to_q the alpha"):
        load_lora(file, "x", model)


@pytest.mark.parametrize(
    "values", [{"unet.lora_alpha": None}, {"unet.alpha_pattern": None}, {"unet.alpha_pattern": "to_q"}]
)
def test_metadata_that_says_nothing_on_alpha(model: Checkpoint, tmp_path: Path, values: object) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    file = tmp_path / "x.safetensors"
    save_file(peft(LINEAR, own), file, {"lora_adapter_metadata": json.dumps(values)})
    assert_equal(change_of(load_lora(file, "x", model), model, LINEAR), formula(own, torch.zeros(32, 32)))


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(a+)+$", "(?P<", "x" * 300 + "*", "\\", ".*.*.*.*.*"])
def test_patterns_that_are_broken_or_without_end(model: Checkpoint, tmp_path: Path, pattern: str) -> None:
    own = peft(LINEAR, weights_of("lora", (32, 32), 4, None, torch.float32))
    file = tmp_path / "x.safetensors"
    save_file(own, file, {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 8}})})
    with pytest.raises(LoratorioError, match="has the layer pattern"):
        load_lora(file, "x", model)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\x00", "{}", '{"unet.lora_alpha": 1e999}']
)
def test_metadata_that_is_nonsense(model: Checkpoint, tmp_path: Path, text: str) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    file = tmp_path / "x.safetensors"
    save_file(peft(LINEAR, own), file, {"lora_adapter_metadata": text})
    if "999" in text:
        with pytest.raises(LoratorioError, match="alpha"):
            load_lora(file, "x", model)
    else:
        assert_equal(change_of(load_lora(file, "x", model), model, LINEAR), formula(own, torch.zeros(32, 32)))


def test_complex_numbers_are_a_sentence(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, None, torch.float32)
    own["lora_up.weight"] = own["lora_up.weight"].to(torch.complex64)
    with pytest.raises(LoratorioError, match="complex64"):
        read(model, kohya(LINEAR, own), tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(model, kohya(LINEAR, weights_of("lora", (32, 32), 4, None, torch.float32)), tmp_path)

    def refused(path: Path, mode: str) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lora_lookup, "open", refused, raising=False)
    with pytest.raises(LoratorioError, match=r"cannot be opened \(permission denied\)") as told:
        load_lora(tmp_path / "x.safetensors", "x", model)
    assert "damaged" not in str(told.value)
