"""ComfyUI's sampling function. How conditions become blocks and calls is Forge's own code's ancestor, and shared here."""

import math

from backend.sampling.sampling_function import (
    calc_cond_uncond_batch,
    can_concat_cond,
    cond_cat,
    get_area_and_mult,
    guided,
)

__all__ = ["can_concat_cond", "cond_cat", "get_area_and_mult", "sampling_function"]


def add_control(control, c, x, sigma, blocks):
    c["control"] = control.get_control(x, sigma, c, blocks, c["transformer_options"])


def needed_memory(model, shape):
    return model.memory_required(shape, cond_shapes={}) * 1.5


def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None):
    has_guidance = not math.isclose(cond_scale, 1.0) or model_options.get("disable_cfg1_optimization", False)
    strength = sum(entry["strength"] for entry in cond)
    uncond = uncond if has_guidance else None
    cond_pred, uncond_pred = calc_cond_uncond_batch(
        model, cond, uncond, x, timestep, model_options, needed_memory, add_control
    )
    scale = cond_scale * strength
    return guided(model, x, timestep, cond, uncond, cond_pred, uncond_pred, cond_scale, scale, model_options)
