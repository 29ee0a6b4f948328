"""The ways in which a WebUI makes pictures, as fields of its API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .client import SIZE, encoded

Tagged = Callable[..., str]
"""Makes a prompt: text with `<lora:…>` tags appended."""


@dataclass(frozen=True)
class Scenario:
    """One way to make a picture.

    Attributes:
        name: the test's. kind: txt2img or img2img.
        text: the prompt without its LoRAs.
        fields: of the API call. options: settings of the WebUI for this call only.
        checkpoint: key of another checkpoint that is needed ("inpainting", "refiner", "v2", "xl").
        second_pass: whether a hires prompt with its own LoRAs is added.
        exact: whether the WebUI's own picture is what composing must equal. A1111 1.10.1 loses the prompt's LoRAs when it
            loads a refiner from disk (its `get_empty_cond` activates none); composed passes keep them.
    """

    name: str
    kind: str = "txt2img"
    text: str = "a red circle"
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    second_pass: bool = False
    exact: bool = True


def _picture(size: int = SIZE) -> np.ndarray:
    """A red disc on a green to blue gradient."""
    y, x = np.mgrid[:size, :size] / size
    picture = np.stack([0 * x, 1 - y, x], axis=-1)
    picture[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.06] = (0.9, 0.1, 0.1)
    return (picture * 255).astype(np.uint8)


def _mask(size: int = SIZE) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : 3 * size // 4, size // 3 :] = 255
    return mask


INIT = {"init_images": [encoded(_picture())], "denoising_strength": 0.7}
INPAINT = {**INIT, "mask": encoded(_mask()), "mask_blur": 2, "inpaint_full_res": False, "inpainting_fill": 1}
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 3,
    "hr_additional_modules": ["Use same choices"],  # Forge's own API call fails without
}
KINDS: dict[str, dict[str, Any]] = {"txt2img": {}, "img2img": INIT, "inpainting": INPAINT}
"""What a picture is made of, and the fields that it takes."""

LONG = "a red circle on a wide green field under a deep blue sky, " * 8
CALLS = {"batch_cond_uncond": False}

ONCE = [
    Scenario("txt2img"),
    Scenario("another size", fields={"width": SIZE * 3 // 2, "height": SIZE}),
    Scenario("batch size and count", fields={"batch_size": 2, "n_iter": 2}),
    Scenario("variation seed", fields={"subseed": 3, "subseed_strength": 0.4}),
    Scenario("CFG 1", fields={"cfg_scale": 1.0}),
    Scenario("no negative prompt", fields={"negative_prompt": ""}),
    Scenario("emphasis", text="a (red:1.4) [circle] on ((green))"),
    Scenario("emphasis, no norm", text="a (red:1.4) circle", options={"emphasis": "No norm"}),
    Scenario("BREAK", text="a red circle BREAK a green field"),
    Scenario("AND", text="a red circle AND a green field :0.6"),
    Scenario("AND, batch", text="a red circle AND a green field :0.6 AND blue", fields={"batch_size": 2}),
    Scenario("AND, one row a call", text="a red circle AND a green field :0.6", options=CALLS),
    Scenario("prompt editing", text="a [red:blue:0.5] [circle|square] [in rain::2]"),
    Scenario("prompt editing, Heun", text="a [red:blue:0.5] circle", fields={"sampler_name": "Heun"}),
    Scenario("long prompt", text=LONG),
    Scenario("long negative prompt", fields={"negative_prompt": LONG}),
    Scenario("long prompt, padded", text=LONG, options={"pad_cond_uncond": True}),
    Scenario("long prompt, padded as before 1.6", text=LONG, options={"pad_cond_uncond_v0": True}),
    Scenario("long prompt, one row a call", text=LONG, fields={"batch_size": 2}, options=CALLS),
    Scenario("clip skip", options={"CLIP_stop_at_last_layers": 2}),
    Scenario("NGMS", options={"s_min_uncond": 3.0}),
    Scenario("NGMS, all steps", options={"s_min_uncond": 3.0, "s_min_uncond_all": True}),
    Scenario("skip early CFG", options={"skip_early_cond": 0.4}),
    Scenario("skip early CFG, long prompt", text=LONG, options={"skip_early_cond": 0.4}),
    Scenario("one row a call", options=CALLS),
    Scenario("lora_functional", options={"lora_functional": True}),
    Scenario("tiling", fields={"tiling": True}),
    Scenario("token merging", options={"token_merging_ratio": 0.5}),
    Scenario("hypertile", options={"hypertile_enable_unet": True, "hypertile_max_tile_unet": 64}),
    Scenario("live preview", options={"live_previews_enable": True, "show_progress_every_n_steps": 1}),
    Scenario("no conds cache", options={"persistent_cond_cache": False}),
    Scenario("DDIM, prompt editing, AND", text="a [red:blue:0.5] circle AND sea", fields={"sampler_name": "DDIM"}),
    Scenario("DDIM, NGMS", fields={"sampler_name": "DDIM"}, options={"s_min_uncond": 400.0}),
    Scenario("hires fix", fields=HIRES),
    Scenario("hires fix, other upscaler", fields={**HIRES, "hr_upscaler": "Lanczos"}),
    Scenario("hires fix, batch", fields={**HIRES, "batch_size": 2, "n_iter": 2}),
    Scenario("hires fix, DDIM after Euler", fields={**HIRES, "hr_sampler_name": "DDIM"}),
    Scenario("hires fix, Heun, editing", text="a [red:blue:1.5] circle", fields={**HIRES, "hr_sampler_name": "Heun"}),
    Scenario("hires fix, first pass conds", fields=HIRES, options={"hires_fix_use_firstpass_conds": True}),
    Scenario("hires fix, other prompt and LoRAs", fields=HIRES, second_pass=True),
    Scenario("refiner", fields={"refiner_switch_at": 0.5}, checkpoint="refiner", exact=False),
    Scenario("refiner, kept in memory", fields={"refiner_switch_at": 0.5}, checkpoint="refiner", exact=False,
             options={"sd_checkpoints_limit": 2}),
    Scenario("refiner by sampling steps", fields={"refiner_switch_at": 0.5}, checkpoint="refiner", exact=False,
             options={"refiner_switch_by_sample_steps": True}),
    Scenario("refiner, DDIM", fields={"refiner_switch_at": 0.5, "sampler_name": "DDIM"}, checkpoint="refiner", exact=False),
    Scenario("refiner in hires fix", fields={**HIRES, "refiner_switch_at": 0.7}, checkpoint="refiner", exact=False),
    Scenario("img2img", "img2img", fields=INIT),
    Scenario("img2img, DDIM", "img2img", fields={**INIT, "sampler_name": "DDIM"}),
    Scenario("img2img, exact steps", "img2img", fields=INIT, options={"img2img_fix_steps": True}),
    Scenario("img2img, batch", "img2img", fields={**INIT, "batch_size": 2}),
    *(Scenario(f"inpainting, masked content {fill}", "img2img", fields={**INPAINT, "inpainting_fill": number})
      for number, fill in enumerate(("fill", "original", "latent noise", "latent nothing"))),
    Scenario("inpainting, only masked", "img2img", fields={**INPAINT, "inpaint_full_res": True, "inpaint_full_res_padding": 16}),
    Scenario("inpainting, not masked", "img2img", fields={**INPAINT, "inpainting_mask_invert": 1}),
    Scenario("inpainting, DDIM", "img2img", fields={**INPAINT, "sampler_name": "DDIM"}),
    Scenario("inpainting checkpoint, txt2img", checkpoint="inpainting"),
    Scenario("inpainting checkpoint", "img2img", fields=INPAINT, checkpoint="inpainting"),
    Scenario("inpainting checkpoint, hires fix", fields={**HIRES, "hr_upscaler": "Lanczos"}, checkpoint="inpainting"),
    Scenario("SD 2, v-prediction", checkpoint="v2"),
    Scenario("SD 2, DDIM", fields={"sampler_name": "DDIM"}, checkpoint="v2"),
    Scenario("SD 2, img2img", "img2img", fields=INIT, checkpoint="v2"),
    Scenario("SDXL", checkpoint="xl"),
    Scenario("SDXL, DDIM", fields={"sampler_name": "DDIM"}, checkpoint="xl"),
    Scenario("SDXL, long prompt", text=LONG, checkpoint="xl"),
    Scenario("SDXL, long prompt, padded", text=LONG, options={"pad_cond_uncond": True}, checkpoint="xl"),
    Scenario("SDXL, AND", text="a red circle AND a green field", checkpoint="xl"),
    Scenario("SDXL, hires fix", fields=HIRES, checkpoint="xl"),
    Scenario("SDXL, batch", fields={"batch_size": 2, "n_iter": 2}, checkpoint="xl"),
    Scenario("SDXL, img2img, batch", "img2img", fields={**INIT, "batch_size": 2}, checkpoint="xl"),
    Scenario("SDXL, inpainting", "img2img", fields=INPAINT, checkpoint="xl"),
]  # fmt: skip


def _in_batches(once: list[Scenario]) -> Iterator[Scenario]:
    """Each with two batches of two pictures; what txt2img makes also in img2img and in inpainting, but for hires fix."""
    batches = {"batch_size": 2, "n_iter": 2}
    for scenario in once:
        if scenario.kind != "txt2img" or "enable_hr" in scenario.fields:
            yield replace(scenario, name=f"{scenario.name}; 2x2", fields={**scenario.fields, **batches})
            continue
        for name, start in KINDS.items():
            yield replace(
                scenario,
                name=f"{scenario.name}; {name} 2x2",
                kind="img2img" if start else "txt2img",
                fields={**start, **scenario.fields, **batches},
            )


SCENARIOS = [*ONCE, *_in_batches(ONCE)]
