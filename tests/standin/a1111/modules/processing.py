"""A job, and its samplers."""

from types import SimpleNamespace

import networks
import torch
from PIL import Image
from modules import devices, prompt_parser, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_common import InterruptedException
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps


class Sampler:
    def __init__(self, name, p):
        self.p = p
        self.model_wrap_cfg = (CFGDenoiserTimesteps if name == "DDIM" else CFGDenoiser)(self)
        self.takes_noise = name == "DDIM"
        self.sampler_extra_args = {}
        self.last_latent = None

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = self.model_wrap_cfg.total_steps = steps
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def sample(self, p, x, cond, uncond):
        self.model_wrap_cfg.step = 0
        self.sampler_extra_args = {
            "cond": cond,
            "image_cond": x.new_zeros(len(x), 1, 1, 1),
            "uncond": uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": p.s_min_uncond,
        }
        return self.launch_sampling(p.steps, lambda: self.loop(x * 10, p.steps))

    def loop(self, x, steps):
        sigmas = torch.linspace(10, 0, steps + 1)
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            out = self.model_wrap_cfg(x, now.repeat(len(x)), **self.sampler_extra_args)
            x = x + (out if self.takes_noise else (x - out) / now) * (then - now)
        return x


class StableDiffusionProcessing:
    cached_uc = [None, None]
    cached_c = [None, None]

    def __init__(self, prompts, negative, **fields):
        self.prompts, self.negative_prompts = list(prompts), [negative] * len(prompts)
        self.steps, self.cfg_scale, self.s_min_uncond = 4, 5.0, 0.0
        self.size, self.seed, self.sampler_name = (8, 8), 1, "Euler"
        self.extra_network_data, self.hr_extra_network_data = {}, None
        self.hr_prompts, self.hr_negative_prompts = None, None
        self.is_hr_pass, self.iteration = False, 0
        self.refiner, self.refiner_switch_at = None, None
        self.c = self.uc = self.hr_c = self.hr_uc = self.sampler = None
        self.extra_generation_params, self.comments = {}, {}
        self.width = self.height = 64
        self.hr_upscale_to_x = self.hr_upscale_to_y = 128
        # In a WebUI `script_args` are those of all scripts; here they are the one script's, unless it has `own_args`.
        self.events, self.script, self.script_args, self.own_args, self.n_iter = [], None, (), None, 1
        self.all_hr_prompts, self.paste_to = None, None
        self.batch_size, self.do_not_save_grid = len(self.prompts), True
        for name, value in fields.items():
            setattr(self, name, value)

    def comment(self, text):
        self.comments[text] = 1

    def parse_extra_network_prompts(self):
        """The tags of a job come apart from its prompts."""

    def get_conds_with_caching(
        self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None
    ):
        key = tuple(required_prompts), steps, hires_steps, repr(extra_network_data), shared.sd_model.name
        for cache in caches:
            if cache[0] == key:
                return cache[1]
        with devices.autocast():
            caches[0][:] = key, function(shared.sd_model, required_prompts, steps, hires_steps, False)
        return caches[0][1]

    def setup_conds(self):
        positive = prompt_parser.SdConditioning(self.prompts, width=self.width, height=self.height)
        negative = prompt_parser.SdConditioning(self.negative_prompts, True, self.width, self.height)
        data = self.extra_network_data
        self.uc = self.get_conds_with_caching(
            prompt_parser.get_learned_conditioning, negative, self.steps, [self.cached_uc], data
        )
        self.c = self.get_conds_with_caching(
            prompt_parser.get_multicond_learned_conditioning, positive, self.steps, [self.cached_c], data
        )

    def get_conds(self):
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else (self.c, self.uc)

    def init(self):
        pass

    def fire(self, event, *args, **kwargs):
        scripts = [script for own, script in self.events if own == event]
        if self.script is not None:
            own = self.script_args if self.own_args is None else self.own_args
            scripts.append(lambda p: getattr(self.script, event)(p, *args, *own, **kwargs))
        for script in scripts:
            try:
                script(self)
            except Exception as problem:
                print("Error running", event, repr(problem))

    def activate(self, data):
        """`data`: {"lora": [tag, …]}, a tag with `net`, `te`, `unet`, `positional`, `named`."""
        networks.loaded_networks.clear()
        for tag in (data or {}).get("lora", ()):
            tag.net.te_multiplier, tag.net.unet_multiplier = tag.te, tag.unet
            networks.loaded_networks.append(tag.net)


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_uc = [None, None]
    cached_hr_c = [None, None]

    def setup_conds(self):
        if self.is_hr_pass:
            self.hr_c = None
            self.calculate_hr_conds()
            return
        super().setup_conds()
        self.hr_uc = self.hr_c = None

    def calculate_hr_conds(self):
        if self.hr_c is not None:
            return
        positive, negative = (
            prompt_parser.SdConditioning(self.hr_prompts),
            prompt_parser.SdConditioning(self.hr_negative_prompts, True),
        )
        data = self.hr_extra_network_data
        self.hr_uc = self.get_conds_with_caching(
            prompt_parser.get_learned_conditioning,
            negative,
            self.steps,
            [self.cached_hr_uc],
            data,
            self.steps,
        )
        self.hr_c = self.get_conds_with_caching(
            prompt_parser.get_multicond_learned_conditioning,
            positive,
            self.steps,
            [self.cached_hr_c],
            data,
            self.steps,
        )

    def sample(self, conditioning, unconditional_conditioning):
        generator = torch.Generator().manual_seed(self.seed)
        self.sampler = Sampler(self.sampler_name, self)
        self.fire("process_before_every_sampling")
        x = torch.randn(len(self.prompts), 4, *self.size, generator=generator)
        samples = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
        if self.hr_prompts is None or shared.state.interrupted:
            return samples
        self.is_hr_pass = True
        self.sampler = Sampler(self.sampler_name, self)
        self.activate(self.hr_extra_network_data)
        self.calculate_hr_conds()
        self.fire("process_before_every_sampling")
        x = torch.nn.functional.interpolate(samples, scale_factor=2.0) / 10
        samples = self.sampler.sample(self, x, self.hr_c, self.hr_uc)
        self.is_hr_pass = False
        return samples


class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """One sampler for all batches."""

    def init(self):
        self.sampler = Sampler(self.sampler_name, self)

    def sample(self, conditioning, unconditional_conditioning):
        generator = torch.Generator().manual_seed(self.seed + self.iteration)
        x = torch.randn(len(self.prompts), 4, *self.size, generator=generator)
        self.fire("process_before_every_sampling")
        return self.sampler.sample(self, x, conditioning, unconditional_conditioning)


def process_images(p):
    """The samples of all batches."""
    with torch.no_grad():
        p.fire("before_process")
        p.fire("process")
        p.init()
        batches, model = [], shared.sd_model
        for iteration in range(p.n_iter):
            p.iteration = iteration
            shared.sd_model = model  # a refiner may have taken its place
            p.fire("before_process_batch", prompts=p.prompts)
            p.parse_extra_network_prompts()
            p.activate(p.extra_network_data)
            p.fire("process_batch")
            p.setup_conds()
            batches.append(p.sample(conditioning=p.c, unconditional_conditioning=p.uc))
            p.fire("postprocess_batch")
        samples = torch.cat(batches)
        infotext = ", ".join(f"{key}: {value}" for key, value in p.extra_generation_params.items())
        pictures = [
            Image.fromarray((sample[:3].sigmoid() * 255).byte().permute(1, 2, 0).numpy().copy())
            for sample in samples
        ]
        p.processed = SimpleNamespace(
            images=pictures, infotexts=[infotext] * len(samples), index_of_first_image=0
        )
        p.fire("postprocess", p.processed)
        return samples
