"""LoRA files as adapters: kohya, diffusers/PEFT and LyCORIS (LoRA, LoCon, LoHa, LoKr, DoRA, full diff, norms, …).

Names of layers are turned by diffusers' conversion tables, and every kind but plain LoRA is computed by lycoris' own
modules. What is low-rank in the file stays low-rank.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from ..lora_folder import LoraFolder, ambiguous_note, folded, readable
from .checkpoint import Checkpoint, read_safetensors

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
    "lora_B.bias": "lora_up.bias",
    "alpha": "alpha",
}
_SPARSE = ("bias_indices", "bias_values", "bias_size")
"""A sparse change of the weight beside the low-rank one, as LyCORIS' extraction writes it."""

_OF_LYCORIS = re.compile(
    r"hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t[12])|oft_(blocks|diag)|rescale|[ab][12]\.weight|bm\.weight|[wb]_norm|weight|on_input"
)
"""What LyCORIS' other kinds are made of: LoHa, LoKr, OFT and BOFT, GLoRA, norms, (IA)³."""


@dataclass(frozen=True)
class LoadedLora:
    """One LoRA of a generation: its part of the UNet, and of each text encoder (without deltas where it has none).

    notes: sentences on what its file holds and was not used.
    """

    name: str
    unet: Adapter
    text: tuple[Adapter, ...]
    notes: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the picture is the same with it: strength 0, no layer of this model, or nothing but zeros."""
        return all(adapter.changes_nothing for adapter in (self.unet, *self.text))


def list_loras(folder: Path) -> dict[str, Path]:
    """Names and files of all LoRAs in a folder and below it."""
    loras = LoraFolder(folder)
    return {loras.name_of(file): file for file in loras.files}


def find_lora(folder: LoraFolder, name: str) -> tuple[Path, str]:
    """The file of the LoRA `name`, and a sentence where several files have that name, or nothing.

    Raises:
        LoratorioError: the folder has no such LoRA (with the nearest names).
    """
    found = folder.find(name)
    if found:
        return found[0], ambiguous_note(name, found, folder)
    for file in folder.pickles:
        if folded(file.stem) == folded(name):
            return file, ""  # the reader says why it will not be opened
    by_folded = {folded(folder.name_of(file)): folder.name_of(file) for file in folder.files}
    near = difflib.get_close_matches(folded(name), by_folded, n=3, cutoff=0.4)
    names = [by_folded[each] for each in near]
    hint = f"The nearest names are: {', '.join(names)}." if names else f"It has {len(by_folded)} other LoRAs."
    raise LoratorioError(
        f"LoRA {name} is not in {readable(folder.root)}. {hint} {folder.cannot_be_read}".strip()
    )


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
    weights, notes = _by_layer(name, tensors, _peft_alphas(file), parts)
    deltas: dict[str, dict[str, list[Delta]]] = {part: {} for part in parts}
    notes += _unread(name, weights)
    for (part, layer, source), own in weights.items():
        _check_alpha(name, source, own)
        found = _deltas(name, layer, own, parts[part].get_submodule(layer))
        deltas[part].setdefault(layer, []).extend(found)
    if any(_does_nothing(own) for own in weights.values()):
        notes.append(f"LoRA {name} has alpha 0 in some layers: it changes nothing there.")
    loaded = LoadedLora(
        name,
        Adapter(name, deltas.pop("unet"), unet),
        tuple(Adapter(name, own, te) for own in deltas.values()),
        tuple(notes),
    )
    for adapter in (loaded.unet, *loaded.text):
        adapter.check_finite()
    return loaded


_Layer = tuple[str, str, str]
"""A part of the model (``unet``, ``text_encoder``, ``text_encoder_2``), a module path in it, and the file's name for it: a file may
have one layer under two names, and both count."""


def _by_layer(
    name: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], parts: Mapping[str, nn.Module]
) -> tuple[dict[_Layer, dict[str, Tensor]], list[str]]:
    """The file's tensors by layer of the model and by kohya's tails (``lora_up.weight``, ``hada_w1_a``, ``diff``, …), and notes.

    Raises:
        LoratorioError: nothing, or next to nothing, in the file is for this model.
    """
    if not tensors:
        raise LoratorioError(f"LoRA {name} is empty: the file holds no weights. Get it again.")
    plain = {key.replace(".default.", "."): tensor for key, tensor in tensors.items()}
    own_layers = {key[: own.start()] for key in plain if (own := _OWN_TAIL.search(key))}
    unified = {_unified(key, own_layers): tensor for key, tensor in plain.items()}
    kohya_named = {key: tensor for key, tensor in unified.items() if key.startswith(tuple(_KOHYA_PARTS))}
    others = {key: tensor for key, tensor in unified.items() if key not in kohya_named}
    strange = [key for key in others if not _is_peft([key]) and not _is_older(key)]
    if len(strange) == len(unified):
        raise LoratorioError(
            f"LoRA {name} is not a LoRA that can be read here: its weights have names like {next(iter(tensors))}."
        )
    others = {key: tensor for key, tensor in others.items() if _is_peft([key]) or _is_older(key)}
    tables = {part: _path_table(model) for part, model in parts.items()}
    grouped: dict[_Layer, dict[str, Tensor]] = {}
    missing: dict[str, str] = {}
    for part, source, layer, tail, tensor in (
        *_kohya_names(kohya_named, parts),
        *_peft_names(others, alphas),
    ):
        path = tables.get(part, {}).get(layer.replace(".", "_"))
        if path is None:
            missing.setdefault(
                layer, f"{layer} of the {part.replace('_', ' ')} with weights of shape {_shape(tensor)}"
            )
        else:
            grouped.setdefault((part, path, f"{source}{layer}"), {})[tail] = tensor
    for key in [key for key, own in grouped.items() if own.keys() == {"alpha"}]:
        strange.append(f"{key[2]}.alpha")
        del grouped[key]
    if len(grouped) < _LEAST_PART * (len(grouped) + len(missing)) or not grouped:
        first = next(iter(missing.values()), strange[0] if strange else "")
        raise LoratorioError(
            f"LoRA {name} changes the layer {first}, and this model has no such layer. It was made for another kind of model: "
            "remove it from the prompt, or use the checkpoint that it is for."
        )
    return grouped, _leftovers(name, len(grouped), list(missing), strange)


_LEAST_PART = 0.1
"""Of a file's layers that must be in the model; with fewer it is for another kind of model."""


def _leftovers(name: str, used: int, missing: Sequence[str], strange: Sequence[str]) -> list[str]:
    notes = []
    if missing:
        notes.append(
            f"Of LoRA {name} {used} of {used + len(missing)} layers were used: this model has no {missing[0]}"
            f"{' and others' if len(missing) > 1 else ''}."
        )
    if strange:
        notes.append(
            f"LoRA {name} was read without {strange[0]}{f' and {len(strange) - 1} more tensors' if len(strange) > 1 else ''}: "
            "they are none of a LoRA's weights that are known here."
        )
    return notes


_OWN_TAIL = re.compile(r"\.(lora_(up|down|mid)\.weight|diff(_b)?|hada_\w+|lokr_\w+|oft_\w+|[wb]_norm)$")
"""Tails of kohya's and LyCORIS' files, which may stand behind dotted names too."""

_SHARED_TAIL = re.compile(r"\.(lora_[AB]\.(weight|bias)|lora_magnitude_vector(\.weight)?|dora_scale|alpha)$")
"""Tails that PEFT's files have as well."""

_COMFY = ("model.diffusion_model.", "diffusion_model.")
_DOTTED = {
    **dict.fromkeys(_COMFY, "lora_unet_"),
    "unet.": "lora_unet_",
    "text_encoder.": "lora_te1_",
    "text_encoder_2.": "lora_te2_",
}


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


_Named = tuple[str, str, str, str, Tensor]
"""Part, what the file calls the part, layer (dots or underscores), tail, tensor."""


def _kohya_names(tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Iterable[_Named]:
    blocks = _sgm_names({key.split(".", 1)[0] for key in tensors}, parts["unet"])
    for key, tensor in tensors.items():
        layer, _, tail = key.partition(".")
        prefix = next(each for each in _KOHYA_PARTS if layer.startswith(each))
        if tail.startswith("lora_magnitude_vector"):
            tensor = tensor.reshape(-1, 1)
        source = layer if layer in blocks else prefix
        path = blocks.get(layer, layer.removeprefix(prefix))
        yield _KOHYA_PARTS[prefix], source, path, _PEFT_TAILS.get(tail, tail), tensor


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


def _peft_names(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> Iterable[_Named]:
    new_names = tensors if _is_peft(tensors) else _older_names(tensors)
    for key, tensor in new_names.items():
        prefix = next((each for each in _PEFT_PARTS if key.startswith(each)), "")
        part = _PEFT_PARTS.get(prefix, "unet")
        tail = next((each for each in _PEFT_TAILS if key.endswith("." + each)), "")
        layer = key.removeprefix(prefix).removesuffix("." + tail).removesuffix(".lora")
        if tail == "lora_A.weight" and not {f"{prefix}{layer}{each}" for each in _ALPHAS} & new_names.keys():
            # Without a word on alpha it equals the rank.
            alpha = torch.tensor(alphas.get(f"{part}.{layer}", float(len(tensor))))
            yield part, prefix, layer, "alpha", alpha
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
            # PEFT takes the first that fits.
            fitting = (
                alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)
            )
            value = next(fitting, value)
        try:
            alpha = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise LoratorioError(
                f"The LoRA's configuration gives the layer {layer} the alpha {str(value)[:40]!r}, which is no number. Get it again."
            ) from None
        # rsLoRA divides by √r, the readers of alpha by r.
        return alpha * default**0.5 if self._config.get(f"{part}.use_rslora") else alpha


def _peft_alphas(file: Path) -> Mapping[str, float]:
    """Alphas that diffusers keeps in the file's header, or PEFT in ``adapter_config.json`` beside the file."""
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata() or {}
    config = _json_object(metadata.get("lora_adapter_metadata", ""))
    beside = file.with_name("adapter_config.json")
    if not config and file.stem == "adapter_model" and beside.is_file():
        own = _json_object(beside.read_text(encoding="utf-8", errors="replace"))
        config = {f"{part}.{key}": value for part in set(_PEFT_PARTS.values()) for key, value in own.items()}
    return _Alphas(config)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


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


def _deltas(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> list[Delta]:
    """What a file has for one layer, all of which add up."""
    found: list[Delta] = []
    if "diff" in own:
        with _fitting(name, path, own, layer):
            found.append(Dense(weight=own["diff"].to(torch.float32).reshape(_weight_shape(layer))))
    if "diff_b" in own:
        found.append(Dense(bias=own["diff_b"].to(torch.float32)))
    others = {tail: tensor for tail, tensor in own.items() if _OF_LYCORIS.fullmatch(tail)}
    if "lora_up.weight" in own and "lora_down.weight" in own:
        found += _of_low_rank(name, path, own, layer)
    elif others:
        further = {tail: own[tail] for tail in ("alpha", "dora_scale") if tail in own}
        found.append(_by_lycoris(name, path, {**others, **further}, layer))
    if not found:
        tails = ", ".join(sorted(own.keys() - {"alpha"})) or "alpha alone"
        raise LoratorioError(f"LoRA {name} is of a kind that cannot be read here: layer {path} has {tails}.")
    return found


def _of_low_rank(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> list[Delta]:
    """Plain LoRA and LoCon: alpha/rank times up·down, what lies beside it at the same scale, and DoRA's magnitudes."""
    rank = len(own["lora_down.weight"])
    scale = float(own["alpha"]) / rank if "alpha" in own else 1.0
    plain = LowRank(own["lora_down.weight"], own["lora_up.weight"], scale, own.get("lora_mid.weight"))
    found: list[Delta] = []
    if "lora_up.bias" in own:
        found.append(Dense(bias=own["lora_up.bias"].to(torch.float32) * scale))
    with _fitting(name, path, own, layer):
        sparse = _sparse(own, _weight_shape(layer))
    if "dora_scale" not in own:
        return [plain, *found, *([] if sparse is None else [Dense(weight=sparse * scale)])]
    before = _weight(layer)
    with _fitting(name, path, own, layer):
        change = plain.dense().reshape(before.shape)
        if sparse is not None:
            change = change + sparse * scale
        merged = _dora(before + change, own["dora_scale"].to(torch.float32))
    return [Dense(weight=merged - before), *found]


def _sparse(own: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """The sparse change beside a low-rank one, in full and of the weight's shape, float32."""
    if not all(tail in own for tail in _SPARSE):
        return None
    indices, values, size = (own[tail] for tail in _SPARSE)
    stored = torch.Size(int(side) for side in size)
    if stored.numel() != shape.numel():
        raise ValueError(f"its sparse change is {tuple(stored)}")
    # Checked: places outside of it would be written to all the same.
    packed = torch.sparse_coo_tensor(indices.long(), values.to(torch.float32), stored, check_invariants=True)
    return packed.to_dense().reshape(shape)


def _unread(name: str, weights: Mapping[_Layer, Mapping[str, Tensor]]) -> Iterable[str]:
    """A sentence on tensors of known layers that no kind here knows."""
    low_rank = {
        "lora_up.weight",
        "lora_down.weight",
        "lora_mid.weight",
        "lora_up.bias",
        "alpha",
        "dora_scale",
    }
    known = {*low_rank, "diff", "diff_b", *_SPARSE}
    unread = [
        f"{source}.{tail}"
        for (_, _, source), own in weights.items()
        for tail in own
        if tail not in known and not _OF_LYCORIS.fullmatch(tail)
    ]
    if unread:
        several = f"{len(unread)} of its tensors, {unread[0]} and others" if len(unread) > 1 else unread[0]
        yield f"LoRA {name} was read without {several}: they are of no kind that is known here."


def _check_alpha(name: str, layer: str, own: Mapping[str, Tensor]) -> None:
    alpha = own.get("alpha")
    if alpha is not None and not (alpha.numel() == 1 and math.isfinite(float(alpha))):
        raise LoratorioError(
            f"LoRA {name} has an alpha of {_shape(alpha)} for the layer {layer} that is not one finite number: the file is damaged. "
            "Get it again."
        )


def _does_nothing(own: Mapping[str, Tensor]) -> bool:
    """Whether alpha is 0 where it is a strength: not with OFT's blocks, nor with LoKr's factors that are both whole."""
    has_rank = any(tail.startswith(("lora_", "hada_")) or tail in ("lokr_w1_b", "lokr_w2_b") for tail in own)
    return has_rank and "alpha" in own and float(own["alpha"]) == 0


def _weight(layer: nn.Module) -> Tensor:
    """The layer's weight in float32 on the CPU, wherever and however the model keeps it."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().to("cpu", torch.float32)


def _weight_shape(layer: nn.Module) -> torch.Size:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape


@contextlib.contextmanager
def _fitting(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> Iterator[None]:
    """What torch and lycoris raise for shapes that do not belong together, as a sentence."""
    try:
        yield
    except (RuntimeError, ValueError, AttributeError) as problem:
        shapes = ", ".join(f"{tail} {_shape(tensor)}" for tail, tensor in own.items() if tensor.ndim)
        raise LoratorioError(
            f"LoRA {name} does not fit the layer {path}, whose weight is {_shape(_weight(layer))}: it has {shapes}. "
            "It was made for another kind of model: remove it from the prompt."
        ) from problem


def _by_lycoris(name: str, path: str, own: dict[str, Tensor], layer: nn.Module) -> Dense:
    """The dense change that lycoris computes for one layer, in float32 on the CPU."""
    own = {tail: tensor.to(torch.float32) for tail, tensor in own.items()}
    dora_scale = own.pop("dora_scale", None)
    factored = any(tail.startswith(("hada_", "lokr_")) for tail in own)
    # lycoris takes alpha 0 for the rank; in a file it is 0, as for every other reader.
    strength = 0.0 if _does_nothing(own) else 1.0
    own.setdefault("alpha", torch.tensor(0.0))
    # A copy, because the layer may be in half precision or on another device.
    plain = copy.deepcopy(layer).to("cpu", torch.float32)
    before = _weight(plain)
    with _fitting(name, path, own, layer), torch.no_grad():
        bias: Tensor | None = None
        if any(tail.startswith("lokr_") for tail in own):
            weight = _lokr(own)
        elif factored:
            # With alpha/rank already, as in its forward; its get_diff_weight multiplies by that once more (lycoris 4.1.3).
            weight = _lycoris_module(name, path, own, plain).get_weight(before.shape)
        else:
            weight, bias = _lycoris_module(name, path, own, plain).get_diff_weight(1.0)
        weight = weight * strength
        if dora_scale is not None:
            weight = _dora(before + weight.reshape(before.shape), dora_scale) - before
    return Dense(weight.detach(), None if bias is None else bias.detach())


def _lokr(own: Mapping[str, Tensor]) -> Tensor:
    """alpha/rank · w₁ ⊗ w₂, each whole or as a product (LoKr, arXiv 2309.14859); whole ones have no rank, and no alpha.

    By the formula, since lycoris guesses from a layer's shape how it is to be factored, and refuses what was factored otherwise.
    """
    factors: list[Tensor] = []
    rank = 0
    for number in ("1", "2"):
        a, b, core = (own.get(f"lokr_{part}") for part in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        if a is None or b is None:
            if f"lokr_w{number}" not in own:
                raise ValueError(f"it has no lokr_w{number}")
            factors.append(own[f"lokr_w{number}"])
            continue
        rank = rank or len(b)
        factors.append(a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b))
    first, second = factors
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    alpha = float(own["alpha"])
    return torch.kron(first, second.contiguous()) * (alpha / rank if rank and alpha else 1.0)


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
