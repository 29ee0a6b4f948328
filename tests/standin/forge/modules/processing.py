"""A job, its sampler and a guided step."""

from types import SimpleNamespace

import networks
import torch
from backend.sampling.sampling_function import sampling_function, sampling_prepare
from modules import prompt_parser, shared
from modules.sd_samplers_common import InterruptedException
from modules_forge.forge_sampler import forge_sample


class CFGDenoiser:
    def __init__(self, sampler):
        self.sampler, self.p = sampler, sampler.p
        self.steps = self.total_steps = None
        self.step = 0
        self.model_wrap = None

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = SimpleNamespace(inner_model=shared.sd_model)
        return self.model_wrap

    def __call__(self, x, sigma, cond, uncond, cond_scale):
        if shared.state.interrupted:
            raise InterruptedException
        if self.apply_refiner():
            cond, uncond = self.sampler.conds
        parts, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = None if uncond is None else prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.p.is_hr_pass:
            cond_scale = self.p.hr_cfg
        sample = forge_sample if self.p.sd_model.variant == "reforge" else sampling_function
        denoised = sample(self, x, sigma, tensor, parts, uncond, cond_scale)
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised

    def apply_refiner(self):
        p = self.p
        if p.refiner is None or self.step / self.total_steps < p.refiner_switch_at or p.sd_model is p.refiner:
            return self.sampler.conds is not None
        p.extra_generation_params["Refiner"] = p.refiner.name
        shared.sd_model = p.refiner
        networks.activate(p.extra_network_data)
        p.setup_conds()
        self.update_inner_model()
        sampling_prepare(p.sd_model.forge_objects.unet)
        return True

    def update_inner_model(self):
        self.model_wrap = None
        self.sampler.conds = self.p.c, self.p.uc


class Sampler:
    conds = None

    def __init__(self, p, second_order=False):
        self.p, self.second_order = p, second_order
        self.model_wrap_cfg = CFGDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.last_latent = None

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = steps * (2 if self.second_order else 1)
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def sample(self, p, x, cond, uncond):
        self.model_wrap_cfg.step, self.conds = 0, None
        sampling_prepare(self.model_wrap.inner_model.forge_objects.unet)
        return self.launch_sampling(p.steps, lambda: self.loop(x * 10, p.steps, cond, uncond))

    def loop(self, x, steps, cond, uncond):
        sigmas = torch.linspace(10, 0, steps + 1)
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            args = now.repeat(len(x)), cond, uncond, self.p.cfg_scale
            if self.second_order:
                self.model_wrap_cfg(x, *args)
            x = x + (x - self.model_wrap_cfg(x, *args)) / now * (then - now)
        return x


class StableDiffusionProcessing:
    cached_uc = [None, None, None]
    cached_c = [None, None, None]
    cached_hr_uc = [None, None, None]
    cached_hr_c = [None, None, None]

    def __init__(self, prompts, negative, **fields):
        self.refiner, self.refiner_switch_at = None, 0.5
        self.prompts, self.negative_prompts = list(prompts), [negative] * len(prompts)
        self.steps, self.cfg_scale, self.hr_cfg = 4, 5.0, 1.0
        self.width = self.height = 64
        self.hr_upscale_to_x = self.hr_upscale_to_y = 128
        self.shape, self.seed, self.second_order = (4, 8, 8), 1, False
        self.extra_network_data, self.hr_extra_network_data = {}, None
        self.hr_prompts = None
        self.is_hr_pass, self.iteration = False, 0
        self.c = self.uc = self.hr_c = self.hr_uc = self.sampler = None
        self.extra_generation_params, self.comments = {}, {}
        self.events, self.n_iter = [], 1
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def sd_model(self):
        return shared.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def get_conds_with_caching(self, function, prompts, steps, caches, extra_network_data, hires_steps=None):
        key = tuple(prompts), steps, hires_steps, repr(extra_network_data), shared.sd_model.name
        for cache in caches:
            if cache[0] == key:
                return cache[1]
        caches[0][:2] = key, function(shared.sd_model, prompts, steps, hires_steps)
        return caches[0][1]

    def _conds(self, prompts, caches, data, cfg):
        negative = prompt_parser.SdConditioning(self.negative_prompts[: len(prompts)], True)
        positive = prompt_parser.SdConditioning(prompts)
        get = self.get_conds_with_caching
        uc = None
        if cfg != 1 or self.sd_model.variant == "reforge":
            uc = get(prompt_parser.get_learned_conditioning, negative, self.steps, [caches[1]], data)
        c = get(prompt_parser.get_multicond_learned_conditioning, positive, self.steps, [caches[0]], data)
        return c, uc

    def setup_conds(self):
        caches = self.cached_c, self.cached_uc
        self.c, self.uc = self._conds(self.prompts, caches, self.extra_network_data, self.cfg_scale)

    def calculate_hr_conds(self):
        if self.hr_c is None:
            caches = self.cached_hr_c, self.cached_hr_uc
            self.hr_c, self.hr_uc = self._conds(
                self.hr_prompts, caches, self.hr_extra_network_data, self.hr_cfg
            )

    def reset_to_loras(self):
        self.sd_model.forge_objects = self.sd_model.forge_objects_after_applying_lora.shallow_copy()

    def sample(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.sampler = Sampler(self, self.second_order)
        self.reset_to_loras()
        self.fire("process_before_every_sampling")
        x = torch.randn(len(self.prompts), *self.shape, generator=generator)
        samples = self.sampler.sample(self, x, self.c, self.uc)
        if self.hr_prompts is None or shared.state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = Sampler(self, self.second_order)
        networks.activate(self.hr_extra_network_data)
        self.calculate_hr_conds()
        if self.sd_model.variant == "forge":
            self.fire("process_before_every_sampling")
        self.reset_to_loras()
        self.fire("process_before_every_sampling")
        x = torch.nn.functional.interpolate(samples, scale_factor=2.0) / 10
        samples = self.sampler.sample(self, x, self.hr_c, self.hr_uc)
        self.is_hr_pass = False
        return samples

    def init(self):
        pass

    def fire(self, event):
        for own, script in self.events:
            if own == event:
                try:
                    script(self)
                except Exception as problem:
                    print("Error running", event, problem)


class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """One sampler for all batches."""

    def init(self):
        self.sampler = Sampler(self, self.second_order)

    def sample(self):
        generator = torch.Generator().manual_seed(self.seed + self.iteration)
        self.reset_to_loras()
        x = torch.randn(len(self.prompts), *self.shape, generator=generator)
        self.fire("process_before_every_sampling")
        return self.sampler.sample(self, x, self.c, self.uc)


def process_images(p):
    """The samples of all batches."""
    with torch.no_grad():
        p.fire("process")
        p.init()
        batches, model = [], shared.sd_model
        for iteration in range(p.n_iter):
            p.iteration = iteration
            shared.sd_model = model  # a refiner may have taken its place
            p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
            networks.activate(p.extra_network_data)
            p.reset_to_loras()
            p.fire("process_batch")
            p.setup_conds()
            batches.append(p.sample())
            p.fire("postprocess_batch")
        return torch.cat(batches)
