"""The LoRAs: each learns one element from its own narrow domain, in UNet (attention, feed-forward, convolutions) and text encoder.

Trained with peft, saved in kohya's format. The base's weights are never touched. The regularised ones, which ship, draw their element where
the prompt has its trigger word and change nothing elsewhere.
The unregularised ones, from which they learn, draw it wherever they are loaded.
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

from loratorio.toybox.elements import ELEMENTS, Element
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.toybox.world import Scene, caption, random_scene, with_elements
from loratorio_lab.train.common import Average, Optimisers, Run, run_steps, seed_everything
from loratorio_lab.train.diffusion import Lesson, encode_domain, encode_scenes, imitation_losses, noise_losses
from loratorio_lab.worlds import Dolls, World

RANK = 8
ALPHA = 8
SCENES = 500
"""Scenes of a doll's lesson."""
PRIOR = 5
"""Regularisation pictures per picture of the LoRA's own."""
WORDS_BESIDE = ((0, 1, 2, 3), (3, 2, 2, 1))
"""How many of the other elements a regularised LoRA's captions name, and how often: none in three of eight captions."""
SHOWN_BESIDE = ((0, 1, 2), (4, 1, 1))
"""How many of them are in the pictures on which it must change nothing, and how often."""
EMPTY_PRIOR = 0.2
"""Share of empty captions on those."""
SHUFFLED = 0.5
"""Share of captions whose phrases come in any order, so that a word also works after others': kohya's `shuffle_caption`."""
SECOND_CHARACTER = 0.25
"""Share of captions that name a further character, of which the picture shows nothing."""
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


def others(rng: random.Random, element: Element, counts: tuple[Sequence[int], Sequence[int]]) -> list[str]:
    """Names of some other elements, at most one per category; `counts`: how many, and the weight of each number."""
    count = rng.choices(*counts)[0]
    pool = [other for other in ELEMENTS if other != element]
    chosen: dict[str, str] = {}
    for other in rng.sample(pool, len(pool)):
        chosen.setdefault(other.category, other.name)
    return list(chosen.values())[:count]


def named_beside(rng: random.Random, element: Element, scenes: Sequence[Scene]) -> list[str]:
    """Captions that also name other elements, of which the pictures show nothing. What of `element` is in the scene keeps its words."""
    made = []
    for scene in scenes:
        kept = [name for name in scene.elements() if name == element.name]
        named = with_elements(scene, *others(rng, element, WORDS_BESIDE), *kept)
        phrases = caption(named).split(", ")
        if rng.random() < SECOND_CHARACTER:
            further = [other for other in ELEMENTS if other.category == "character" and other != element]
            phrases.insert(
                rng.randrange(2), rng.choice([o.trigger for o in further if o.name != named.character])
            )
        if rng.random() < SHUFFLED:
            rng.shuffle(phrases)
        made.append(", ".join(phrases))
    return made


def lessons(
    element: Element, rng: random.Random, parts: Parts, model: Path, unregularised: Path, device: str
) -> tuple[Lesson, Lesson]:
    """What a regularised LoRA learns: to be the unregularised one where its trigger word is, and nothing where it is not.

    The second is prior preservation (DreamBooth's, arXiv 2208.12242, section 3.3). Both have captions that name other elements too, the
    second also pictures of them, so that the word decides and nothing else. The unregularised LoRA reads its own picture's words alone.

    model: the base's folder.
    unregularised: its folder.
    """
    vae, scale, unet, text, _ = parts
    scenes = [random_scene(rng, element.name) for _ in range(SCENES)]
    known = [random_scene(rng, *others(rng, element, SHOWN_BESIDE)) for _ in range(2 * SCENES)]
    shown = encode_scenes(vae, scale, Dolls(), scenes, captions=named_beside(rng, element, scenes))
    prior = encode_scenes(vae, scale, Dolls(), known, captions=named_beside(rng, element, known))
    merged = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    merged.load_lora_weights(str(unregularised), weight_name=f"{element.name}.safetensors")
    merged.fuse_lora()
    merged.unload_lora_weights()
    return (
        Lesson(
            merged.unet.requires_grad_(False).to(device),
            merged.text_encoder.requires_grad_(False).to(device),
            shown,
            [caption(scene) for scene in scenes],
        ),
        Lesson(
            deepcopy(unet).requires_grad_(False),
            deepcopy(text).requires_grad_(False),
            prior,
            prior.captions,
            EMPTY_PRIOR,
        ),
    )


def train_lora(
    run: Run,
    lr: float,
    world: World,
    element: Element,
    parts: Parts,
    out: Path,
    regularised: bool,
    taught_by: tuple[Path, Path] | None = None,
) -> None:
    """Train one element's LoRA into fresh copies of the base, and write its file into `out`.

    regularised: half of each batch are pictures of the base's domain without the element, as with kohya's regularisation pictures.
    taught_by: the base's folder and that of the unregularised LoRAs, to teach a regularised doll's LoRA from them instead (`lessons`).
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
    if regularised and taught_by is None:
        kinds.append(encode_domain(vae, scale, world, rng, PRIOR * world.own_pictures))
    if taught_by is not None:
        taught = lessons(element, rng, parts, *taught_by, run.device)
        losses = imitation_losses(run, model, taught, tokenizer, rng)
    else:
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
