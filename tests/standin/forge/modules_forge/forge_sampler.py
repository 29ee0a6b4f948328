"""From the WebUI's conditioning to `ldm_patched`'s, and its modifiers, which come before the sampling function."""

from ldm_patched.modules.conds import CONDCrossAttn
from ldm_patched.modules.samplers import sampling_function


def cond_from_a1111_to_patched_ldm(cond):
    return [{"cross_attn": cond, "model_conds": {"c_crossattn": CONDCrossAttn(cond)}}]


def cond_from_a1111_to_patched_ldm_weighted(cond, weights):
    results = []
    for part in zip(*weights, strict=False):
        h = cond_from_a1111_to_patched_ldm(cond[[index for index, _ in part]])
        h[0]["strength"] = part[0][1]
        results += h
    return results


def forge_sample(denoiser, x, sigma, text_cond, weights, text_uncond, cond_scale):
    unet = denoiser.inner_model.inner_model.forge_objects.unet
    model, options, seed = unet.model, unet.model_options, denoiser.p.seed
    uncond = cond_from_a1111_to_patched_ldm(text_uncond)
    cond = cond_from_a1111_to_patched_ldm_weighted(text_cond, weights)
    if unet.controlnet_linked_list is not None:
        for entry in cond + uncond:
            entry["control"] = unet.controlnet_linked_list
    for modifier in options.get("conditioning_modifiers", []):
        model, x, sigma, uncond, cond, cond_scale, options, seed = modifier(
            model, x, sigma, uncond, cond, cond_scale, options, seed
        )
    return sampling_function(model, x, sigma, uncond, cond, cond_scale, options, seed)
