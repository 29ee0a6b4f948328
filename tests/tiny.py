"""Stable Diffusion models of a few thousand random weights, and LoRA files for them: fast stand-ins for the tests."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32
"""Width of the text encoder and of the cross attention."""


def tokenizer() -> CLIPTokenizer:
    """Letters, digits and punctuation, one token each; no merges."""
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        model_max_length=77,
        pad_token="<|endoftext|>",
    )


def text_config(width: int = WIDTH, **changes: Any) -> CLIPTextConfig:
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **changes,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )


def save_sd(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A diffusers folder in the SD 1.x manner."""
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_sdxl(folder: Path, seed: int = 0, **unet_changes: Any) -> Path:
    """A diffusers folder in the SDXL manner: two text encoders of unequal width, pooled text and sizes as extra conditioning."""
    torch.manual_seed(seed)
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(WIDTH // 2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=WIDTH // 2 + WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            use_linear_projection=True,
            **unet_changes,
        ),
        scheduler=scheduler(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def targets(model: nn.Module, *ends: str) -> dict[str, nn.Module]:
    """The layers whose names end so."""
    return {name: layer for name, layer in model.named_modules() if name.endswith(ends)}


def save_kohya(
    file: Path,
    unet: nn.Module,
    text_encoder: nn.Module | None = None,
    rank: int = 4,
    alpha: float = 2.0,
    size: float = 0.3,
    seed: int = 0,
) -> Path:
    """A LoRA as kohya's scripts write it, for attention projections (and a 3×3 convolution)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def put(prefix: str, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            key = prefix + name.replace(".", "_")
            weight = layer.weight
            assert isinstance(weight, Tensor)
            kernel = weight.shape[2:]
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=random) * size
            tensors[f"{key}.lora_up.weight"] = (
                torch.randn(weight.shape[0], rank, *[1] * len(kernel), generator=random) * size
            )
            tensors[f"{key}.alpha"] = torch.tensor(alpha)

    put("lora_unet_", targets(unet, "to_q", "to_k", "to_v", "to_out.0", "proj_in", "resnets.0.conv1"))
    if text_encoder is not None:
        layers = targets(text_encoder, "q_proj", "k_proj", "mlp.fc1")
        put("lora_te_text_model_", {name.removeprefix("text_model."): each for name, each in layers.items()})
    save_file(tensors, str(file), metadata={"ss_network_dim": str(rank), "ss_network_args": json.dumps({})})
    return file
