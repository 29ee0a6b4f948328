"""Which layer of the model a tensor of a LoRA file belongs to, and what it is there.

Every way of naming comes down to kohya's and LyCORIS' tails (``lora_up.weight``, ``hada_w1_a``, ``diff``, …) of a module path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import LoratorioError
from ..prompt.lora_folder import SUFFIX, reason
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
}
# PEFT's names for what kohya's files call otherwise.
_PEFT_TAILS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "magnitude": "dora_scale",
    "dora_scale": "dora_scale",
    "lora_B.bias": "lora_up.bias",
    "alpha": "alpha",
}
_MAGNITUDES = ("lora_magnitude_vector", "magnitude")
"""Of DoRA, per output: PEFT's, in newer files with ``.weight``, and ai-toolkit's."""

_COMFY = ("model.diffusion_model.", "diffusion_model.")
_DOTTED = {
    **dict.fromkeys(_COMFY, "lora_unet_"),
    "unet.": "lora_unet_",
    "text_encoder.": "lora_te1_",
    "text_encoder_2.": "lora_te2_",
}
_COMFY_TEXT = re.compile(r"^(?:text_encoders\.)?clip_([lgh])\.(?:transformer\.)?")
"""ComfyUI's text encoders: SD 1's and SDXL's first is ``l``, SD 2's ``h``, SDXL's second ``g``."""

_ADAPTER = re.compile(
    r"\.(lora_(?:A|B|up|down|mid|magnitude_vector)|hada_[wt]\w+|lokr_[wt]\w+)\.(?!(?:weight|bias)$)[^.]+(?=(?:\.(?:weight|bias))?$)"
)
"""The name that PEFT gave an adapter, behind its parameter's or module's name."""

_OWN_TAIL = re.compile(r"\.(lora_(up|down|mid)\.weight|diff(_b)?|hada_\w+|lokr_\w+|oft_\w+|[wb]_norm)$")
"""Tails of kohya's and LyCORIS' files, which may stand behind dotted names too."""

_SHARED_TAIL = re.compile(
    r"\.(lora_[AB]\.(weight|bias)|(lora_)?magnitude(_vector)?(\.weight)?|dora_scale|alpha)$"
)
"""Tails that PEFT's files have as well."""

_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Factors with the rank as their first side."""

_SPELLINGS = {
    "alpha": ("lora_alpha", "network_alpha", "alpha"),
    "rank": ("r", "rank", "lora_rank", "ss_network_dim"),
}
"""What headers and configurations call alpha and rank. kohya's ``ss_network_alpha`` is not one: its files have alpha as tensors, and
converted ones have it in the matrices."""

_IN_CONFIG = re.compile(
    r"((unet|text_encoder|text_encoder_2)\.)?(lora_alpha|network_alpha|alpha|r|rank|lora_rank|use_rslora|(alpha|rank)_pattern)"
)
_IN_HEADER = re.compile(rf"{_IN_CONFIG.pattern}|ss_network_args|ss_network_dim")

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
        notes: sentences about what was not used.
    """

    layers: dict[Layer, dict[str, Tensor]]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def by_layer(name: str, tensors: Mapping[str, Tensor], file: Path, parts: Mapping[str, nn.Module]) -> Named:
    """What is in the LoRA `name`, read from `file`, for the model's `parts`.

    Raises:
        LoratorioError: nothing, or almost nothing, in the file is for this model; or its configuration cannot be read.
    """
    if not tensors:
        raise LoratorioError(f"LoRA {name} is empty: the file has no weights. Get it again.")
    config = _Config.beside(file, name)
    embeddings, others = _bundled(tensors)
    plain = [(_common(key), tensor) for key, tensor in others.items()]
    own_layers = {key[: found.start()] for key, _ in plain if (found := _OWN_TAIL.search(key))}
    unified: dict[str, Tensor] = {}
    for key, tensor in plain:
        whole = _unified(key, own_layers)
        if whole in unified:
            raise LoratorioError(
                f"LoRA {name} contains {whole[:120]} twice: the file has several adapters. Save each to a file of its own."
            )
        unified[whole] = tensor
    kohyas = {key: tensor for key, tensor in unified.items() if key.startswith(tuple(_KOHYA_PARTS))}
    pefts = {
        key: each
        for key, each in unified.items()
        if key not in kohyas and (_is_peft([key]) or _is_older(key))
    }
    strange = [key for key in unified if key not in kohyas and key not in pefts]
    if not kohyas and not pefts:
        raise LoratorioError(
            f"LoRA {name} is not a supported LoRA: its weights have names like {next(iter(tensors))[:80]}."
        )
    named: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for part, prefix, layer, tail, tensor in (*_kohya_names(kohyas), *_peft_names(pefts)):
        magnitude = tail.removesuffix(".weight") in _MAGNITUDES
        named.setdefault((part, prefix, layer), {})[_PEFT_TAILS.get(tail, tail)] = (
            tensor.reshape(-1, 1) if magnitude else tensor
        )
    grouped: dict[Layer, dict[str, Tensor]] = {}
    missing: dict[str, str] = {}
    tables = {part: _path_table(model) for part, model in parts.items()}
    for (part, prefix, layer), own in named.items():
        if own.keys() == {"alpha"}:
            strange.append(f"{prefix}{layer}.alpha")
            continue
        used = _part_of(part, layer, own, parts, tables, config)
        path = tables.get(used, {}).get(layer.replace(".", "_"))
        if path is None:
            missing.setdefault(layer, f"{layer[:120]} of the {part.replace('_', ' ')} ({described(own)})")
        else:
            dotted = layer if "." in layer else path
            grouped[Layer(used, path, f"{prefix}{layer}")] = {**own, **config.strength(used, dotted, own)}
    if not grouped or len(grouped) < _LEAST_PART * (len(grouped) + len(missing)):
        first = next(iter(missing.values()), strange[0] if strange else "")
        raise LoratorioError(
            f"LoRA {name} changes the layer {first}, which this model does not have. The LoRA was made for another kind of model: "
            "remove it from the prompt, or use a checkpoint that it is for."
        )
    notes = (*config.notes, *_leftovers(name, len(grouped), list(missing), strange))
    return Named(grouped, embeddings, notes)


def described(own: Mapping[str, Tensor]) -> str:
    """A layer's weights with their shapes, as a sentence names them; single numbers, as alpha, are none."""
    shapes = {tail: "×".join(map(str, tensor.shape)) for tail, tensor in own.items() if tensor.ndim}
    return ", ".join(f"{tail} {shape}" for tail, shape in shapes.items()) or "no weights"


def _part_of(
    part: str,
    layer: str,
    own: Mapping[str, Tensor],
    parts: Mapping[str, nn.Module],
    tables: Mapping[str, Mapping[str, str]],
    config: _Config,
) -> str:
    """The part of the model that a layer is in. PEFT's folder of a text encoder alone does not name it: the layer and its shape do."""
    mangled = layer.replace(".", "_")
    if part != "unet" or mangled in tables["unet"]:
        return part
    fitting = [
        other
        for other, table in tables.items()
        if mangled in table and _fits(own, parts[other].get_submodule(table[mangled]))
    ]
    return config.text_encoder if config.text_encoder in fitting else next(iter(fitting), part)


def _fits(own: Mapping[str, Tensor], layer: nn.Module) -> bool:
    """Whether low-rank matrices are of the layer's sides; what is not low-rank may be."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    ends = (("lora_up.weight", 0), ("lora_down.weight", 1))
    return all(
        own[tail].ndim > 1 and weight.ndim > 1 and own[tail].shape[side] == weight.shape[side]
        for tail, side in ends
        if tail in own
    )


def _common(key: str) -> str:
    """A tensor's name without the name of PEFT's adapter, without its wrapper's, and with diffusers' names for ComfyUI's parts."""
    key = _ADAPTER.sub(r".\1", key)
    if "base_model.model." in key:
        key = key.replace("base_model.model.", "")
        key = key if key.startswith((*_DOTTED, *_KOHYA_PARTS)) else f"unet.{key}"
    encoder = _COMFY_TEXT.match(key)
    if encoder:
        return ("text_encoder_2." if encoder[1] == "g" else "text_encoder.") + key[encoder.end() :]
    return key


def _leftovers(name: str, used: int, missing: Sequence[str], strange: Sequence[str]) -> Iterator[str]:
    if missing:
        yield (
            f"LoRA {name}: only {used} of {used + len(missing)} layers match this model. It does not have {missing[0][:120]}"
            f"{' and others' if len(missing) > 1 else ''}."
        )
    if strange:
        yield (
            f"LoRA {name} was read without {strange[0][:120]}{f' and {len(strange) - 1} more tensors' if len(strange) > 1 else ''}: "
            "unknown kinds of weights."
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
    """A tensor's name in kohya's way: LyCORIS' and ComfyUI's, kohya's OFT's, and dotted ones but PEFT's and diffusers' own.

    own_layers: those layers' names that have a tail of kohya's or LyCORIS' own.
    """
    for own_prefix in ("lycoris_", "oft_unet_"):
        if key.startswith(own_prefix):
            return "lora_unet_" + key.removeprefix(own_prefix)
    prefix = next((each for each in _DOTTED if key.startswith(each)), "")
    tail = _OWN_TAIL.search(key) or _SHARED_TAIL.search(key)
    if tail is None or key.startswith(tuple(_KOHYA_PARTS)):
        return key
    layer = key[: tail.start()]
    # An alpha or a magnitude goes with the rest of its layer.
    if prefix not in _COMFY and layer not in own_layers:
        return key
    return (
        _DOTTED.get(prefix, "lora_unet_") + layer.removeprefix(prefix).replace(".", "_") + key[tail.start() :]
    )


_Tensor = tuple[str, str, str, str, Tensor]
"""Part, what the file calls the part, layer (dots or underscores), tail, tensor."""


def _kohya_names(tensors: Mapping[str, Tensor]) -> Iterable[_Tensor]:
    for key, tensor in tensors.items():
        layer, _, tail = key.partition(".")
        prefix = next(each for each in _KOHYA_PARTS if layer.startswith(each))
        yield _KOHYA_PARTS[prefix], prefix, layer.removeprefix(prefix), tail, tensor


def _peft_names(tensors: Mapping[str, Tensor]) -> Iterable[_Tensor]:
    new_names = tensors if _is_peft(tensors) else _older_names(tensors)
    for key, tensor in new_names.items():
        prefix = next((each for each in _PEFT_PARTS if key.startswith(each)), "")
        tail = next((each for each in _PEFT_TAILS if key.endswith("." + each)), "")
        layer = key.removeprefix(prefix).removesuffix("." + tail).removesuffix(".lora")
        yield _PEFT_PARTS.get(prefix, "unet"), prefix, layer, tail, tensor


def _older_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers used before PEFT's, as PEFT's; UNet and text encoders each have a table of their own."""
    text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_encoder")}
    unet = {key: tensor for key, tensor in tensors.items() if key not in text}
    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(unet)
    return renamed | (convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD) if text else {})


def _is_older(key: str) -> bool:
    """Whether it is one of diffusers' names of before PEFT, or an alpha beside one."""
    return bool(
        re.search(r"_lora\.|\.lora\.|lora_linear_layer\.|\.alpha$|\.lora_magnitude_vector|\.magnitude$", key)
    )


def _is_peft(tensors: Iterable[str]) -> bool:
    return any(".lora_A." in key or ".lora_B." in key for key in tensors)


class _Config:
    """A trainer's configuration: alpha and rank for all layers, and patterns of layer names with other values.

    Attributes:
        notes: a sentence if a configuration lies next to the file but may be that of another one.
    """

    def __init__(self, values: Mapping[str, object], name: str, unused: bool = False) -> None:
        self._values = values
        self._name = name
        self._unused = unused
        self.notes: tuple[str, ...] = ()

    @classmethod
    def beside(cls, file: Path, name: str) -> _Config:
        """Out of the file's header (diffusers' JSON, plain entries, kohya's), or PEFT's ``adapter_config.json`` beside the file."""
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
        header = {key: _decoded(value) for key, value in metadata.items() if _IN_HEADER.fullmatch(key)}
        of_diffusers = _decoded(metadata.get("lora_adapter_metadata", ""))
        values = {**header, **(of_diffusers if isinstance(of_diffusers, Mapping) else {})}
        own = file.with_name("adapter_config.json")
        if any(_IN_CONFIG.fullmatch(key) for key in values) or not own.is_file():
            return cls(values, name)
        others = {each.stem for each in file.parent.iterdir() if each.suffix.lower() == SUFFIX} - {file.stem}
        if file.stem != "adapter_model" and others:
            return cls(values, name, unused="adapter_model" not in others)
        try:
            read = _decoded(own.read_text(encoding="utf-8", errors="replace"))
        except OSError as problem:
            raise LoratorioError(
                f"{own.name} next to LoRA {name} cannot be opened ({reason(problem)}): check its permissions."
            ) from problem
        return cls({**values, **(read if isinstance(read, Mapping) else {})}, name)

    @property
    def text_encoder(self) -> str:
        """The text encoder that PEFT wrapped, by its class."""
        mapping = self._values.get("auto_mapping")
        kind = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        return "text_encoder_2" if kind == "CLIPTextModelWithProjection" else "text_encoder"

    def strength(self, part: str, layer: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's alpha, or its scale where it has no rank, as far as its tensors do not say it themselves."""
        if self._is_on("ss_network_args", "rs_lora"):
            scale = self._rank_stabilised(own)
            if scale is not None:
                return {SCALE: torch.tensor(scale)}
        ends = [own[tail] for tail in _RANKED if tail in own and own[tail].ndim]
        is_whole = own.keys() >= {"lokr_w1", "lokr_w2"}
        if "alpha" in own or not (ends or is_whole):
            return {}
        if self._unused and not self.notes:
            self.notes = (
                f"adapter_config.json next to LoRA {self._name} was not used, because the folder has several LoRAs. "
                "If it belongs to this one, move both to a folder of their own.",
            )
        alpha, rank = (self._given(part, layer, what) for what in ("alpha", "rank"))
        if is_whole:
            if alpha is None or rank is None:
                return {}
            return {SCALE: torch.tensor(alpha / rank if rank else 0.0)}
        rank = len(ends[0])
        stabilised = any(self._is_on(key) for key in (f"{part}.use_rslora", "use_rslora"))
        if alpha is None and not stabilised:
            return {}
        # rsLoRA divides by √r, the readers of alpha by r.
        return {"alpha": torch.tensor((rank if alpha is None else alpha) * (rank**0.5 if stabilised else 1))}

    def _rank_stabilised(self, own: Mapping[str, Tensor]) -> float | None:
        """√rank where LyCORIS' rs_lora is not in alpha, or cannot be read from it by the rank; None elsewhere."""
        if own.keys() >= {"lokr_w1", "lokr_w2"}:
            # alpha is rank·√rank here, whatever was asked for.
            alpha = float(own["alpha"]) if "alpha" in own and own["alpha"].numel() == 1 else 0.0
            if 0 < alpha < math.inf:
                return float(alpha ** (1 / 3))
            rank = self._given("unet", "", "rank")
            return rank**0.5 if rank and 0 < rank < math.inf else None
        a2 = own.get("a2.weight")
        return len(a2) ** 0.5 if a2 is not None and a2.ndim else None

    def _is_on(self, key: str, inner: str = "") -> bool:
        value = self._values.get(key)
        if inner:
            value = value.get(inner) if isinstance(value, Mapping) else None
        return str(value).lower() not in ("none", "false", "0", "")

    def _given(self, part: str, layer: str, what: str) -> float | None:
        """The alpha or rank of a layer, where it is given."""
        spellings = _SPELLINGS[what]
        keys = (*(f"{part}.{each}" for each in spellings), *spellings)
        value = next((self._values[key] for key in keys if self._values.get(key) is not None), None)
        for key in (f"{part}.{what}_pattern", f"{what}_pattern"):
            patterns = self._values.get(key)
            if isinstance(patterns, Mapping) and patterns:
                # PEFT takes the first that fits.
                value = next(
                    (each for pattern, each in patterns.items() if self._fits(pattern, layer)), value
                )
                break
        try:
            return None if value is None else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise LoratorioError(
                f"The configuration of LoRA {self._name} gives the layer {layer[:80]} the {what} {str(value)[:40]!r}, "
                "which is not a number. Get it again."
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
            f"The configuration of LoRA {self._name} has the layer pattern {pattern[:40]!r}, which cannot be read. Get it again."
        )


def _decoded(text: str) -> object:
    """What JSON says; other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
