"""The toybox's three networks: SD 1's classes, small."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

LATENT_CHANNELS = 4
FACTOR = 8
"""Pixels of a picture per one of its latent's, in each direction."""

VAE_CHANNELS = (64, 64, 64, 64)
UNET_CHANNELS = (64, 128)
HEADS = 4
TEXT_WIDTH = 96
TEXT_LAYERS = 2
TOKENS = 77


def new_vae() -> AutoencoderKL:
    """f=8, four latent channels. The 1×1 convolutions around the latent are the identity with a small fixed spread,
    so that training shapes the latent's mean alone."""
    levels = len(VAE_CHANNELS)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=0,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=32,
    )
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        for i in range(LATENT_CHANNELS):
            conv.weight.data[i, i] = 1
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = -8
    return vae


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=2,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=32,
    )


def text_config(vocabulary: int, start: int, end: int) -> CLIPTextConfig:
    options: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH * 4,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        **options,
    )


def new_text_encoder(config: CLIPTextConfig) -> CLIPTextModel:
    return CLIPTextModel(config)
