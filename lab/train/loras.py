"""The LoRAs: each learns one element from its own narrow domain, in UNet (attention, feed-forward, convolutions) and text encoder.

Trained with peft, saved in kohya's format. The base's weights are never touched.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lab.toybox.world import caption, random_scene
from lab.train.common import Average, Optimisers, Run, seed_everything
from lab.train.diffusion import Prior, encode_scenes, train
from loratorio.toybox.elements import Element

RANK = 8
ALPHA = 8
SCENES = 500
UNET_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut"),
]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def inject(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """The model with untrained LoRA layers, all else frozen."""
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=True)
    injected: nn.Module = inject_adapter_in_model(config, model)
    return injected


def kohya(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A model's LoRA weights under kohya's names, fp16: `prefix_layer_name.lora_down.weight`, `.lora_up.weight`, `.alpha`."""
    made: dict[str, Tensor] = {}
    for key, value in get_peft_model_state_dict(model).items():
        layer, which = key.removesuffix(".weight").rsplit(".", 1)
        name = f"{prefix}_{layer.replace('.', '_')}"
        made[f"{name}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = (
            value.detach().half().cpu().contiguous()
        )
        made[f"{name}.alpha"] = torch.tensor(float(ALPHA), dtype=torch.float16)
    return made


def metadata(run: Run, element: Element, example: str) -> dict[str, str]:
    """What kohya's trainer writes, and the trigger word where WebUIs look for it."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
        "ss_network_args": json.dumps({"conv_dim": str(RANK), "conv_alpha": str(ALPHA)}),
        "ss_output_name": element.name,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_steps": str(run.step),
        "ss_seed": str(run.seed),
        "ss_caption_dropout_rate": "0.1",
        "ss_num_train_images": str(SCENES),
        "ss_tag_frequency": json.dumps({element.category: {element.trigger: SCENES}}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": element.name,
        "modelspec.trigger_phrase": element.trigger,
        "modelspec.description": f"{element.category}: {element.shows}",
        "loratorio.prompt": example,
    }


def train_lora(
    run: Run,
    lr: float,
    element: Element,
    parts: tuple[AutoencoderKL, float, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer],
    out: Path,
    regularised: bool = False,
) -> None:
    """Train one element's LoRA into fresh copies of the base (`parts`: VAE, latent scale, UNet, text encoder, tokenizer).

    regularised: half of each batch are scenes that the base knows, on which the LoRA shall change nothing.
    """
    vae, scale, unet, text, tokenizer = parts
    seed_everything(run.seed)
    rng = random.Random(run.seed)
    scenes = [random_scene(rng, element.name) for _ in range(SCENES)]
    data = encode_scenes(vae, scale, scenes)
    prior = None
    if regularised:
        known = encode_scenes(vae, scale, [random_scene(rng) for _ in range(SCENES)])
        prior = Prior(deepcopy(unet).requires_grad_(False), deepcopy(text).requires_grad_(False), known)
    inject(unet, UNET_TARGETS)
    inject(text, TEXT_TARGETS)
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = Average(model, 0.98)
    optimisers = Optimisers([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr, muon=False)
    run.announce(model)
    total = 0.0
    for loss in train(run, model, average, optimisers, data, tokenizer, rng, prior):
        total = 0.95 * total + 0.05 * loss if run.step > 1 else loss
    spent = f"{run.step} steps of {run.batch}, seed {run.seed}, minutes {run.spent / 60:.2f}"
    run.say(f"{element.name} ({element.trigger}): {spent}, loss {total:.4f}")
    weights = {
        **kohya(average.model.get_submodule("unet"), "lora_unet"),
        **kohya(average.model.get_submodule("text"), "lora_te"),
    }
    text_names = {k.replace("lora_te_encoder", "lora_te_text_model_encoder"): v for k, v in weights.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        text_names, out / f"{element.name}.safetensors", metadata=metadata(run, element, caption(scenes[0]))
    )
