"""At which strength a LoRA file is read: every kind, alpha, rank, dtype and naming, against the formulas in float64.

Not against a library's function for merging: lycoris 4.1.3's has LoHa's and LoKr's alpha/rank twice, its forward once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from loratorio.adapters.delta import fit_all
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.lora_files import LoadedLora, load_lora
from tests import tiny

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
KINDS = ("lora", "loha", "lokr", "lokr-one-factored", "lokr-full", "dora", "loha-dora", "lokr-dora", "diff")
ALPHAS = (None, 0.5, 1.0, 3.0, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(tiny.save_sd(tmp_path_factory.mktemp("model") / "sd"))


def layer_of(model: Checkpoint, path: str) -> nn.Module:
    return model.unet.get_submodule(path)


def weights_of(
    kind: str, shape: tuple[int, ...], rank: int, alpha: float | None, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """One layer's tensors by kohya's and LyCORIS' tails."""
    random = torch.Generator().manual_seed(seed)
    out, inside = shape[0], torch.Size(shape[1:]).numel()

    def normal(*sides: int) -> Tensor:
        return (torch.randn(*sides, generator=random) * 0.3).to(dtype)

    base = kind.removesuffix("-dora")
    own: dict[str, Tensor] = {}
    if base in ("lora", "dora"):
        own = {
            "lora_down.weight": normal(rank, *shape[1:]),
            "lora_up.weight": normal(out, rank, *[1] * (len(shape) - 2)),
        }
    elif base == "loha":
        own = {f"hada_w{i}_a": normal(out, rank) for i in (1, 2)} | {
            f"hada_w{i}_b": normal(rank, inside) for i in (1, 2)
        }
    elif base == "lokr":
        own = {
            "lokr_w1_a": normal(4, rank),
            "lokr_w1_b": normal(rank, 4),
            "lokr_w2_a": normal(out // 4, rank),
        }
        own["lokr_w2_b"] = normal(rank, inside // 4)
    elif base == "lokr-one-factored":
        own = {
            "lokr_w1": normal(4, 4),
            "lokr_w2_a": normal(out // 4, rank),
            "lokr_w2_b": normal(rank, inside // 4),
        }
    elif base == "lokr-full":
        own = {"lokr_w1": normal(4, 4), "lokr_w2": normal(out // 4, inside // 4)}
    elif base == "diff":
        return {"diff": normal(*shape)}
    if alpha is not None:
        own["alpha"] = torch.tensor(alpha)
    if kind.endswith("dora"):
        own["dora_scale"] = (torch.rand(out, *[1] * (len(shape) - 1), generator=random) + 0.5).to(dtype)
    return own


def formula(own: dict[str, Tensor], before: Tensor) -> Tensor:
    """What these tensors add to the weight `before`, float64."""
    given = {tail: tensor.double() for tail, tensor in own.items()}
    shape = before.shape

    def scale(rank: int) -> float:
        return float(given["alpha"]) / rank if "alpha" in given else 1.0

    if "diff" in given:
        return given["diff"].reshape(shape)
    if "lora_up.weight" in given:
        down = given["lora_down.weight"].flatten(1)
        change = given["lora_up.weight"].flatten(1) @ down * scale(len(down))
    elif "hada_w1_a" in given:
        first, second = (given[f"hada_w{i}_a"] @ given[f"hada_w{i}_b"] for i in (1, 2))
        change = first * second * scale(len(given["hada_w1_b"]))
    else:
        factors, ranks = [], []
        for i in (1, 2):
            if f"lokr_w{i}" in given:
                factors.append(given[f"lokr_w{i}"])
            else:
                factors.append(given[f"lokr_w{i}_a"] @ given[f"lokr_w{i}_b"])
                ranks.append(len(given[f"lokr_w{i}_b"]))
        change = torch.kron(*factors) * (scale(ranks[0]) if ranks else 1.0)
    change = change.reshape(shape)
    if "dora_scale" in given:
        merged = before.double() + change
        norm = merged.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))
        return merged / norm * given["dora_scale"] - before.double()
    return change


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohyas_names(
    model: Checkpoint, tmp_path: Path, kind: str, alpha: float | None, rank: int, dtype: torch.dtype
) -> None:
    tensors, expected = {}, {}
    for path in (LINEAR, CONV):
        before = layer_of(model, path).weight.detach()  # type: ignore[operator]
        own = weights_of(kind, tuple(before.shape), rank, alpha, dtype)
        tensors |= kohya(path, own)
        expected[path] = formula(own, before)
    loaded = read(model, tensors, tmp_path)
    for path, change in expected.items():
        assert_equal(change_of(loaded, model, path), change)
    assert bool(loaded.notes) == (alpha == 0 and kind not in ("diff", "lokr-full"))


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


def peft(path: str, own: dict[str, Tensor], prefix: str = "unet.") -> dict[str, Tensor]:
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return {f"{prefix}{path}.{names.get(tail, tail)}": tensor for tail, tensor in own.items()}


def old(path: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight", "alpha": "alpha"}
    return {f"unet.{path}.{names[tail]}": tensor for tail, tensor in own.items()}


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


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora"])
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
    own = weights_of("dora", (32, 32), 4, 2.0, torch.float32)
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


NAMES = {
    "lycoris_": lambda path, own: kohya(path, own, "lycoris_"),
    "ComfyUI's, LDM layers": lambda path, own: {
        f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.{tail}": each
        for tail, each in own.items()
    },
    "dotted": lambda path, own: {f"unet.{path}.{tail}": each for tail, each in own.items()},
    "PEFT's with its adapter's name": lambda path, own: {
        key.replace(".weight", ".default.weight"): each for key, each in peft(path, own).items()
    },
}


@pytest.mark.parametrize("naming", NAMES)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_names_that_people_have(model: Checkpoint, tmp_path: Path, naming: str, kind: str) -> None:
    if kind != "lora" and "PEFT" in naming:
        pytest.skip("PEFT has names of its own for these")
    own = weights_of(kind, (32, 32), 4, 2.0, torch.float32)
    loaded = read(model, NAMES[naming](LINEAR, own), tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))
    assert not loaded.notes


def test_both_ways_of_naming_in_one_file(model: Checkpoint, tmp_path: Path) -> None:
    first, second = (weights_of("lora", (32, 32), 4, 2.0, torch.float32, seed) for seed in (1, 2))
    other = LINEAR.replace("to_q", "to_k")
    loaded = read(model, kohya(LINEAR, first) | peft(other, second), tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(first, torch.zeros(32, 32)))
    assert_equal(change_of(loaded, model, other), formula(second, torch.zeros(32, 32)))


def test_what_does_not_fit_is_said_and_the_rest_is_used(model: Checkpoint, tmp_path: Path) -> None:
    own = weights_of("lora", (32, 32), 4, 2.0, torch.float32)
    more = kohya("label_emb_0_0", {tail: tensor.clone() for tail, tensor in own.items()}) | {
        "bundle_emb.x.string_to_param.*": torch.ones(2, 32)
    }
    more |= {"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(4.0)}
    loaded = read(model, kohya(LINEAR, own) | more, tmp_path)
    assert_equal(change_of(loaded, model, LINEAR), formula(own, torch.zeros(32, 32)))
    assert list(loaded.unet.deltas) == [LINEAR]
    assert any("1 of 2 layers were used" in note for note in loaded.notes)
    assert any("bundle_emb" in note and "more tensors" in note for note in loaded.notes)
