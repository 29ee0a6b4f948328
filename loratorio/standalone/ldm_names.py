"""Names that Stable Diffusion's original code (LDM, SGM) has for the layers of a UNet of diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn

IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def ldm_names(unet: nn.Module) -> dict[str, str]:
    """Module paths of an SD or SDXL UNet by their names in the original code; nothing for other models."""
    blocks = _blocks(unet) if hasattr(unet, "down_blocks") and hasattr(unet, "up_blocks") else {}
    named: dict[str, str] = {}
    for path, _ in unet.named_modules():
        block = next((each for each in blocks if path == each or path.startswith(f"{each}.")), None)
        if block is not None:
            inner = path.removeprefix(block).removeprefix(".")
            inner = IN_RESNET.get(inner, inner) if ".resnets." in block else inner
            named[f"{blocks[block]}.{inner}".removesuffix(".")] = path
    return named


def _blocks(unet: Any) -> dict[str, str]:
    """What stands where: paths of blocks, and the original code's for them, which counts them through."""
    blocks = {**ALONE, **_MIDDLE}
    for side, theirs, count in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for i, block in enumerate(getattr(unet, side)):
            for j in range(len(block.resnets)):
                blocks[f"{side}.{i}.resnets.{j}"] = f"{theirs}.{count}.0"
                blocks[f"{side}.{i}.attentions.{j}"] = f"{theirs}.{count}.1"
                count += 1
            if getattr(block, "downsamplers", None):
                blocks[f"{side}.{i}.downsamplers.0.conv"] = f"{theirs}.{count}.0.op"
                count += 1
            if getattr(block, "upsamplers", None):
                # The last module of the block before, whose second is the attention, if there is one.
                place = 2 if getattr(block, "attentions", None) else 1
                blocks[f"{side}.{i}.upsamplers.0.conv"] = f"{theirs}.{count - 1}.{place}.conv"
    return blocks
