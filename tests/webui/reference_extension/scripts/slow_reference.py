"""The slow reference, as an extension of its own: LoRAtorio by switching the WebUI's LoRAs for every pass.

Shares no code with LoRAtorio. Every pass runs through the WebUI's own merging, the composition is a loop over patches in
float64, as METHOD.md's formulas read. Only for plain jobs of AUTOMATIC1111's WebUI: txt2img and img2img, any batch size.
Its one argument is `{"patch_size": …, "temperature": …, "top_k": …, "recentre": …}`; without it it does nothing.
"""

import gradio as gr
import networks
import torch
from modules import devices, prompt_parser, script_callbacks, scripts, sd_samplers, shared

run = {}


class SlowReference(scripts.Script):
    def title(self):
        return "LoRAtorio slow reference"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.JSON(value=None, visible=False)]

    def process(self, p, knobs=None, *args):
        run.clear()
        if knobs:
            run.update(p=p, knobs=knobs)

    def process_before_every_sampling(self, p, knobs=None, *args, **kwargs):
        if not run:
            return
        run["loras"] = list(networks.loaded_networks)
        run["texts"] = [texts(p, [])] + [texts(p, [lora]) for lora in run["loras"]]

    def postprocess(self, p, processed, *args):
        run.clear()


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
    weights = omega(
        [e if is_noise else z - e for e in conds],
        **{k: run["knobs"][k] for k in ("patch_size", "temperature", "top_k")},
    )
    cond = sum(w[:, None] * e for w, e in zip(weights, conds[1:], strict=True))
    lam = run["knobs"]["recentre"]
    # A prompt with AND has several conditional rows for an image, whose one unconditional row gets their mean weights.
    means = [torch.stack([w[[row for row, _ in part]].mean(dim=0) for part in parts]) for w in weights]
    uncond = lam * unconds[0] + (1 - lam) * sum(
        w[:, None] * e for w, e in zip(means, unconds[1:], strict=True)
    )
    params.x.copy_(torch.cat([cond, uncond]))


def omega(noise, patch_size, temperature, top_k):
    base, adapters = noise[0], noise[1:]
    batch, _, height, width = base.shape
    weights = [torch.zeros(batch, height, width, dtype=torch.float64) for _ in adapters]
    for b in range(batch):
        for y in range(0, height, patch_size):
            for x in range(0, width, patch_size):
                patch = (b, slice(None), slice(y, y + patch_size), slice(x, x + patch_size))
                near = [
                    torch.nn.functional.cosine_similarity(
                        e[patch].flatten(), base[patch].flatten(), dim=0, eps=1e-30
                    )
                    for e in adapters
                ]
                shares = torch.softmax(-torch.stack(near) / temperature, dim=0)
                if top_k:
                    shares[torch.argsort(shares, descending=True)[top_k:]] = 0
                    shares = shares / shares.sum()
                for w, share in zip(weights, shares, strict=True):
                    w[b, y : y + patch_size, x : x + patch_size] = share
    return weights


script_callbacks.on_cfg_denoiser(before)
script_callbacks.on_cfg_denoised(after)
