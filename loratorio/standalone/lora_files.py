"""LoRA files as adapters: kohya, diffusers/PEFT and LyCORIS (LoRA, LoCon, LoHa, LoKr, DoRA, full diff, norms, …).

Which layer a tensor belongs to is in `lora_names`. LoRA, LoKr and DoRA are computed by their formulas, the other kinds by lycoris'
own modules. What is low-rank in the file stays low-rank.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lycoris.functional import boft, diag_oft
from lycoris.functional.general import weight_decompose
from lycoris.modules import get_module, make_module
from torch import Tensor, nn

from ..adapters.delta import Adapter, Delta, Dense, LowRank
from ..errors import LoratorioError
from .checkpoint import Checkpoint, read_safetensors
from .embeddings import Embedding, read_embeddings
from .lora_names import SCALE, Layer, by_layer, described

_SPARSE = ("bias_indices", "bias_values", "bias_size")
"""A sparse change of the weight beside the low-rank one, as LyCORIS' extraction writes it."""

_OF_LYCORIS = re.compile(
    r"hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t[12])|oft_(blocks|diag)|rescale|[ab][12]\.weight|bm\.weight|[wb]_norm|weight|on_input"
)
"""What LyCORIS' other kinds are made of: LoHa, LoKr, OFT and BOFT, GLoRA, norms, (IA)³."""


_WITH_ALPHA = re.compile(r"lora_(up|down)\.weight|hada_\w+|lokr_w[12]_[ab]|oft_blocks|[ab][12]\.weight")
"""Of the kinds in which alpha counts. Elsewhere it may be anything: LoKr's whole factors have infinity in half precision."""

_MATRIX = re.compile(r"lora_(up|down|mid)\.weight|hada_w[12]_[ab]|lokr_w[12](_[ab])?|[ab][12]\.weight")


@dataclass(frozen=True)
class LoadedLora:
    """One LoRA of a generation: its part of the UNet, and of each text encoder (without deltas where it has none).

    notes: sentences about contents of its file that were not used.
    embeddings: those that are bundled with it.
    """

    name: str
    unet: Adapter
    text: tuple[Adapter, ...]
    notes: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the picture is the same with it: strength 0, or no layer of this model, nothing but zeros, and no word."""
        adapters = (self.unet, *self.text)
        off = all(adapter.strength == 0 for adapter in adapters)
        return all(adapter.changes_nothing for adapter in adapters) and (off or not self.embeddings)


def load_lora(
    file: Path, name: str, checkpoint: Checkpoint, te: float = 1.0, unet: float = 1.0
) -> LoadedLora:
    """Read a LoRA for a checkpoint, at strengths `te` in the text encoders and `unet` in the UNet.

    A DoRA counts as its full change at strength 1, times the strength, as in the WebUI.

    Raises:
        LoratorioError: a pickle, damaged, made for another model, containing NaN or infinity, or of an unknown kind.
    """
    tensors = read_safetensors(file, f"LoRA {name}")
    parts: dict[str, nn.Module] = {"unet": checkpoint.unet}
    for number, encoder in zip(("", "_2"), checkpoint.text_encoders, strict=False):
        parts[f"text_encoder{number}"] = encoder
    numbers = {key: _as_numbers(name, key, tensor) for key, tensor in tensors.items()}
    named = by_layer(name, numbers, file, parts)
    deltas: dict[str, dict[str, list[Delta]]] = {part: {} for part in parts}
    notes = [*named.notes, *_unread(name, named.layers)]
    layers = {layer: _without_idle_alpha(own) for layer, own in named.layers.items()}
    for layer, own in layers.items():
        _check_shapes(name, layer.source, own)
        if all(tensor.numel() for tensor in own.values()):
            found = _deltas(name, layer.path, own, parts[layer.part].get_submodule(layer.path))
            deltas[layer.part].setdefault(layer.path, []).extend(found)
    if any(_does_nothing(own) for own in layers.values()):
        notes.append(f"LoRA {name} has alpha 0 or rank 0 in some layers, so it has no effect there.")
    embeddings, unused = read_embeddings(name, named.embeddings, checkpoint.text_encoders)
    loaded = LoadedLora(
        name,
        Adapter(name, deltas.pop("unet"), unet),
        tuple(Adapter(name, own, te) for own in deltas.values()),
        (*notes, *unused),
        embeddings,
    )
    for adapter in (loaded.unet, *loaded.text):
        adapter.check_numbers()
    return loaded


def _deltas(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> list[Delta]:
    """The deltas of a file for one layer, which add up."""
    found: list[Delta] = []
    others = {tail: tensor for tail, tensor in own.items() if _OF_LYCORIS.fullmatch(tail)}
    if "diff" in own:
        with _fitting(name, path, own, layer):
            change = own["diff"].to(torch.float32).reshape(_weight_shape(layer))
            if "dora_scale" in own and not others and "lora_up.weight" not in own:
                before = _weight(layer)
                change = _dora(before + change, own["dora_scale"].to(torch.float32)) - before
            found.append(Dense(weight=change))
    if "diff_b" in own:
        found.append(Dense(bias=own["diff_b"].to(torch.float32)))
    if "lora_up.weight" in own and "lora_down.weight" in own:
        found += _of_low_rank(name, path, own, layer)
    elif others:
        further = {tail: own[tail] for tail in ("alpha", "dora_scale", SCALE) if tail in own}
        found.append(_by_lycoris(name, path, {**others, **further}, layer))
    if not found:
        tails = ", ".join(sorted(own.keys() - {"alpha"})) or "alpha alone"
        raise LoratorioError(f"LoRA {name} is of an unsupported kind: the layer {path} has {tails}.")
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


def _unread(name: str, weights: Mapping[Layer, Mapping[str, Tensor]]) -> Iterable[str]:
    """A sentence about tensors of known layers whose kind is unknown."""
    low_rank = {
        "lora_up.weight",
        "lora_down.weight",
        "lora_mid.weight",
        "lora_up.bias",
        "alpha",
        "dora_scale",
    }
    known = {*low_rank, "diff", "diff_b", SCALE, *_SPARSE}
    unread = [
        f"{source}.{tail}"
        for (_, _, source), own in weights.items()
        for tail in own
        if tail not in known and not _OF_LYCORIS.fullmatch(tail)
    ]
    if unread:
        several = f"{len(unread)} of its tensors, {unread[0]} and others" if len(unread) > 1 else unread[0]
        yield f"LoRA {name} was read without {several}: their kind is unknown."


def _as_numbers(name: str, key: str, tensor: Tensor) -> Tensor:
    """Unchanged if torch can compute with its dtype; 8-bit floating point and whole numbers as float32, which is exact."""
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return tensor
    try:
        if tensor.is_complex():
            raise TypeError("complex")
        return (
            tensor.to(torch.int64)
            if key.endswith(("bias_indices", "bias_size"))
            else tensor.to(torch.float32)
        )
    except (RuntimeError, TypeError, NotImplementedError) as problem:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LoratorioError(
            f"LoRA {name} stores {key[:80]} as {kind}, which is not supported: get it as fp16 or bf16."
        ) from problem


def _check_shapes(name: str, layer: str, own: Mapping[str, Tensor]) -> None:
    for tail in ("alpha", SCALE):
        number = own.get(tail)
        if number is not None and not (number.numel() == 1 and math.isfinite(float(number))):
            raise LoratorioError(
                f"LoRA {name} has an alpha of shape {_shape(number)} for the layer {layer[:120]}, which must be one finite number. "
                "The file is damaged: get it again."
            )
    for tail, tensor in own.items():
        if _MATRIX.fullmatch(tail) and tensor.ndim < 2:
            raise LoratorioError(
                f"LoRA {name} has a {tail} of shape {_shape(tensor)} for the layer {layer[:120]}, which must be a matrix. "
                "The file is damaged: get it again."
            )


def _without_idle_alpha(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors, alpha among them where it counts."""
    counts = any(_WITH_ALPHA.fullmatch(tail) for tail in own)
    return {tail: tensor for tail, tensor in own.items() if counts or tail != "alpha"}


def _does_nothing(own: Mapping[str, Tensor]) -> bool:
    """Whether its rank is 0, or its alpha is 0 and scales it, which it does not in OFT's blocks."""
    has_rank = any(tail.startswith(("lora_", "hada_", "lokr_")) for tail in own)
    no_alpha = has_rank and "alpha" in own and float(own["alpha"]) == 0
    return no_alpha or not all(tensor.numel() for tensor in own.values())


def _weight(layer: nn.Module) -> Tensor:
    """The layer's weight in float32 on the CPU, wherever and however the model keeps it."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().to("cpu", torch.float32)


def _weight_shape(layer: nn.Module) -> torch.Size:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape


@contextlib.contextmanager
def _fitting(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> Iterator[None]:
    """Errors of torch and lycoris for shapes that do not match, as a sentence."""
    try:
        yield
    except (RuntimeError, ValueError, AttributeError, IndexError) as problem:
        raise LoratorioError(
            f"LoRA {name} does not fit the layer {path}, whose weight is {_shape(_weight(layer))}: it has {described(own)}. "
            "The LoRA was made for another kind of model: remove it from the prompt."
        ) from problem


def _by_lycoris(name: str, path: str, own: dict[str, Tensor], layer: nn.Module) -> Dense:
    """The dense change that lycoris computes for one layer, in float32 on the CPU."""
    own = {tail: tensor.to(torch.float32) for tail, tensor in own.items()}
    dora_scale = own.pop("dora_scale", None)
    scale = own.pop(SCALE, None)
    factored = any(tail.startswith(("hada_", "lokr_")) for tail in own)
    # lycoris takes alpha 0 for the rank; in a file it is 0, as for every other reader.
    strength = 0.0 if _does_nothing(own) else 1.0 if scale is None else float(scale)
    own.setdefault("alpha", torch.tensor(0.0))
    # A copy, because the layer may be in half precision or on another device.
    plain = copy.deepcopy(layer).to("cpu", torch.float32)
    before = _weight(plain)
    with _fitting(name, path, own, layer), torch.no_grad():
        bias: Tensor | None = None
        if any(tail.startswith("lokr_") for tail in own):
            weight = _lokr(own)
        elif "oft_blocks" in own or "oft_diag" in own:
            weight = _oft(own, before)
        elif own.keys() >= {"weight", "on_input"}:
            weight = _ia3(own, before)
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

    Computed by the formula, because lycoris derives the factors' shapes from the layer's and rejects other factorisations.
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


def _oft(own: Mapping[str, Tensor], before: Tensor) -> Tensor:
    """The weight's rows turned block by block: kohya's OFT, LyCORIS' and BOFT, whatever the blocks' number and size.

    Alpha times the number of rows limits the norm of what is turned. `oft_diag`, of LyCORIS in 2023, holds the rotations themselves.
    """
    if "oft_blocks" in own:
        blocks = own["oft_blocks"]
        functional = boft if blocks.ndim == 4 else diag_oft
        limit = float(own["alpha"]) * len(before)
        turned: Tensor = before + functional.diff_weight(before, blocks, None, constraint=limit)
    else:
        blocks = own["oft_diag"]
        rows = before.reshape(*blocks.shape[:2], -1)
        turned = torch.einsum("knm,kni->kmi", blocks, rows).reshape(before.shape)
    if "rescale" in own:
        turned = turned * own["rescale"].reshape(-1, *[1] * (before.ndim - 1))
    return turned - before


def _ia3(own: Mapping[str, Tensor], before: Tensor) -> Tensor:
    """(IA)³: each output, or each input, changed by its factor."""
    factors = own["weight"].flatten()
    on_input = bool(own["on_input"])
    if len(factors) != before.shape[on_input]:
        raise ValueError(f"it has {len(factors)} factors")
    return before * factors.reshape(-1, *[1] * (before.ndim - 1 - on_input))


def _lycoris_module(name: str, path: str, own: Mapping[str, Tensor], layer: nn.Module) -> Any:
    kind, parameters = get_module({f"layer.{tail}": tensor for tail, tensor in own.items()}, "layer")
    module = None
    if kind is not None:
        with contextlib.suppress(TypeError):  # lycoris 4.1 cannot read its own IA3
            module = make_module(kind, parameters, "layer", layer)
    if module is None:
        tails = ", ".join(sorted(own.keys() - {"alpha"}))
        raise LoratorioError(f"LoRA {name} is of an unsupported kind: the layer {path} has {tails}.")
    return module


def _dora(merged: Tensor, dora_scale: Tensor) -> Tensor:
    """The merged weight at DoRA's magnitudes, which are given per output (out, 1, …) or per input (1, in, …)."""
    if dora_scale.ndim < 2:
        dora_scale = dora_scale.reshape(-1, 1)
    sides = ((merged.shape[0], 1), (1, merged.shape[1]))
    if dora_scale.shape[:2] not in sides or dora_scale.numel() != max(dora_scale.shape[:2]):
        raise ValueError("its magnitudes are for a different number of outputs")
    per_output = dora_scale.shape[0] == merged.shape[0]
    scale = dora_scale.reshape(*dora_scale.shape[:2], *[1] * (merged.ndim - 2))
    decomposed: Tensor = weight_decompose(merged, scale, 1, per_output)
    return decomposed


def _shape(tensor: Tensor) -> str:
    return "×".join(str(side) for side in tensor.shape) or "one number"
