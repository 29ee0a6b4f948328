"""Which layer of the model a tensor of a LoRA file belongs to, and what it is there.

Every way of naming comes down to kohya's and LyCORIS' tails (``lora_up.weight``, ``hada_w1_a``, ``diff``, …) of a module path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import LoratorioError
from .ldm_names import ldm_names

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
# PEFT's names for what kohya's files call otherwise.
_PEFT_TAILS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "dora_scale": "dora_scale",
    "lora_B.bias": "lora_up.bias",
    "alpha": "alpha",
}
_COMFY = ("model.diffusion_model.", "diffusion_model.")
_DOTTED = {
    **dict.fromkeys(_COMFY, "lora_unet_"),
    "unet.": "lora_unet_",
    "text_encoder.": "lora_te1_",
    "text_encoder_2.": "lora_te2_",
    "base_model.model.": "lora_unet_",
}
_OWN_TAIL = re.compile(r"\.(lora_(up|down|mid)\.weight|diff(_b)?|hada_\w+|lokr_\w+|oft_\w+|[wb]_norm)$")
"""Tails of kohya's and LyCORIS' files, which may stand behind dotted names too."""

_SHARED_TAIL = re.compile(r"\.(lora_[AB]\.(weight|bias)|lora_magnitude_vector(\.weight)?|dora_scale|alpha)$")
"""Tails that PEFT's files have as well."""

_LEAST_PART = 0.1
"""Of a file's layers that must be in the model; with fewer it is for another kind of model."""

SCALE = "(scale)"
"""A tail of ours: what the whole change is multiplied with, where a configuration and no tensor says so."""


class Layer(NamedTuple):
    """A layer of the model as a file calls it; a file may have one under two names, and both count.

    Attributes:
        part: ``unet``, ``text_encoder`` or ``text_encoder_2``.
        path: of the module in it.
        source: the file's name for it.
    """

    part: str
    path: str
    source: str


@dataclass(frozen=True)
class Named:
    """A LoRA file's tensors by where they belong.

    Attributes:
        layers: by layer of the model and by tail.
        embeddings: of words that the file brings along (``bundle_emb``), their tensors by what the file calls them.
        notes: sentences on what was left out.
    """

    layers: dict[Layer, dict[str, Tensor]]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def by_layer(name: str, tensors: Mapping[str, Tensor], file: Path, parts: Mapping[str, nn.Module]) -> Named:
    """What is in the LoRA `name`, read from `file`, for the model's `parts`.

    Raises:
        LoratorioError: nothing, or next to nothing, in the file is for this model; or its configuration cannot be made sense of.
    """
    if not tensors:
        raise LoratorioError(f"LoRA {name} is empty: the file holds no weights. Get it again.")
    config = _Config.beside(file, name)
    embeddings, plain = _bundled({key.replace(".default.", "."): each for key, each in tensors.items()})
    own_layers = {key[: own.start()] for key in plain if (own := _OWN_TAIL.search(key))}
    unified = {_unified(key, own_layers): tensor for key, tensor in plain.items()}
    kohyas = {key: tensor for key, tensor in unified.items() if key.startswith(tuple(_KOHYA_PARTS))}
    others = {
        key: each
        for key, each in unified.items()
        if key not in kohyas and (_is_peft([key]) or _is_older(key))
    }
    strange = [key for key in unified if key not in kohyas and key not in others]
    if not kohyas and not others:
        raise LoratorioError(
            f"LoRA {name} is not a LoRA that can be read here: its weights have names like {next(iter(tensors))[:80]}."
        )
    tables = {part: _path_table(model) for part, model in parts.items()}
    grouped: dict[Layer, dict[str, Tensor]] = {}
    missing: dict[str, str] = {}
    for part, source, layer, tail, tensor in (*_kohya_names(kohyas, config), *_peft_names(others, config)):
        path = tables.get(part, {}).get(layer.replace(".", "_"))
        if path is None:
            shape = "×".join(map(str, tensor.shape)) or "one number"
            missing.setdefault(
                layer, f"{layer[:120]} of the {part.replace('_', ' ')} with weights of shape {shape}"
            )
        else:
            grouped.setdefault(Layer(part, path, f"{source}{layer}"), {})[tail] = tensor
    for key in [key for key, own in grouped.items() if own.keys() <= {"alpha", SCALE}]:
        strange.append(f"{key.source}.alpha")
        del grouped[key]
    if not grouped or len(grouped) < _LEAST_PART * (len(grouped) + len(missing)):
        first = next(iter(missing.values()), strange[0] if strange else "")
        raise LoratorioError(
            f"LoRA {name} changes the layer {first}, and this model has no such layer. It was made for another kind of model: "
            "remove it from the prompt, or use the checkpoint that it is for."
        )
    return Named(grouped, embeddings, tuple(_leftovers(name, len(grouped), list(missing), strange)))


def _leftovers(name: str, used: int, missing: Sequence[str], strange: Sequence[str]) -> Iterator[str]:
    if missing:
        yield (
            f"Of LoRA {name} {used} of {used + len(missing)} layers were used: this model has no {missing[0][:120]}"
            f"{' and others' if len(missing) > 1 else ''}."
        )
    if strange:
        yield (
            f"LoRA {name} was read without {strange[0][:120]}{f' and {len(strange) - 1} more tensors' if len(strange) > 1 else ''}: "
            "they are none of a LoRA's weights that are known here."
        )


def _bundled(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Embeddings that are packed with a LoRA (``bundle_emb.WORD.…``) by their words, and the other tensors."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"bundle_emb\.(.+?)\.(string_to_param\..+|clip_[lg]|emb_params|[^.]+)", key)
        if found:
            embeddings.setdefault(found[1], {})[found[2]] = tensor
        else:
            others[key] = tensor
    return embeddings, others


def _unified(key: str, own_layers: Collection[str]) -> str:
    """A tensor's name in kohya's way: LyCORIS' prefix, ComfyUI's, and other dotted names but PEFT's and diffusers' own.

    own_layers: those layers' names that have a tail of kohya's or LyCORIS' own.
    """
    if key.startswith("lycoris_"):
        return "lora_unet_" + key.removeprefix("lycoris_")
    prefix = next((each for each in _DOTTED if key.startswith(each)), None)
    tail = _OWN_TAIL.search(key) or _SHARED_TAIL.search(key)
    if prefix is None or tail is None:
        return key
    layer = key[: tail.start()]
    # An alpha or a magnitude goes with the rest of its layer.
    if prefix not in _COMFY and layer not in own_layers:
        return key
    return _DOTTED[prefix] + layer.removeprefix(prefix).replace(".", "_") + key[tail.start() :]


_Tensor = tuple[str, str, str, str, Tensor]
"""Part, what the file calls the part, layer (dots or underscores), tail, tensor."""


def _kohya_names(tensors: Mapping[str, Tensor], config: _Config) -> Iterable[_Tensor]:
    scaled: set[str] = set()
    for key, tensor in tensors.items():
        layer, _, tail = key.partition(".")
        prefix = next(each for each in _KOHYA_PARTS if layer.startswith(each))
        part, path = _KOHYA_PARTS[prefix], layer.removeprefix(prefix)
        if tail.startswith("lora_magnitude_vector"):
            tensor = tensor.reshape(-1, 1)
        if tail.startswith(("hada_", "lokr_")) and f"{layer}.alpha" not in tensors and layer not in scaled:
            # PEFT's LoHa and LoKr have no alpha in the file.
            scaled.add(layer)
            scale = config.scale(part, path)
            if scale is not None:
                yield part, prefix, path, SCALE, torch.tensor(scale)
        yield part, prefix, path, _PEFT_TAILS.get(tail, tail), tensor


def _peft_names(tensors: Mapping[str, Tensor], config: _Config) -> Iterable[_Tensor]:
    new_names = tensors if _is_peft(tensors) else _older_names(tensors)
    for key, tensor in new_names.items():
        prefix = next((each for each in _PEFT_PARTS if key.startswith(each)), "")
        part = _PEFT_PARTS.get(prefix, "unet")
        tail = next((each for each in _PEFT_TAILS if key.endswith("." + each)), "")
        layer = key.removeprefix(prefix).removesuffix("." + tail).removesuffix(".lora")
        if tail == "lora_A.weight" and not {f"{prefix}{layer}{each}" for each in _ALPHAS} & new_names.keys():
            yield part, prefix, layer, "alpha", torch.tensor(config.alpha(part, layer, len(tensor)))
        if tail.startswith("lora_magnitude_vector"):
            tensor = tensor.reshape(-1, 1)
        yield part, prefix, layer, _PEFT_TAILS.get(tail, tail), tensor


_ALPHAS = (".alpha", ".lora.alpha")


def _older_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers used before PEFT's, as PEFT's; UNet and text encoders each have a table of their own."""
    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    unet = {key: tensor for key, tensor in tensors.items() if key not in text}
    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(unet)
    return renamed | (convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD) if text else {})


def _is_older(key: str) -> bool:
    """Whether it is one of diffusers' names of before PEFT, or an alpha beside one."""
    return bool(re.search(r"_lora\.|\.lora\.|lora_linear_layer\.|\.alpha$|\.lora_magnitude_vector", key))


def _is_peft(tensors: Iterable[str]) -> bool:
    return any(".lora_A." in key or ".lora_B." in key for key in tensors)


class _Config:
    """PEFT's configuration: alpha and rank for all layers, and patterns of layers' names with others."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self._values = values
        self._name = name

    @classmethod
    def beside(cls, file: Path, name: str) -> _Config:
        """As diffusers keeps it in the file's header, or PEFT in ``adapter_config.json`` beside the file."""
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
        values = _json_object(metadata.get("lora_adapter_metadata", ""))
        own = file.with_name("adapter_config.json")
        if not values and file.stem == "adapter_model" and own.is_file():
            read = _json_object(own.read_text(encoding="utf-8", errors="replace"))
            values = {
                f"{part}.{key}": value for part in set(_PEFT_PARTS.values()) for key, value in read.items()
            }
        return cls(values, name)

    def alpha(self, part: str, layer: str, rank: int) -> float:
        """A LoRA layer's alpha; without a word on it, it is the rank."""
        given = self._values.get(f"{part}.lora_alpha")
        alpha = self._number(part, layer, "alpha", rank if given is None else given)
        # rsLoRA divides by √r, the readers of alpha by r.
        return alpha * rank**0.5 if self._values.get(f"{part}.use_rslora") else alpha

    def scale(self, part: str, layer: str) -> float | None:
        """alpha/rank of a LoHa or LoKr layer, where the configuration has them."""
        given = [self._values.get(f"{part}.{key}") for key in ("alpha", "r")]
        if None in given:
            return None
        rank = self._number(part, layer, "rank", given[1])
        return self._number(part, layer, "alpha", given[0]) / rank if rank else 0.0

    def _number(self, part: str, layer: str, what: str, default: object) -> float:
        patterns = self._values.get(f"{part}.{what}_pattern") or {}
        value = default
        if isinstance(patterns, Mapping):
            # PEFT takes the first that fits.
            value = next((each for pattern, each in patterns.items() if self._fits(pattern, layer)), default)
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise LoratorioError(
                f"The configuration of LoRA {self._name} gives the layer {layer[:80]} the {what} {str(value)[:40]!r}, "
                "which is no number. Get it again."
            ) from None

    def _fits(self, pattern: str, layer: str) -> bool:
        if re.fullmatch(r"[\w.-]+", pattern):
            # A name, whose dots are dots, and underscores in names that have no dots.
            wanted, path = (text.replace(".", "_") for text in (pattern, layer))
            return path == wanted or path.endswith(f"_{wanted}")
        # One repeated part within another takes a time without end on a name that does not fit.
        if len(pattern) > 200 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{?]", pattern):
            raise self._unreadable(pattern)
        try:
            return bool(re.match(rf"(.*\.)?({pattern})$", layer))
        except (re.error, OverflowError, RecursionError):
            raise self._unreadable(pattern) from None

    def _unreadable(self, pattern: str) -> LoratorioError:
        return LoratorioError(
            f"The configuration of LoRA {self._name} has the pattern {pattern[:40]!r} of layers, which cannot be read here. Get it again."
        )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _path_table(model: nn.Module) -> dict[str, str]:
    """Paths of modules with weights by their names in LoRA files, where dots are underscores."""
    weighted = {
        path for path, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)
    }
    table = {name.replace(".", "_"): path for name, path in ldm_names(model).items() if path in weighted}
    for path in weighted:
        mangled = path.replace(".", "_")
        table[mangled] = path
        # Transformers 5 took the level ``text_model`` out of CLIPTextModel; files still have it.
        if not mangled.startswith("text_model"):
            table.setdefault(f"text_model_{mangled}", path)
    return table
