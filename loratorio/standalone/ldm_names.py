"""Names that Stable Diffusion's original code (LDM, SGM) has for the layers of a UNet of diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_names(unet: nn.Module) -> dict[str, str]:
    """Module paths of an SD or SDXL UNet by their names in the original code; nothing for other models."""
    blocks = _blocks(unet) if hasattr(unet, "down_blocks") and hasattr(unet, "up_blocks") else {}
    named: dict[str, str] = {}
    for path, _ in unet.named_modules():
        block = next((each for each in blocks if path == each or path.startswith(f"{each}.")), None)
        if block is not None:
            inner = path.removeprefix(block).removeprefix(".")
            inner = _IN_RESNET.get(inner, inner) if ".resnets." in block else inner
            named[f"{blocks[block]}.{inner}".removesuffix(".")] = path
    return named


def _blocks(unet: Any) -> dict[str, str]:
    """What stands where: paths of blocks, and the original code's for them, which counts them through."""
    blocks = dict(_ALONE)
    count = 1
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{count}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{count}.1"
            count += 1
        if down.downsamplers:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    for j in range(2):
        blocks[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
    blocks["mid_block.attentions.0"] = "middle_block.1"
    count = 0
    for i, up in enumerate(unet.up_blocks):
        for j in range(len(up.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{count}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{count}.1"
            count += 1
        if up.upsamplers:
            place = 2 if getattr(up, "attentions", None) else 1
            blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{place}.conv"
    return blocks
