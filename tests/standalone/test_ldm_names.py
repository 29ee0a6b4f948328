"""The original code's names of a UNet's layers, against diffusers' own conversion of such checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from loratorio.standalone.ldm_names import ldm_names
from tests import tiny

MODELS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_with_weights_has_its_name(kind: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[kind])
    check(unet)


def test_a_model_with_other_blocks() -> None:
    check(tiny.unet())


def check(unet: UNet2DConditionModel) -> None:
    weighted = {path for path, module in unet.named_modules() if getattr(module, "weight", None) is not None}
    named = {name: path for name, path in ldm_names(unet).items() if path in weighted}
    assert set(named.values()) == weighted
    checkpoint = {
        f"model.diffusion_model.{name}.{tail}": f"{name}.{tail}"
        for name in named
        for tail in ("weight", "bias")
    }
    theirs = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {theirs[f"{path}.weight"].removesuffix(".weight"): path for path in weighted} == named


def test_models_of_other_kinds_have_none() -> None:
    assert ldm_names(nn.Sequential(nn.Linear(2, 2))) == {}
