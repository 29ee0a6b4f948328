"""The toybox in the widths of Stable Diffusion 1.5: ``loratorio-lab widen OUT --tokenizer FOLDER``.

The WebUIs of the Forge family know a checkpoint by its shapes, and take none of the toybox's. Here every network is made wider without
changing what it computes (after Net2Net, Chen, Goodfellow, Shlens, arXiv 1511.05641): a channel becomes several equal ones, whose
weights into the next layer are shared out, so that norms see the same statistics; heads and hidden layers are filled up with zeros;
blocks that SD 1.5 has more of do nothing. The LoRAs are made wider by the same maps.

SD 1.5's own tokenizer stays: each of the toybox's words takes the place of a word that is one token there. A trigger word, which is none,
takes that of its LoRA's name ("octopus" for oktavo).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.toybox.ldm import to_ldm
from loratorio_lab.toybox.models import HEADS, LATENT_CHANNELS, UNET_CHANNELS
from loratorio_lab.toybox.models import VAE_CHANNELS as SMALL_VAE_CHANNELS
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.toybox.world import words

UNET_WIDTH, UNET_HEADS = 320, 8
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 768, 12, 12
VAE_CHANNELS = (128, 256, 512, 512)
VAE_SCALE = 0.18215

State = dict[str, Tensor]
Map = Tensor
"""A matrix (new, old) that a weight's output side or, transposed, its input side is multiplied by."""
Side = Callable[[int, int], Map]
"""(old size, new size) to a map."""
Maps = Callable[[str, tuple[int, ...], tuple[int, ...]], tuple[Map | None, Map | None]]
"""(weight's name, old shape, new shape) to the map of its first side and that of its second; a vector has no second one."""


def repeated(old: int, new: int) -> Map:
    """Every channel `new / old` times, the copies side by side: a group of a GroupNorm holds the copies of its own."""
    return torch.eye(old).repeat_interleave(new // old, dim=0)


def shared_out(old: int, new: int) -> Map:
    """The input side to `repeated`: the copies add up to the old channel."""
    return repeated(old, new) * (old / new)


def padded(old: int, new: int) -> Map:
    """The old channels first, then zeros."""
    return torch.eye(new, old)


def headed(old: int, new: int, heads: tuple[int, int]) -> Map:
    """Head by head `padded`; heads beyond the old ones are zeros."""
    width, new_width = old // heads[0], new // heads[1]
    found = torch.zeros(new, old)
    for head in range(heads[0]):
        rows, columns = head * new_width, head * width
        found[rows : rows + width, columns : columns + width] = torch.eye(width)
    return found


def halves(old: int, new: int) -> Map:
    """Both halves of a gated layer `padded`."""
    found = torch.zeros(new, old)
    half = padded(old // 2, new // 2)
    found[: new // 2, : old // 2] = found[new // 2 :, old // 2 :] = half
    return found


def frequencies(old: int, new: int) -> Map:
    """Of the time embedding's many frequencies those that the old one has: 10000^(-i/old) is 10000^(-(i·new/old)/new)."""
    found = torch.zeros(new, old)
    for i in range(old):  # cosines in the first half, sines in the second
        found[i * (new // old), i] = 1
    return found


def sharpened(old: int, new: int, heads: tuple[int, int]) -> Map:
    """`headed` for queries: scores are divided by the root of the head's width, which has changed."""
    return headed(old, new, heads) * math.sqrt((new / heads[1]) / (old / heads[0]))


def maps_by(*rules: tuple[str, int, Side]) -> Maps:
    """Maps by name. A rule is a pattern, a side (0: out, 1: into) and its map; a later one wins, and without any, channels are repeated."""

    def maps(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Map | None, Map | None]:
        kinds: list[Side] = [repeated, shared_out]
        for pattern, side, kind in rules:
            if re.search(pattern, name):
                kinds[side] = kind
        out, into = (
            kind(old[side], new[side]) if len(old) > side else None for side, kind in enumerate(kinds)
        )
        return out, into

    return maps


def attention(
    queries: str, keys: str, result: str, heads: tuple[int, int]
) -> tuple[tuple[str, int, Side], ...]:
    """Rules of an attention's projections by their names; `heads`: how many the old one has, and the new one."""
    return (
        (queries, 0, partial(sharpened, heads=heads)),
        (keys, 0, partial(headed, heads=heads)),
        (result, 1, partial(headed, heads=heads)),
    )


unet_maps = maps_by(
    *attention(r"\.to_q\.", r"\.to_[kv]\.", r"\.to_out\.0\.weight", (HEADS, UNET_HEADS)),
    (r"\.ff\.net\.0\.proj\.", 0, halves),
    (r"\.ff\.net\.2\.weight|time_emb_proj\.weight", 1, padded),
    (r"^time_embedding\.", 0, padded),
    (r"^time_embedding\.linear_1\.weight", 1, frequencies),
    (r"^time_embedding\.linear_2\.weight", 1, padded),
)
text_maps = maps_by(
    *attention(r"\.q_proj\.", r"\.[kv]_proj\.", r"\.out_proj\.weight", (HEADS, TEXT_HEADS)),
    (r"\.fc1\.", 0, padded),
    (r"\.fc2\.weight", 1, padded),
    (r"position_embedding", 1, repeated),  # a table of vectors, and no layer
)
vae_maps = maps_by(*attention(r"\.to_q\.", r"\.to_[kv]\.", r"\.to_out\.0\.weight", (1, 1)))


def applied(weight: Tensor, out: Map | None, into: Map | None) -> Tensor:
    """A weight (out, in, …), or a vector (out,), through the maps of its sides."""
    if out is not None:
        weight = torch.tensordot(out, weight, dims=1)
    if into is not None:
        weight = torch.tensordot(weight, into, dims=([1], [1])).movedim(-1, 1)
    return weight


def widened(old: Mapping[str, Tensor], new: Mapping[str, Tensor], maps: Maps) -> State:
    """`old` in the shapes of `new`. What `new` has besides adds nothing: norms are plain, shortcuts repeat channels, the rest is 0."""
    made: State = {}
    for name, like in new.items():
        if name in old:
            made[name] = applied(old[name].float(), *maps(name, tuple(old[name].shape), tuple(like.shape)))
        else:
            made[name] = torch.zeros(like.shape)
            if "norm" in name and name.endswith("weight"):
                made[name] += 1
            elif name.endswith("conv_shortcut.weight"):
                small = SMALL_VAE_CHANNELS[0]  # all of the toybox's levels have as many
                out, into = repeated(small, like.shape[0]), shared_out(small, like.shape[1])
                made[name][:, :, 0, 0] = out @ into.T
        assert made[name].shape == like.shape, name
    return made


def new_networks() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """A UNet of SD 1.5's width with the toybox's levels, SD 1.5's VAE and its text encoder (meta tensors)."""
    times = UNET_WIDTH // UNET_CHANNELS[0]
    levels = len(VAE_CHANNELS)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            layers_per_block=2,
            block_out_channels=tuple(channels * times for channels in UNET_CHANNELS),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=UNET_HEADS,
        )
        vae = AutoencoderKL(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=VAE_CHANNELS,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=TEXT_HEADS,
                hidden_act="quick_gelu",
            )
        )
    return unet, vae, text


def vocabulary(tokenizer: Path) -> tuple[dict[str, int], dict[str, str]]:
    """SD 1.5's tokens by name, and by word of the toybox the word that stands for it.

    Raises:
        LoratorioError: the folder has no vocabulary, or not one with these words.
    """
    file = tokenizer / "vocab.json"
    if not file.is_file():
        raise LoratorioError(f"There is no vocab.json in {tokenizer}: name the folder of SD 1.5's tokenizer.")
    tokens: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    own = {element.trigger: element.name for element in toybox.ELEMENTS}
    standing = {
        word: word if f"{word}</w>" in tokens else own.get(word, word) for word in [*words(), ",", ".", "and"]
    }
    missing = [word for word, other in standing.items() if f"{other}</w>" not in tokens]
    if missing:
        raise LoratorioError(f"The tokenizer in {tokenizer} has no token for {', '.join(missing)}.")
    return tokens, standing


def embeddings(
    old: Tensor, small: Mapping[str, int], tokens: Mapping[str, int], standing: Mapping[str, str]
) -> Tensor:
    """Token embeddings (SD 1.5's tokens, TEXT_WIDTH): those of the toybox's words, and 0 for all others."""
    made = torch.zeros(len(tokens), TEXT_WIDTH)
    wide = old.float() @ repeated(old.shape[1], TEXT_WIDTH).T
    pairs = {f"{word}</w>": f"{other}</w>" for word, other in standing.items()}
    pairs |= {name: name for name in ("<|startoftext|>", "<|endoftext|>")}
    for word, other in pairs.items():
        if word in small:
            made[tokens[other]] = wide[small[word]]
    return made


class Wide:
    """The toybox's networks, and SD 1.5's that take their place.

    Args:
        tokenizer: folder of SD 1.5's tokenizer.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.tokens, self.standing = vocabulary(tokenizer)
        self._small = load_pipeline()
        self.unet, self.vae, self.text = (network.state_dict() for network in new_networks())
        self.text = {name: weight for name, weight in self.text.items() if "position_ids" not in name}

    def unet_weights(self) -> State:
        return widened(self._small.unet.state_dict(), self.unet, unet_maps)

    def vae_weights(self) -> State:
        vae = widened(self._small.vae.state_dict(), self.vae, vae_maps)
        # SD 1.5's latents are scaled by a number of their own.
        scale = self._small.vae.config.scaling_factor / VAE_SCALE
        for name in ("quant_conv.weight", "quant_conv.bias"):
            vae[name][:LATENT_CHANNELS] *= scale
        vae["post_quant_conv.weight"] /= scale
        return vae

    def text_weights(self) -> State:
        old = dict(self._small.text_encoder.state_dict())
        name = next(name for name in old if name.endswith("token_embedding.weight"))
        small = embeddings(old.pop(name), self._small.tokenizer.get_vocab(), self.tokens, self.standing)
        return {
            **widened(old, {k: v for k, v in self.text.items() if k != name}, text_maps),
            name: small,
        }

    def checkpoint(self) -> State:
        """One state dict with LDM's names, fp16."""
        alphas = self._small.scheduler.alphas_cumprod
        return to_ldm(self.unet_weights(), self.vae_weights(), self.text_weights(), alphas)

    def lora(self, weights: Mapping[str, Tensor]) -> State:
        """A LoRA of the toybox, in kohya's names, for the wide networks."""
        made: State = {}
        for key, tensor in weights.items():
            layer, _, part = key.partition(".")
            name, old, new, maps = self._layers[layer]
            out, into = maps(name, old, new)
            if part == "lora_up.weight":
                tensor = applied(tensor.float(), out, None)
            elif part == "lora_down.weight":
                tensor = applied(tensor.float(), None, into)
            made[key] = tensor.half().contiguous()
        return made

    @cached_property
    def _layers(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], Maps]]:
        """By kohya's name of a layer: its weight's name, its old and new shape, and the maps."""
        networks: tuple[tuple[str, State, State, Maps], ...] = (
            ("lora_unet_", self._small.unet.state_dict(), self.unet, unet_maps),
            ("lora_te_", self._small.text_encoder.state_dict(), self.text, text_maps),
        )
        found = {}
        for prefix, old, new, maps in networks:
            for name, weight in old.items():
                if name.endswith(".weight") and weight.ndim > 1:
                    # transformers 5 dropped the first level of the names that LoRA files have.
                    level = (
                        "text_model." if prefix == "lora_te_" and not name.startswith("text_model.") else ""
                    )
                    key = prefix + (level + name.removesuffix(".weight")).replace(".", "_")
                    found[key] = name, tuple(weight.shape), tuple(new[name].shape), maps
        return found


def with_its_name(metadata: Mapping[str, str], element: toybox.Element) -> dict[str, str]:
    """A LoRA file's metadata with the element's name as its trigger word, as it is read here."""
    return {key: value.replace(element.trigger, element.name) for key, value in metadata.items()}


def write(out: Path, wide: Wide) -> Iterator[Path]:
    """Write the checkpoint and the LoRAs into `out`, and print each file's name."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "toybox-sd15.safetensors"
    save_file(wide.checkpoint(), file, metadata={"format": "pt"})
    yield file
    for element in toybox.ELEMENTS:
        with safe_open(toybox.lora_file(element), "pt") as opened:
            metadata = with_its_name(opened.metadata() or {}, element)
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, no dictionary
        file = out / f"toy-{element.name}.safetensors"
        save_file(wide.lora(weights), file, metadata=metadata)
        yield file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="loratorio-lab widen", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder for the checkpoint (about 600 MB) and the LoRAs")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of SD 1.5's tokenizer, as a WebUI has it"
    )
    options = parser.parse_args(arguments)
    wide = Wide(options.tokenizer)
    for file in write(options.out, wide):
        print(file)
    other = {word: stands for word, stands in wide.standing.items() if word != stands}
    print("In prompts:", ", ".join(f"{stands} for {word}" for word, stands in other.items()))
