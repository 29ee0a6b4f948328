"""The toybox as one checkpoint in the layout of Stable Diffusion 1: LDM's key names, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratorio.standalone.ldm_names import ALONE, IN_RESNET
from loratorio_lab.toybox.models import (
    FACTOR,
    HEADS,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    TOKENS,
    UNET_CHANNELS,
    VAE_CHANNELS,
)

TEXT_NAME = "toybox_text"
"""Folder of the tokenizer and text configuration, as the configuration file names it."""

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key: str) -> str:
    """LDM's name of a diffusers UNet weight (two residual blocks per level)."""
    module, kind = key.rsplit(".", 1)
    if module in ALONE:
        return f"{ALONE[module]}.{kind}"
    parts = re.fullmatch(
        r"(down|mid|up)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module
    )
    if parts is None:
        raise KeyError(key)
    side, level, what, index, rest = parts[1], int(parts[2] or 0), parts[3], int(parts[4]), parts[5]
    if what == "resnets":
        rest = IN_RESNET[rest]
    if side == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * index}.{rest}.{kind}"
    if what == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{kind}"
    if what == "upsamplers":
        # The lowest level has no attention, so there its upsampler is the second module of its block, elsewhere the third.
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv.{kind}"
    block = (
        f"input_blocks.{3 * level + index + 1}" if side == "down" else f"output_blocks.{3 * level + index}"
    )
    return f"{block}.{1 if what == 'attentions' else 0}.{rest}.{kind}"


def vae_key(key: str, levels: int) -> str:
    """LDM's name of a diffusers AutoencoderKL weight."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key
    )
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        module, kind = rest.rsplit(".", 1)
        key = f"{head}mid.attn_1.{_VAE_ATTENTION[module]}.{kind}"
    return key


def to_ldm(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], alphas_cumprod: Tensor
) -> dict[str, Tensor]:
    """One state dict of diffusers' UNet and VAE and transformers' CLIPTextModel, with LDM's names, fp16."""
    made: dict[str, Tensor] = {}
    for key, value in unet.items():
        made[f"model.diffusion_model.{unet_key(key)}"] = value
    for key, value in vae.items():
        name = vae_key(key, len(VAE_CHANNELS))
        square = ".attn_1." in name and value.ndim == 2
        made[f"first_stage_model.{name}"] = value[:, :, None, None] if square else value
    for key, value in text.items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        made[f"cond_stage_model.transformer.{name}"] = value
    made = {name: value.detach().half().cpu().contiguous() for name, value in made.items()}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    made[positions] = torch.arange(TOKENS)[None]
    made["alphas_cumprod"] = alphas_cumprod.float().cpu().contiguous()
    return made


def save_checkpoint(weights: dict[str, Tensor], scale: float, pixels: int, file: Path) -> None:
    """Write the .safetensors and, next to it, the .yaml. pixels: the pictures' height and width."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        weights,
        file,
        metadata={
            "format": "pt",
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.title": "toybox",
        },
    )
    file.with_suffix(".yaml").write_text(config_yaml(scale, pixels))


def config_yaml(scale: float, pixels: int) -> str:
    """LDM's inference configuration (v1-inference.yaml) with the toybox's sizes."""
    base, latent_size = UNET_CHANNELS[0], pixels // FACTOR
    mults = [c // base for c in UNET_CHANNELS]
    vae_mults = [c // VAE_CHANNELS[0] for c in VAE_CHANNELS]
    return f"""# The toybox: Stable Diffusion 1's layout in small. `{TEXT_NAME}` is a folder: put it where the program is started.
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: {latent_size}
    channels: {LATENT_CHANNELS}
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: {scale}
    use_ema: False

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: {latent_size}
        in_channels: {LATENT_CHANNELS}
        out_channels: {LATENT_CHANNELS}
        model_channels: {base}
        attention_resolutions: {[2**i for i in range(len(UNET_CHANNELS) - 1)]}
        num_res_blocks: 2
        channel_mult: {mults}
        num_heads: {HEADS}
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: {TEXT_WIDTH}
        use_checkpoint: False
        legacy: False

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {LATENT_CHANNELS}
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: {LATENT_CHANNELS}
          resolution: {pixels}
          in_channels: 3
          out_ch: 3
          ch: {VAE_CHANNELS[0]}
          ch_mult: {vae_mults}
          num_res_blocks: 0
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {TEXT_NAME}
        max_length: {TOKENS}

# Read by LoRAtorio's command line: what a picture has that does not say.
sampling:
  steps: 20
  cfg: 3.0
"""
