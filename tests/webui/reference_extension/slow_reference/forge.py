"""The Forge family: the host merges one LoRA at a time.

Every prediction is one of the host's own sampling functions, on a patcher with one LoRA. Txt2img, img2img, any sampler and batch size, AND.
"""

import ast
import importlib.util
import math
from types import SimpleNamespace

from modules import prompt_parser, sd_samplers_cfg_denoiser
from modules.processing import StableDiffusionProcessing

from . import omega, run


def begin_pass(p):
    run["states"] = [SimpleNamespace(unet=unet, texts=texts(p, clip)) for unet, clip in patchers(p)]


def patchers(p):
    """UNet and text encoder of the base, then of every LoRA of the prompt alone."""
    import networks

    original = p.sd_model.forge_objects_original
    base = p.sd_model.forge_objects.unet.clone()
    if hasattr(base, "lora_patches"):
        base.lora_patches = {}
    else:
        base.patches, base.patches_uuid = {}, original.unet.patches_uuid
    pairs = [(base, original.clip)]
    for path, unet, text, *online in ast.literal_eval(p.sd_model.current_lora_hash):
        # Merged on the fly, as the host may be set to, a LoRA isn't rounded to what the weights are stored in.
        mode = {"online_mode": online[0]} if online else {}
        file = dict(networks.load_lora_state_dict(path))
        pairs.append(
            networks.load_lora_for_models(base, original.clip, file, unet, text, filename=path, **mode)
        )
    return pairs


def texts(p, clip):
    """The pass's conditioning with this text encoder, past the host's caches."""
    names = ("c", "uc", "hr_c", "hr_uc", "cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")
    before = {name: getattr(p, name) for name in names if hasattr(p, name)}
    objects = p.sd_model.forge_objects
    clip_before, objects.clip = objects.clip, clip
    try:
        for name in before:
            if name.startswith("cached"):
                setattr(p, name, [None, None, None])
        if getattr(p, "is_hr_pass", False):
            p.hr_c = p.hr_uc = None
            p.calculate_hr_conds()
            return p.hr_c, p.hr_uc
        StableDiffusionProcessing.setup_conds(p)
        return p.c, p.uc
    finally:
        objects.clip = clip_before
        for name, value in before.items():
            setattr(p, name, value)


own = sd_samplers_cfg_denoiser.sampling_function


def install():
    in_reforge = importlib.util.find_spec("ldm_patched") is not None
    sd_samplers_cfg_denoiser.sampling_function = of_reforge if in_reforge else of_backend


def of_backend(denoiser, denoiser_params, cond_scale, cond_composition, **rest):
    """In the place of Forge's and Forge Neo's sampling function."""
    if not run:
        return own(
            denoiser,
            denoiser_params=denoiser_params,
            cond_scale=cond_scale,
            cond_composition=cond_composition,
            **rest,
        )
    from backend.sampling.sampling_function import sampling_prepare

    objects = run["p"].sd_model.forge_objects
    before = objects.unet, denoiser_params.text_cond, denoiser_params.text_uncond
    guided = denoiser_params.text_uncond is not None and not math.isclose(cond_scale, 1.0)

    def predict(state, part):
        objects.unet = state.unet
        sampling_prepare(state.unet, x=denoiser_params.x)
        cond, uncond = state.texts
        denoiser_params.text_cond = prompt_parser.reconstruct_multicond_batch(cond, denoiser.step)[1]
        if denoiser_params.text_uncond is not None:
            denoiser_params.text_uncond = prompt_parser.reconstruct_cond_batch(uncond, denoiser.step)
        alone = [[(parts[part][0], 1.0)] for parts in cond_composition]
        return own(
            denoiser,
            denoiser_params=denoiser_params,
            cond_scale=cond_scale,
            cond_composition=alone,
            **rest,
        )[1:]

    try:
        strengths = [weight for _, weight in cond_composition[0]]
        result = compose(predict, strengths, denoiser_params.x, cond_scale if guided else None)
    finally:
        objects.unet, denoiser_params.text_cond, denoiser_params.text_uncond = before
    return result, result, result


def of_reforge(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None):
    """In the place of reForge's sampling function."""
    if not run:
        return own(model, x, timestep, uncond, cond, cond_scale, model_options or {}, seed)
    from ldm_patched.modules.samplers import calc_cond_batch
    from modules_forge import forge_sampler

    step = run["p"].sampler.model_wrap_cfg.step
    guided = uncond is not None and not math.isclose(cond_scale, 1.0)

    def predict(state, part):
        forge_sampler.sampling_prepare(state.unet, x=x)
        weights, text = prompt_parser.reconstruct_multicond_batch(state.texts[0], step)
        conds = forge_sampler.cond_from_a1111_to_patched_ldm_weighted(text, weights)
        text = prompt_parser.reconstruct_cond_batch(state.texts[1], step)
        unconds = forge_sampler.cond_from_a1111_to_patched_ldm(text)
        # The host has hung its ControlNet on the conditions that it made.
        control = {"control": cond[0]["control"]} if "control" in cond[0] else {}
        unconds = [{**each, **control} for each in unconds]
        both = [{**conds[part], **control, "strength": 1.0}], unconds if guided else None
        return calc_cond_batch(state.unet.model, list(both), x, timestep, state.unet.model_options)

    return compose(predict, [entry["strength"] for entry in cond], x, cond_scale if guided else None)


def compose(predict, strengths, x, cond_scale):
    """`predict(state, part)` gives the denoised latents with and without the part's text. `cond_scale` None: no guidance."""
    z, knobs, states = x.double(), run["knobs"], run["states"]
    total, of_parts = 0.0, []
    for part, strength in enumerate(strengths):
        conds, unconds = zip(*(predict(state, part) for state in states), strict=True)
        conds = [each.double() for each in conds]
        noise = [z - each for each in conds]
        of_parts.append(omega(noise, knobs))
        total = total + strength * sum(w[:, None] * e for w, e in zip(of_parts[-1], conds[1:], strict=True))
    cond = total / sum(strengths)
    if cond_scale is None:
        return cond.to(x)
    unconds = [each.double() for each in unconds]
    weights = [sum(own) / len(of_parts) for own in zip(*of_parts, strict=True)]
    mixed = sum(w[:, None] * each for w, each in zip(weights, unconds[1:], strict=True))
    uncond = knobs["recentre"] * unconds[0] + (1 - knobs["recentre"]) * mixed
    return (uncond + cond_scale * sum(strengths) * (cond - uncond)).to(x)


def weights():
    return {
        key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_"): weight
        for key, weight in unet().model.state_dict().items()
        if key.startswith("diffusion_model.") and key.endswith(".weight")
    }


def change(lora, layer, before):
    """Forge and Forge Neo; reForge merges elsewhere."""
    import networks
    from backend.patcher.lora import load_lora, merge_lora_to_weight, model_lora_keys_unet

    networks.list_available_networks()
    state = networks.load_lora_state_dict(networks.available_networks[lora].filename)
    patches, _ = load_lora(state, model_lora_keys_unet(unet().model, {}))
    key = next(
        key for key in patches
        if key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_") == layer
    )  # fmt: skip
    return merge_lora_to_weight([(1.0, patches[key], 1.0, None, None)], before.clone(), key) - before


def unet():
    from modules import shared

    return shared.sd_model.forge_objects_original.unet
