"""One guided step."""

import torch
from modules import prompt_parser, shared
from modules.script_callbacks import CFGDenoiserParams, cfg_denoiser_callback
from modules.sd_samplers_common import InterruptedException
from modules.shared import opts


def catenate_conds(conds):
    if isinstance(conds[0], dict):
        return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
    return torch.cat(conds)


def subscript_cond(cond, a, b):
    return {key: value[a:b] for key, value in cond.items()} if isinstance(cond, dict) else cond[a:b]


class ModelWrapper(torch.nn.Module):
    """k-diffusion's: makes a denoised latent of the model's noise."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, cond):
        return x - sigma.view(-1, 1, 1, 1) * self.inner_model.apply_model(x, sigma, cond)


class CFGDenoiser(torch.nn.Module):
    wrapper = ModelWrapper

    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.p = sampler, sampler.p
        self.model_wrap = None
        self.steps = self.total_steps = None
        self.step = 0
        self.cond_scale_miltiplier = 1.0

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = self.wrapper(shared.sd_model)
        return self.model_wrap

    def pad_cond_uncond(self, cond, uncond):
        def padded(text, length):
            if isinstance(text, dict):
                text["crossattn"] = padded(text["crossattn"], length)
                return text
            return torch.cat([text, text[:, -1:].repeat(1, length - text.shape[1], 1) * 0], dim=1)

        length = max(cond.shape[1], uncond.shape[1])
        return padded(cond, length), padded(uncond, length)

    def apply_refiner(self):
        p = self.p
        late = p.refiner_switch_at is not None and self.step / self.total_steps >= p.refiner_switch_at
        if not late or p.refiner is None or shared.sd_model is p.refiner:
            return
        shared.sd_model = p.refiner
        p.setup_conds()
        self.model_wrap = None
        self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"] = p.get_conds()

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted:
            raise InterruptedException
        self.apply_refiner()
        cond, uncond = self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"]
        parts, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        batch = len(parts)
        rows = [image for image, part in enumerate(parts) for _ in part]
        params = CFGDenoiserParams(
            torch.cat([x[rows], x]),
            torch.cat([image_cond[rows], image_cond]),
            torch.cat([sigma[rows], sigma]),
            tensor,
            uncond,
            self,
        )
        cfg_denoiser_callback(params)
        x_in, image, sigma_in = params.x, params.image_cond, params.sigma
        tensor, uncond = params.text_cond, params.text_uncond
        skip = opts.skip_early_cond != 0 and self.step / self.total_steps <= opts.skip_early_cond
        on_turn = self.step % 2 or opts.s_min_uncond_all
        if skip or (on_turn and s_min_uncond > 0 and sigma[0] < s_min_uncond):
            skip = True
            x_in, sigma_in = x_in[:-batch], sigma_in[:-batch]
        if opts.pad_cond_uncond and tensor.shape[1] != uncond.shape[1]:
            tensor, uncond = self.pad_cond_uncond(tensor, uncond)
        x_out = self.run(x_in, sigma_in, tensor, None if skip else uncond, image, batch)
        if skip:
            x_out = torch.cat([x_out, torch.cat([x_out[part[0][0]][None] for part in parts])])
        denoised_uncond = x_out[-batch:]
        denoised = denoised_uncond.clone()
        scale = 1.0 if skip else cond_scale * self.cond_scale_miltiplier
        for image_number, part in enumerate(parts):
            for index, weight in part:
                denoised[image_number] += (x_out[index] - denoised_uncond[image_number]) * (weight * scale)
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised

    def run(self, x, sigma, tensor, uncond, image, batch):
        def call(a, b, text):
            crossattn = text if isinstance(text, dict) else {"c_crossattn": [text]}
            return self.inner_model(x[a:b], sigma[a:b], cond={**crossattn, "c_concat": [image[a:b]]})

        if uncond is None or tensor.shape[1] == uncond.shape[1]:
            text = tensor if uncond is None else catenate_conds([tensor, uncond])
            size = len(x) if opts.batch_cond_uncond else batch
            return torch.cat(
                [call(a, a + size, subscript_cond(text, a, a + size)) for a in range(0, len(x), size)]
            )
        size = batch * 2 if opts.batch_cond_uncond else batch
        count = tensor.shape[0]
        out = [
            call(a, min(a + size, count), subscript_cond(tensor, a, min(a + size, count)))
            for a in range(0, count, size)
        ]
        return torch.cat([*out, call(len(x) - batch, len(x), uncond)])
