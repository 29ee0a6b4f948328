"""Row routing against a UNet with merged weights, for every kind of LoRA that PEFT (diffusers) and lycoris can merge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
)
from peft import LoraConfig
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, Delta, Dense, LowRank

from .layers import merged, relative_error

STRENGTH = 0.7
WIDTH = 24


def small_unet() -> Any:
    """Every sort of layer that SD's UNet has, a few thousand weights each."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    ).requires_grad_(False)


def layers_of(unet: nn.Module, *types: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, types)}


def matrices(unet: nn.Module) -> dict[str, nn.Module]:
    return layers_of(unet, nn.Linear, nn.Conv2d)


@dataclass
class Kind:
    """A LoRA of one kind: as an adapter, and merged by the library that it comes from."""

    adapter: Adapter
    merged: Any


Module = Callable[[nn.Module], Any]

LYCORIS: dict[str, Module] = {
    "LoRA and LoCon": lambda layer: LoConModule("x", layer, 1, 4, 2),
    "LoCon, Tucker": lambda layer: LoConModule("x", layer, 1, 4, 2, use_tucker=True),
    "DoRA": lambda layer: LoConModule("x", layer, 1, 4, 2, weight_decompose=True),
    "DoRA by input": lambda layer: LoConModule("x", layer, 1, 4, 2, weight_decompose=True, wd_on_out=False),
    "LoHa": lambda layer: LohaModule("x", layer, 1, 4, 2),
    "LoHa, Tucker": lambda layer: LohaModule("x", layer, 1, 4, 2, use_tucker=True),
    "LoKr": lambda layer: LokrModule("x", layer, 1, 4, 2, factor=4),
    "LoKr, both": lambda layer: LokrModule("x", layer, 1, 2, 1, factor=4, decompose_both=True),
    "full": lambda layer: FullModule("x", layer, 1),
    "GLoRA": lambda layer: GLoRAModule("x", layer, 1, 4, 2),
    "IA3": lambda layer: IA3Module("x", layer, 1),
    "OFT": lambda layer: DiagOFTModule("x", layer, 1, 4),
    "BOFT": lambda layer: ButterflyOFTModule("x", layer, 1, 4),
}
NOT_LINEAR_IN_STRENGTH = ("DoRA", "DoRA by input", "OFT", "BOFT")
"""Their change is made at the strength that it is used with."""


def by_lycoris(kind: str) -> Kind:
    """Every layer changed by lycoris' own module with random parameters, merged by lycoris."""
    unet = small_unet()
    random = torch.Generator().manual_seed(1)
    plain, linear = kind in ("LoRA and LoCon", "LoCon, Tucker"), kind not in NOT_LINEAR_IN_STRENGTH
    deltas: dict[str, list[Delta]] = {}
    layers = layers_of(unet, nn.GroupNorm, nn.LayerNorm) if kind == "norm" else matrices(unet)
    for name, layer in layers.items():
        module = NormModule("x", layer) if kind == "norm" else LYCORIS[kind](layer)
        _randomise(module, random)
        before = copy.deepcopy(layer)
        # FullModule takes the weight out of its layer, so it is asked before it merges.
        weight, bias = module.get_diff_weight(1.0) if linear else (None, None)
        module.merge_to(STRENGTH)
        if plain:
            mid = module.lora_mid.weight if module.tucker else None
            delta: Delta = LowRank(module.lora_down.weight, module.lora_up.weight, float(module.scale), mid)
        elif linear:
            delta = Dense(weight.reshape(before.weight.shape), bias)  # type: ignore[union-attr]
        else:
            delta = Dense(layer.weight - before.weight)  # type: ignore[operator]
        deltas[name] = [delta]
    return Kind(Adapter(kind, deltas, STRENGTH if linear else 1.0), unet)


def _randomise(module: nn.Module, random: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in ("scalar", "dora_scale"):
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)


def by_peft(kind: str) -> Kind:
    """A LoRA on UNet layers as diffusers loads it, fused by diffusers."""
    base, unet = small_unet(), small_unet()
    targets = [name for name in matrices(unet) if "conv" not in name or kind == "PEFT LoCon"]
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=targets,
        use_dora=kind == "PEFT DoRA",
        use_rslora=kind == "PEFT rsLoRA",
        rank_pattern={".*attn2.*": 6},
    )
    unet.add_adapter(config, "a")
    wrapped = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    random = torch.Generator().manual_seed(2)
    for layer in wrapped.values():
        _randomise(nn.ModuleList([layer.lora_A, layer.lora_B]), random)
    strength = 1.0 if kind == "PEFT DoRA" else STRENGTH
    unet.set_adapters("a", strength)
    unet.fuse_lora(1.0)
    unet.unload_lora()
    fused, plain = matrices(unet), matrices(base)
    deltas: dict[str, list[Delta]] = {}
    for name, layer in wrapped.items():
        if kind == "PEFT DoRA":
            deltas[name] = [Dense(fused[name].weight - plain[name].weight)]  # type: ignore[operator]
        else:
            down, up = layer.lora_A["a"].weight, layer.lora_B["a"].weight
            root = up.shape[1] ** 0.5 if kind == "PEFT rsLoRA" else up.shape[1]
            deltas[name] = [LowRank(down, up, 3 / root)]
    return Kind(Adapter(kind, deltas, strength), unet)


NAMES = ("PEFT LoRA", "PEFT LoCon", "PEFT rsLoRA", "PEFT DoRA", "norm", *LYCORIS)


@pytest.fixture(scope="module")
def kinds() -> Mapping[str, Kind]:
    return {name: by_peft(name) if name.startswith("PEFT") else by_lycoris(name) for name in NAMES}


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(rows, 4, 8, 8, generator=random), torch.randn(rows, 7, WIDTH, generator=random)


def one_hot(place: int, count: int) -> tuple[float, ...]:
    return tuple(float(place == i) for i in range(count))


def predict(unet: Any, latents: Tensor, texts: Tensor) -> Tensor:
    with torch.no_grad():
        prediction: Tensor = unet(latents, 500, texts, return_dict=False)[0]
    return prediction


@pytest.fixture(scope="module")
def answers(kinds: Mapping[str, Kind]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One batch with two rows of the base and of every kind, and what each merged model says of the same rows."""
    unet = small_unet()
    bank = Bank([kinds[name].adapter for name in NAMES])
    latents, texts = inputs(2 * len(NAMES) + 2)
    mixes = [one_hot(number - 1, len(NAMES)) for number in range(len(NAMES) + 1) for _ in range(2)]
    with bank.attached(matrices_and_norms(unet)), bank.routed(mixes):
        found = predict(unet, latents, texts)
    models = {"base": unet, **{name: kinds[name].merged for name in NAMES}}
    expected = {
        name: predict(model, own_latents, own_texts)
        for (name, model), own_latents, own_texts in zip(
            models.items(), latents.split(2), texts.split(2), strict=True
        )
    }
    return dict(zip(models, found.split(2), strict=True)), expected


def matrices_and_norms(unet: nn.Module) -> dict[str, nn.Module]:
    return layers_of(unet, nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_its_rows_equal_the_merged_model(
    name: str, answers: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    found, expected = answers
    assert relative_error(found[name], expected[name]) < 1e-4
    if name != "base":  # and it is a change worth the name
        assert relative_error(found[name], found["base"]) > 1e-2


def test_row_by_row_and_in_parts_equal_one_batch(
    kinds: Mapping[str, Kind], answers: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    names = ("PEFT LoRA", "LoHa", "LoRA and LoCon", "norm", "PEFT LoCon")
    unet = small_unet()
    bank = Bank([kinds[name].adapter for name in names])
    latents, texts = inputs(2 * len(names))
    mixes = [one_hot(number, len(names)) for number in range(len(names)) for _ in range(2)]
    with bank.attached(matrices_and_norms(unet)):
        results = []
        for size in (len(mixes), 1, 3, 4):
            parts = []
            for start in range(0, len(mixes), size):
                part = slice(start, start + size)
                with bank.routed(mixes[part]):
                    parts.append(predict(unet, latents[part], texts[part]))
            results.append(torch.cat(parts))
    for result in results[1:]:
        assert relative_error(result, results[0]) < 1e-5


def test_all_at_once_equal_all_merged(kinds: Mapping[str, Kind]) -> None:
    """The mix of several LoRAs is the sum of their changes: what the hosts' merging makes."""
    names = ("PEFT LoRA", "LoHa", "LoRA and LoCon", "norm", "full")
    unet, whole = small_unet(), small_unet()
    plain, sums = matrices_and_norms(unet), matrices_and_norms(whole)
    with torch.no_grad():
        for name in names:
            others = matrices_and_norms(kinds[name].merged)
            for path, layer in sums.items():
                for attribute in ("weight", "bias"):
                    if getattr(layer, attribute) is not None:
                        change = getattr(others[path], attribute) - getattr(plain[path], attribute)
                        getattr(layer, attribute).add_(change)
    latents, texts = inputs(2)
    bank = Bank([kinds[name].adapter for name in names])
    with bank.attached(plain), bank.routed([(1.0,) * len(names)] * 2):
        found = predict(unet, latents, texts)
    assert relative_error(found, predict(whole, latents, texts)) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_bfloat16_layer_is_near_the_merged_one(name: str, kinds: Mapping[str, Kind]) -> None:
    """bfloat16 has 8 bits: 2e-3 for the output's own rounding, as much again for the LoRA's numbers."""
    random = torch.Generator().manual_seed(4)
    plain, adapter = matrices_and_norms(small_unet()), kinds[name].adapter
    for path, deltas in adapter.deltas.items():
        layer, name = copy.deepcopy(plain[path]).bfloat16(), "layer"
        own = Adapter(adapter.name, {name: deltas}, adapter.strength)
        width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.weight.shape[-1]  # type: ignore[union-attr]
        pictures = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
        rows = torch.randn(2, *((width, 8, 8) if pictures else (16, width)), generator=random).bfloat16()  # type: ignore[misc]
        bank = Bank([own])
        with torch.no_grad(), bank.attached({name: layer}), bank.routed([(1.0,)] * 2):
            found = layer(rows)
        with torch.no_grad():
            expected = merged(layer, [own], (1.0,), name)(rows.double())
        assert relative_error(found, expected) < 5e-3, path


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_unet_is_as_near_as_the_merged_one(name: str, kinds: Mapping[str, Kind]) -> None:
    """Over a whole UNet bfloat16's rounding adds up, to about 1e-2, with merged weights just as much."""
    latents, texts = inputs(2)
    unet, whole = small_unet().bfloat16(), copy.deepcopy(kinds[name].merged).bfloat16()
    exact = predict(kinds[name].merged, latents, texts)
    bank = Bank([kinds[name].adapter])
    with bank.attached(matrices_and_norms(unet)), bank.routed([(1.0,)] * 2):
        found = predict(unet, latents.bfloat16(), texts.bfloat16())
    assert found.dtype == torch.bfloat16
    theirs = relative_error(predict(whole, latents.bfloat16(), texts.bfloat16()), exact)
    assert relative_error(found, exact) < 1.5 * theirs
