"""A step: conditions to blocks of rows, blocks to model calls."""

from collections import namedtuple

import torch
from backend import memory_management
from backend.sampling.condition import compile_conditions, compile_weighted_conditions

Block = namedtuple("cond_obj", ["input_x", "mult", "conditioning", "area", "control", "patches"])


def get_area_and_mult(conds, x_in, timestep_in):
    if timestep_in[0] > conds.get("timestep_start", 1e9):
        return None
    area = conds.get("area", (x_in.shape[2], x_in.shape[3], 0, 0))
    x = x_in[:, :, : area[0], : area[1]]
    conditioning = {
        key: cond.process_cond(len(x_in), x_in.device) for key, cond in conds["model_conds"].items()
    }
    return Block(
        x, torch.ones_like(x) * conds.get("strength", 1.0), conditioning, area, conds.get("control"), None
    )


def can_concat_cond(c1, c2):
    same = c1.input_x.shape == c2.input_x.shape and c1.control is c2.control
    return (
        same
        and c1.conditioning.keys() == c2.conditioning.keys()
        and all(c1.conditioning[key].can_concat(c2.conditioning[key]) for key in c1.conditioning)
    )


def cond_cat(c_list):
    return {key: c_list[0][key].concat([c[key] for c in c_list[1:]]) for key in c_list[0]}


def compute_cond_mark(cond_or_uncond, sigmas):
    return torch.tensor([kind for kind in cond_or_uncond for _ in sigmas])


def compute_cond_indices(cond_or_uncond, sigmas):
    mark = compute_cond_mark(cond_or_uncond, sigmas).tolist()
    return [i for i, kind in enumerate(mark) if not kind], [i for i, kind in enumerate(mark) if kind]


def add_control(control, c, x, sigma, blocks):
    c["control"] = control.get_control(x, sigma, c.copy(), blocks)
    c["control_model"] = control


def needed_memory(model, shape):
    return model.memory_required(shape)


def calc_cond_uncond_batch(
    model, cond, uncond, x_in, timestep, model_options, needed=needed_memory, with_control=add_control
):
    out = [torch.zeros_like(x_in), torch.zeros_like(x_in)]
    count = [torch.full_like(x_in, 1e-37), torch.full_like(x_in, 1e-37)]
    to_run = [(block, 0) for each in cond if (block := get_area_and_mult(each, x_in, timestep)) is not None]
    to_run += [
        (block, 1) for each in uncond or () if (block := get_area_and_mult(each, x_in, timestep)) is not None
    ]
    while to_run:
        fitting = [n for n, (block, _) in enumerate(to_run) if can_concat_cond(block, to_run[0][0])][::-1]
        chosen = fitting[:1]
        for parts in range(1, len(fitting) + 1):
            tried = fitting[: len(fitting) // parts]
            if needed(model, [len(tried) * len(x_in), *x_in.shape[1:]]) < memory_management.free:
                chosen = tried
                break
        blocks = [to_run.pop(n) for n in chosen]
        kinds = [kind for _, kind in blocks]
        x = torch.cat([block.input_x for block, _ in blocks])
        sigma = torch.cat([timestep] * len(blocks))
        c = cond_cat([block.conditioning for block, _ in blocks])
        cond_indices, uncond_indices = compute_cond_indices(kinds, timestep)
        c["transformer_options"] = {
            **model_options["transformer_options"],
            "cond_or_uncond": kinds,
            "sigmas": timestep,
            "cond_mark": compute_cond_mark(kinds, timestep),
            "cond_indices": cond_indices,
            "uncond_indices": uncond_indices,
        }
        control = blocks[0][0].control
        if control is not None:
            with_control(control, c, x, sigma, len(blocks))
        if "model_function_wrapper" in model_options:
            args = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": kinds}
            output = model_options["model_function_wrapper"](model.apply_model, args)
        else:
            output = model.apply_model(x, sigma, **c)
        for (block, kind), rows in zip(blocks, output.chunk(len(blocks)), strict=True):
            out[kind] += rows * block.mult
            count[kind] += block.mult
    return out[0] / count[0], out[1] / count[1]


def sampling_function(denoiser, x, sigma, text_cond, weights, text_uncond, cond_scale):
    unet = denoiser.inner_model.inner_model.forge_objects.unet
    model, options = unet.model, unet.model_options
    uncond, cond = compile_conditions(text_uncond), compile_weighted_conditions(text_cond, weights)
    for entry in [*cond, *(uncond or ())]:
        if unet.controlnet_linked_list is not None:
            entry["control"] = unet.controlnet_linked_list
    strength = sum(entry["strength"] for entry in cond)
    own_uncond = uncond  # what functions after the guidance are given, changed or not
    if cond_scale == 1:
        uncond = None
    for function in options.get("sampler_pre_cfg_function", []):
        model, cond, uncond, x, sigma, options = function(model, cond, uncond, x, sigma, options)
    cond_pred, uncond_pred = calc_cond_uncond_batch(model, cond, uncond, x, sigma, options)
    return guided(
        model, x, sigma, cond, own_uncond, cond_pred, uncond_pred, cond_scale, cond_scale * strength, options
    )


def guided(model, x, sigma, cond, uncond, cond_pred, uncond_pred, cond_scale, scale, options):
    args = {"input": x, "sigma": sigma, "model": model, "model_options": options, "cond_scale": cond_scale}
    args.update(cond_denoised=cond_pred, uncond_denoised=uncond_pred)
    if "sampler_cfg_function" in options:
        differences = {"cond": x - cond_pred, "uncond": x - uncond_pred}
        result = x - options["sampler_cfg_function"]({**args, **differences})
    else:
        result = uncond_pred + (cond_pred - uncond_pred) * scale
    for function in options.get("sampler_post_cfg_function", []):
        result = function({**args, "denoised": result, "cond": cond, "uncond": uncond})
    return result


def sampling_prepare(unet):
    unet.load()
