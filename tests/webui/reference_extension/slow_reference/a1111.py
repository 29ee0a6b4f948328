"""AUTOMATIC1111's WebUI: its LoRAs are switched, and so merged anew, for every pass. Txt2img and img2img, any batch size."""

import networks
import torch
from modules import devices, prompt_parser, script_callbacks, sd_samplers, shared

from . import omega, run


def begin_pass(p):
    run["loras"] = list(networks.loaded_networks)
    run["texts"] = [texts(p, [])] + [texts(p, [lora]) for lora in run["loras"]]


def texts(p, loras):
    networks.loaded_networks[:] = loras
    try:
        steps = sd_samplers.find_sampler_config(p.sampler_name).total_steps(p.steps)
        positive = prompt_parser.SdConditioning(p.prompts, width=p.width, height=p.height)
        negative = prompt_parser.SdConditioning(
            p.negative_prompts, width=p.width, height=p.height, is_negative_prompt=True
        )
        with devices.autocast():
            return (
                prompt_parser.get_multicond_learned_conditioning(shared.sd_model, positive, steps),
                prompt_parser.get_learned_conditioning(shared.sd_model, negative, steps),
            )
    finally:
        networks.loaded_networks[:] = run["loras"]


def before(params):
    if run:
        run["x"], run["sigma"], run["image"], run["denoiser"] = (
            params.x.clone(),
            params.sigma,
            params.image_cond,
            params.denoiser,
        )


def after(params):
    if not run:
        return
    denoiser, loras = run["denoiser"], run["loras"]
    is_noise = "Timesteps" in type(denoiser).__name__
    conds, unconds = [], []
    for active, (positive, negative) in zip([[]] + [[lora] for lora in loras], run["texts"], strict=True):
        networks.loaded_networks[:] = active
        parts, cond = prompt_parser.reconstruct_multicond_batch(positive, denoiser.step)
        uncond = prompt_parser.reconstruct_cond_batch(negative, denoiser.step)
        count = len(run["x"]) - len(run["p"].prompts)
        both = []
        for text, part in ((cond, slice(0, count)), (uncond, slice(count, None))):
            crossattn = {**text} if isinstance(text, dict) else {"c_crossattn": [text]}
            both.append(
                params.inner_model(
                    run["x"][part],
                    run["sigma"][part],
                    cond={**crossattn, "c_concat": [run["image"][part]]},
                ).double()
            )
        conds.append(both[0])
        unconds.append(both[1])
    networks.loaded_networks[:] = loras
    z = run["x"][: len(conds[0])].double()
    weights = omega([e if is_noise else z - e for e in conds], run["knobs"])
    cond = sum(w[:, None] * e for w, e in zip(weights, conds[1:], strict=True))
    lam = run["knobs"]["recentre"]
    # A prompt with AND has several conditional rows for an image, whose one unconditional row gets their mean weights.
    means = [torch.stack([w[[row for row, _ in part]].mean(dim=0) for part in parts]) for w in weights]
    uncond = lam * unconds[0] + (1 - lam) * sum(
        w[:, None] * e for w, e in zip(means, unconds[1:], strict=True)
    )
    params.x.copy_(torch.cat([cond, uncond]))


def install():
    script_callbacks.on_cfg_denoiser(before)
    script_callbacks.on_cfg_denoised(after)


def weights():
    return {
        name.removeprefix("diffusion_model_"): module.weight
        for name, module in shared.sd_model.network_layer_mapping.items()
        if name.startswith("diffusion_model_") and getattr(module, "weight", None) is not None
    }


def change(lora, layer, before):
    networks.list_available_networks()
    network = networks.load_network(lora, networks.available_networks[lora])
    return network.modules[f"diffusion_model_{layer}"].calc_updown(before)[0]
