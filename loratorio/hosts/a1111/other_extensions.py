"""Other features and extensions of the WebUI, and whether LoRAtorio can compose together with them.

From the extensions' sources (2025): Dynamic Prompts changes the prompts before LoRAs are parsed, and Neutral Prompt
combines a step's finished rows. Both work together with composing and need nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..shared.other_extensions import merged_because, replaced_attention


def obstacle(p: Any) -> str | None:
    """A sentence on why this pass is left to the WebUI's own merging; None if it can be composed."""
    from modules import shared

    model = shared.sd_model
    if getattr(model, "is_sd3", False):
        return merged_because("it does not support Stable Diffusion 3 in this WebUI")
    if model.cond_stage_key == "edit":
        return merged_because(
            "it does not support InstructPix2Pix checkpoints, which have two guidance scales"
        )
    if _control_net_is_active(model):
        return merged_because("ControlNet is active, which handles the model's rows itself")
    if p.extra_generation_params.get("RP Active"):
        return merged_because("Regional Prompter is active, which assigns LoRAs to regions itself")
    if "Region control" in (p.extra_generation_params.get("Tiled Diffusion") or ()):
        return merged_because(
            "Tiled Diffusion's Region Prompt Control is on, which assigns prompts and LoRAs to regions itself"
        )
    if _unet_is_replaced():
        return merged_because("another UNet, such as TensorRT, is selected in the settings")
    return replaced_attention(model.model.diffusion_model)


def remarks(p: Any) -> Iterator[str]:
    """Sentences about parts that are not composed although the pass is."""
    if any(key.startswith("ADetailer") for key in p.extra_generation_params):
        yield "The picture was composed. ADetailer's own passes merge the LoRAs as usual."


def _control_net_is_active(model: Any) -> bool:
    """ControlNet replaces the UNet's forward while it has an active unit, and keeps the old one under this name."""
    return hasattr(model.model.diffusion_model, "_original_forward")


def _unet_is_replaced() -> bool:
    from modules import sd_unet

    return getattr(sd_unet, "current_unet", None) is not None
