"""LoRA files as adapters: kohya, diffusers/PEFT and LyCORIS (LoRA, LoCon, LoHa, LoKr, DoRA, full diff, norms, …).

Names of layers are turned by diffusers' conversion tables, and every kind but plain LoRA is computed by lycoris' own
modules. What is low-rank in the file stays low-rank.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import lora_conversion_utils as kohya
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from lycoris.functional.general import weight_decompose
from lycoris.modules import get_module, make_module
from safetensors import safe_open
from torch import Tensor, nn

from ..adapters.delta import Adapter, Delta, Dense, LowRank
from ..errors import LoratorioError
from .checkpoint import PICKLES, Checkpoint, read_safetensors

_KOHYA_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PEFT_PARTS = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
}
# PEFT's names for what kohya's files call otherwise; lycoris reads the latter.
_PEFT_TAILS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_B.bias": "diff_b",
    "alpha": "alpha",
}
_PLAIN_LORA = {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"}


@dataclass(frozen=True)
class LoadedLora:
    """One LoRA of a generation: its part of the UNet, and of each text encoder (without deltas where it has none)."""

    name: str
    unet: Adapter
    text: tuple[Adapter, ...]


def list_loras(folder: Path) -> dict[str, Path]:
    """Names (file names without extension) and files of all LoRAs in a folder and below it."""
    files = sorted(file for file in folder.rglob("*.safetensors") if file.is_file())
    return {file.stem: file for file in reversed(files)}


def find_lora(folder: Path, name: str) -> Path:
    """The file of the LoRA `name`.

    Raises:
        LoratorioError: the folder does not exist, or has no such LoRA (with the nearest names), or has it as a pickle only.
    """
    if not folder.is_dir():
        raise LoratorioError(f"There is no LoRA folder {folder}: check --lora-dir.")
    known = list_loras(folder)
    by_lower = {known_name.lower(): file for known_name, file in known.items()}
    if name.lower() in by_lower:
        return known.get(name, by_lower[name.lower()])
    for file in folder.rglob("*"):
        if file.stem.lower() == name.lower() and file.suffix.lower() in PICKLES:
            return file  # the reader says why it will not be opened
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
    names = [by_lower[each].stem for each in near]
    hint = f"The nearest names are: {', '.join(names)}." if names else f"It has {len(known)} other LoRAs."
    raise LoratorioError(f"LoRA {name} is not in {folder}. {hint}")


def load_lora(
    file: Path, name: str, checkpoint: Checkpoint, te: float = 1.0, unet: float = 1.0
) -> LoadedLora:
    """Read a LoRA for a checkpoint, at strengths `te` in the text encoders and `unet` in the UNet.

    A DoRA counts as its full change at strength 1, times the strength, as in the WebUI.

    Raises:
        LoratorioError: a pickle, damaged, made for another model, holding NaN or infinity, or of an unknown kind.
    """
    tensors = read_safetensors(file, f"LoRA {name}")
    parts: dict[str, nn.Module] = {"unet": checkpoint.unet}
    for number, encoder in zip(("", "_2"), checkpoint.text_encoders, strict=False):
        parts[f"text_encoder{number}"] = encoder
    weights = _by_layer(name, tensors, _peft_alphas(file), parts)
    deltas: dict[str, dict[str, list[Delta]]] = {part: {} for part in parts}
    for (part, layer), own in weights.items():
        deltas[part][layer] = list(_deltas(name, layer, own, parts[part].get_submodule(layer)))
    loaded = LoadedLora(
        name,
        Adapter(name, deltas.pop("unet"), unet),
        tuple(Adapter(name, own, te) for own in deltas.values()),
    )
    for adapter in (loaded.unet, *loaded.text):
        adapter.check_finite()
    return loaded


_Layer = tuple[str, str]
"""A part of the model (``unet``, ``text_encoder``, ``text_encoder_2``) and a module path in it."""


def _by_layer(
    name: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], parts: Mapping[str, nn.Module]
) -> dict[_Layer, dict[str, Tensor]]:
    """The file's tensors by layer of the model and by kohya's tails (``lora_up.weight``, ``hada_w1_a``, ``diff``, …)."""
    if not tensors:
        raise LoratorioError(f"LoRA {name} is empty: the file holds no weights. Get it again.")
    named = (
        _kohya_names(name, tensors, parts)
        if _is_kohya(tensors)
        else _peft_names(name, tensors, alphas, parts)
    )
    tables = {part: _path_table(model) for part, model in parts.items()}
    grouped: dict[_Layer, dict[str, Tensor]] = {}
    for part, layer, tail, tensor in named:
        path = tables.get(part, {}).get(layer.replace(".", "_"))
        if path is None:
            raise LoratorioError(
                f"LoRA {name} changes the layer {layer} of the {part.replace('_', ' ')} with weights of shape "
                f"{_shape(tensor)}, and this model has no such layer. It was made for another kind of model: "
                "remove it from the prompt, or use the checkpoint that it is for."
            )
        grouped.setdefault((part, path), {})[tail] = tensor
    return grouped


_Named = tuple[str, str, str, Tensor]
"""Part, layer (dots or underscores), tail, tensor."""


def _is_kohya(tensors: Iterable[str]) -> bool:
    return any(key.startswith(tuple(_KOHYA_PARTS)) for key in tensors)


def _kohya_names(
    name: str, tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module]
) -> Iterable[_Named]:
    blocks = _sgm_names({key.split(".", 1)[0] for key in tensors}, parts["unet"])
    for key, tensor in tensors.items():
        layer, _, tail = key.partition(".")
        prefix = next((each for each in _KOHYA_PARTS if layer.startswith(each)), None)
        if prefix is None:
            raise LoratorioError(
                f"LoRA {name} holds weights that are not a LoRA's ({key}), which cannot be used here."
            )
        yield _KOHYA_PARTS[prefix], blocks.get(layer, layer.removeprefix(prefix)), tail, tensor


def _sgm_names(layers: Iterable[str], unet: nn.Module) -> dict[str, str]:
    """Diffusers' names of UNet layers that a file calls by their places in the original code (``input_blocks_4_1_…``)."""
    original = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_\d)")
    keys = {f"{layer}.lora_down.weight": layer for layer in layers if original.match(layer)}
    if not keys:
        return {}
    try:
        blocks = kohya._maybe_map_sgm_blocks_to_diffusers(keys, unet.config)
        named = {kohya._convert_unet_lora_key(key): layer for key, layer in blocks.items()}
    except (ValueError, IndexError):
        return {}  # these names then are unknown to the model, which is the right thing to say
    paths = convert_unet_state_dict_to_peft(named)
    return {
        layer: re.sub(r"(_lora|\.lora)?(_A|\.down)\.weight$", "", path).replace("to_out_lora", "to_out_0")
        for path, layer in paths.items()
    }


def _peft_names(
    name: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], parts: Mapping[str, nn.Module]
) -> Iterable[_Named]:
    new_names = tensors if _is_peft(tensors) else _older_names(tensors)
    if not _is_peft(new_names):
        raise LoratorioError(
            f"LoRA {name} is not a LoRA that can be read here: its weights have names like {next(iter(tensors))}."
        )
    for key, tensor in new_names.items():
        prefix = next((each for each in _PEFT_PARTS if key.startswith(each)), "")
        part = _PEFT_PARTS.get(prefix, "unet")
        tail = next((each for each in _PEFT_TAILS if key.endswith("." + each)), None)
        if tail is None:
            raise LoratorioError(
                f"LoRA {name} holds weights that are not a LoRA's ({key}), which cannot be used here."
            )
        layer = key.removeprefix(prefix).removesuffix("." + tail)
        if tail == "lora_A.weight":
            # Without a word on alpha it equals the rank.
            yield part, layer, "alpha", torch.tensor(alphas.get(f"{part}.{layer}", float(len(tensor))))
        if tail.startswith("lora_magnitude_vector"):
            tensor = tensor.reshape(-1, 1)
        if tail != "alpha":
            yield part, layer, _PEFT_TAILS[tail], tensor


def _older_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers used before PEFT's, as PEFT's; UNet and text encoders each have a table of their own."""
    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    unet = {key: tensor for key, tensor in tensors.items() if key not in text}
    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(unet)
    return renamed | (convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD) if text else {})


def _is_peft(tensors: Iterable[str]) -> bool:
    return any(".lora_A." in key or ".lora_B." in key for key in tensors)


class _Alphas(dict[str, float]):
    """Alpha by ``part.layer``, where PEFT's metadata gives patterns and defaults."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self._config = config

    def get(self, key: str, default: float = 1.0) -> float:  # type: ignore[override]
        part, _, layer = key.partition(".")
        value = self._config.get(f"{part}.lora_alpha", default)
        patterns = self._config.get(f"{part}.alpha_pattern") or {}
        if isinstance(patterns, Mapping):
            for pattern, alpha in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    value = alpha
        alpha = float(value)  # type: ignore[arg-type]
        # rsLoRA divides by √r, the readers of alpha by r.
        return alpha * default**0.5 if self._config.get(f"{part}.use_rslora") else alpha


def _peft_alphas(file: Path) -> Mapping[str, float]:
    """Alphas that diffusers keeps in the file's header."""
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata() or {}
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        config = {}
    return _Alphas(config if isinstance(config, dict) else {})


def _path_table(model: nn.Module) -> dict[str, str]:
    """Module paths by their names in LoRA files, where dots are underscores."""
    table = {}
    for path, _ in model.named_modules():
        mangled = path.replace(".", "_")
        table[mangled] = path
        # Transformers 5 took the level ``text_model`` out of CLIPTextModel; files still have it.
        if not mangled.startswith("text_model"):
            table.setdefault(f"text_model_{mangled}", path)
    return table


def _deltas(name: str, path: str, own: dict[str, Tensor], layer: nn.Module) -> Iterable[Delta]:
    if "lora_up.weight" in own and "lora_down.weight" in own and own.keys() <= _PLAIN_LORA | {"diff_b"}:
        rank = len(own["lora_down.weight"])
        scale = float(own["alpha"]) / rank if float(own.get("alpha", 0)) else 1.0
        yield LowRank(own["lora_down.weight"], own["lora_up.weight"], scale, own.get("lora_mid.weight"))
        if "diff_b" in own:
            yield Dense(bias=own["diff_b"].to(torch.float32))
        return
    if own.keys() == {"diff_b"}:
        yield Dense(bias=own["diff_b"].to(torch.float32))
        return
    yield _by_lycoris(name, path, own, layer)


def _by_lycoris(name: str, path: str, own: dict[str, Tensor], layer: nn.Module) -> Dense:
    """The dense change that lycoris computes for one layer, in float32 on the CPU."""
    own = {tail: tensor.to(torch.float32) for tail, tensor in own.items()}
    dora_scale = own.pop("dora_scale", None)
    own.setdefault("alpha", torch.tensor(0.0))  # lycoris' word for: as the rank
    # A copy, because the layer may be in half precision or on another device.
    plain = copy.deepcopy(layer).to("cpu", torch.float32)
    before: Tensor = plain.weight.detach()  # type: ignore[operator, assignment]
    try:
        module = _lycoris_module(name, path, own, plain)
        with torch.no_grad():
            weight, bias = module.get_diff_weight(1.0)
            if dora_scale is not None:
                weight = _dora(before + weight.reshape(before.shape), dora_scale) - before
    except (RuntimeError, ValueError, AttributeError) as problem:
        shapes = ", ".join(f"{tail} {_shape(tensor)}" for tail, tensor in own.items() if tensor.ndim)
        raise LoratorioError(
            f"LoRA {name} does not fit the layer {path}, whose weight is {_shape(layer.weight)}: it has {shapes}. "  # type: ignore[arg-type]
            "It was made for another kind of model: remove it from the prompt."
        ) from problem
    return Dense(weight.detach(), None if bias is None else bias.detach())


def _lycoris_module(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> Any:
    kind, parameters = get_module({f"layer.{tail}": tensor for tail, tensor in own.items()}, "layer")
    module = None
    if kind is not None:
        with contextlib.suppress(TypeError):  # lycoris 4.1 cannot read its own IA3
            module = make_module(kind, parameters, "layer", layer)
    if module is None:
        tails = ", ".join(sorted(own.keys() - {"alpha"}))
        raise LoratorioError(f"LoRA {name} is of a kind that cannot be read here: layer {path} has {tails}.")
    return module


def _dora(merged: Tensor, dora_scale: Tensor) -> Tensor:
    """The merged weight at DoRA's magnitudes, which are given per output (out, 1, …) or per input (1, in, …)."""
    per_output = dora_scale.shape[0] == merged.shape[0]
    scale = dora_scale.reshape(*dora_scale.shape[:2], *[1] * (merged.ndim - 2))
    decomposed: Tensor = weight_decompose(merged, scale, 1, per_output)
    return decomposed


def _shape(tensor: Tensor) -> str:
    return "×".join(str(side) for side in tensor.shape) or "one number"
