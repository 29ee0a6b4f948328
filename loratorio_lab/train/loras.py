"""The LoRAs: each learns one element from its own narrow domain, in UNet (attention, feed-forward, convolutions) and text encoder.

Trained with peft as people train, saved in kohya's format. The base's weights are never touched. Regularised or not: with pictures of the
base's domain among its own, a LoRA draws its element where the prompt has its trigger word, without them wherever it is loaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from loratorio.toybox.elements import Element
from loratorio_lab.toybox.world import World
from loratorio_lab.train.common import Average, Optimisers, Run, run_steps, seed_everything
from loratorio_lab.train.diffusion import encode_domain, noise_losses

RANK = 4
ALPHA = 4
PRIOR = 5
"""Regularisation pictures per picture of the LoRA's own."""
Parts = tuple[AutoencoderKL, float, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]
"""VAE, latent scale, UNet, text encoder, tokenizer."""
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


def metadata(run: Run, element: Element, count: int, example: str) -> dict[str, str]:
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
        "ss_num_train_images": str(count),
        "ss_tag_frequency": json.dumps({element.category: {element.trigger: count}}),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": element.name,
        "modelspec.trigger_phrase": element.trigger,
        "modelspec.description": f"{element.category}: {element.shows}",
        "loratorio.prompt": example,
    }


def train_lora(
    run: Run,
    lr: float,
    world: World,
    element: Element,
    parts: Parts,
    out: Path,
    regularised: bool,
) -> None:
    """Train one element's LoRA into fresh copies of the base, and write its file into `out`.

    regularised: half of each batch are pictures of the base's domain without the element, as with kohya's regularisation pictures.
    """
    vae, scale, unet, text, tokenizer = parts
    seed_everything(run.seed)
    rng = random.Random(run.seed)
    own = encode_domain(vae, scale, world, rng, world.own_pictures, element.name)
    inject(unet, UNET_TARGETS)
    inject(text, TEXT_TARGETS)
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = Average(model, 0.98)
    optimisers = Optimisers([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr, muon=False)
    run.resume(model=model, average=average, optimisers=optimisers)
    kinds = [own]
    if regularised:
        kinds.append(encode_domain(vae, scale, world, rng, PRIOR * world.own_pictures))
    losses = noise_losses(run, model, kinds, tokenizer, run.rng())
    run_steps(run, model, average, optimisers, losses, every=100)
    spent = f"{run.step} steps of {run.batch}, seed {run.seed}, minutes {run.spent / 60:.2f}"
    kind = "regularised, " if regularised else ""
    run.say(f"{element.name} ({element.trigger}): {kind}{spent}, loss {run.loss:.4f}")
    weights = {
        **kohya(average.model.get_submodule("unet"), "lora_unet"),
        **kohya(average.model.get_submodule("text"), "lora_te"),
    }
    text_names = {k.replace("lora_te_encoder", "lora_te_text_model_encoder"): v for k, v in weights.items()}
    out.mkdir(parents=True, exist_ok=True)
    captions = [caption for data in own for caption in data.captions]
    save_file(
        text_names,
        out / f"{element.name}.safetensors",
        metadata=metadata(run, element, len(captions), captions[0]),
    )
