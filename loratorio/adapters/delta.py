"""What a LoRA does to one layer.

Every kind of LoRA file comes down to one of two forms: a low-rank product, or a dense change of weight and bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoratorioError

RMS_NORM: Any = getattr(nn, "RMSNorm", nn.LayerNorm)
"""torch's RMSNorm, which torch before 2.4 does not have."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · up · down.

    Attributes:
        down: (r, in) for a linear layer, (r, in, kh, kw) for a convolution.
        up: (out, r), or (out, r, 1, 1) for a convolution.
        scale: alpha / r and whatever else the file says; the LoRA's strength is not part of it.
        mid: (r, r, kh, kw) of a Tucker-decomposed convolution, whose down is (r, in, 1, 1).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.up.shape[1])

    def folded(self) -> LowRank:
        """The same delta without `mid`, which is folded into `down`; up is (out, r)."""
        up = self.up.flatten(1)
        if self.mid is None:
            return LowRank(self.down, up, self.scale)
        dtype = torch.promote_types(self.mid.dtype, torch.float32)
        down = torch.einsum("rskl,si->rikl", self.mid.to(dtype), self.down.flatten(1).to(dtype))
        return LowRank(down, up, self.scale)

    def dense(self) -> Tensor:
        """ΔW as one tensor, (out, in) or (out, in, kh, kw), at least float32."""
        plain = self.folded()
        dtype = torch.promote_types(plain.up.dtype, torch.float32)
        weight = plain.up.to(dtype) @ plain.down.flatten(1).to(dtype) * self.scale
        return weight.reshape(weight.shape[0], *plain.down.shape[1:])


@dataclass(frozen=True)
class Dense:
    """ΔW and Δb in full: the form of LoHa, LoKr, DoRA, full diffs, norms and biases.

    Attributes:
        weight: shaped as the layer's weight, or None.
        bias: shaped as the layer's bias, or None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    def times(self, factor: float) -> Dense:
        """The same change, stronger or weaker."""
        weight, bias = (None if part is None else part * factor for part in (self.weight, self.bias))
        return Dense(weight, bias)


Delta = LowRank | Dense


class Fitted(NamedTuple):
    """Everything that one LoRA changes in one layer, in the shapes that the layer computes with (see `fit`)."""

    low_rank: LowRank | None
    dense: Dense | None


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a generation.

    Attributes:
        name: as in the prompt.
        deltas: per layer name, what it adds to that layer; several deltas of a layer add up.
        strength: multiplies every delta; may be negative or zero. A host whose LoRA kind is not linear in its strength
            (DoRA) hands over deltas made at that strength, and a strength of 1.
    """

    name: str
    deltas: Mapping[str, Sequence[Delta]] = field(repr=False)
    strength: float = 1.0

    @property
    def changes_nothing(self) -> bool:
        """Whether it changes no layer: strength 0, no layers, or only zeros."""
        every = (delta for deltas in self.deltas.values() for delta in deltas)
        return self.strength == 0 or all(_is_zero(delta) for delta in every)

    @property
    def size(self) -> int:
        """The number of its numbers."""
        return sum(
            tensor.numel() for deltas in self.deltas.values() for each in deltas for tensor in _tensors(each)
        )

    @property
    def dense_size(self) -> int:
        """How many of them are dense changes'."""
        every = (delta for deltas in self.deltas.values() for delta in deltas)
        return sum(tensor.numel() for each in every if isinstance(each, Dense) for tensor in _tensors(each))

    def check_numbers(self) -> None:
        """Raise LoratorioError naming the layer if any tensor holds NaN or infinity, or numbers that no model could take."""
        for layer, deltas in self.deltas.items():
            for delta in deltas:
                check_tensors(self.name, layer, _tensors(delta))
                if isinstance(delta, LowRank):
                    _check_size(self.name, layer, _bound(delta) / 1000)

    def fitted(self, layers: Mapping[str, nn.Module]) -> dict[str, Fitted]:
        """By layer, what it adds there, fitted to the layer.

        Raises:
            LoratorioError: it changes a layer that `layers` lacks, or one of another shape.
        """
        made = {}
        for name, deltas in self.deltas.items():
            if name not in layers:
                raise LoratorioError(
                    f"LoRA {self.name} changes the layer {name}, which this model does not have. "
                    "The LoRA was made for another kind of model: remove it from the prompt."
                )
            try:
                made[name] = fit_all(deltas, layers[name])
            except ValueError as problem:
                raise LoratorioError(
                    f"LoRA {self.name} does not fit the layer {name}: {problem}. "
                    "The LoRA was made for another kind of model: remove it from the prompt."
                ) from None
        return made


def check_tensors(lora: str, layer: str, tensors: Iterable[Tensor]) -> None:
    """Raise LoratorioError naming LoRA and layer if a tensor holds NaN or infinity, or numbers that no model could take."""
    for tensor in tensors:
        numbers = computable(tensor)
        if not bool(torch.isfinite(numbers).all()):
            raise LoratorioError(
                f"LoRA {lora} contains NaN or infinite numbers in the layer {layer}. The file is damaged: get it again."
            )
        if numbers.numel():
            _check_size(lora, layer, float(numbers.abs().max()))


def _check_size(lora: str, layer: str, largest: float) -> None:
    if largest > LARGEST:
        raise LoratorioError(
            f"LoRA {lora} changes the layer {layer} by values up to {largest:.1e}, too large to make a picture. "
            "The file is damaged: get it again."
        )


LARGEST = 65504.0
"""The largest number of half precision. Weights of models, and what LoRAs change in them, are a thousand times smaller and more."""


def _bound(delta: LowRank) -> float:
    """No number of ΔW is larger than this; those of real LoRAs are far smaller, by more than a thousand times."""
    parts = [float(computable(tensor).abs().max()) if tensor.numel() else 0.0 for tensor in _tensors(delta)]
    return float(math.prod(parts) * abs(delta.scale) * delta.rank ** (len(parts) - 1))


def _is_zero(delta: Delta) -> bool:
    if isinstance(delta, LowRank):
        return delta.scale == 0 or not all(bool(computable(each).any()) for each in (delta.up, delta.down))
    return not any(bool(computable(tensor).any()) for tensor in _tensors(delta))


def _tensors(delta: Delta) -> list[Tensor]:
    found = [delta.down, delta.up, delta.mid] if isinstance(delta, LowRank) else [delta.weight, delta.bias]
    return [tensor for tensor in found if tensor is not None]


def computable(tensor: Tensor) -> Tensor:
    """Unchanged, or as float32 if it is 8-bit floating point, which torch cannot compute with."""
    is_8_bit = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.to(torch.float32) if is_8_bit else tensor


def _all_computable(delta: Delta) -> Delta:
    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else computable(tensor)

    if isinstance(delta, LowRank):
        return LowRank(computable(delta.down), computable(delta.up), delta.scale, of(delta.mid))
    return Dense(of(delta.weight), of(delta.bias))


def fit(delta: Delta, layer: nn.Module) -> Delta:
    """`delta` in the shapes that `layer` computes with: Linear 2-dimensional, Conv2d 4-dimensional, no `mid`.

    Raises:
        ValueError: the delta is for a layer of other shape or kind; the message has both shapes.
    """
    weight_shape = _weight_shape(layer)
    delta = _all_computable(delta)
    if isinstance(delta, LowRank):
        try:
            fitted = _fit_low_rank(delta, weight_shape)
        except (RuntimeError, IndexError) as problem:
            # torch's error for shapes that cannot be multiplied.
            raise ValueError(
                f"its matrices {_shape(delta.up)} and {_shape(delta.down)} do not match each other"
            ) from problem
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        # The product of a grouped convolution's low-rank matrices is its weight's change; the two steps are not.
        return (
            Dense(fitted.dense().reshape(weight_shape)) if grouped and isinstance(fitted, LowRank) else fitted
        )
    weight, bias = delta.weight, delta.bias
    if weight is not None:
        if weight.numel() != weight_shape.numel():
            raise ValueError(f"its weight is {_shape(weight)}, the model's is {_shape(weight_shape)}")
        weight = weight.reshape(weight_shape)
    if bias is not None:
        if bias.numel() != weight_shape[0]:
            raise ValueError(f"its bias is {_shape(bias)}, the model's is ({weight_shape[0]},)")
        bias = bias.reshape(weight_shape[:1])
    return Dense(weight, bias)


def fit_all(deltas: Sequence[Delta], layer: nn.Module) -> Fitted:
    """The sum of `deltas`, fitted to `layer`; raises ValueError as `fit` does."""
    fitted = [fit(delta, layer) for delta in deltas]
    low_rank = [delta for delta in fitted if isinstance(delta, LowRank)]
    dense = [delta for delta in fitted if isinstance(delta, Dense)]
    return Fitted(
        reduce(_low_rank_sum, low_rank) if low_rank else None, reduce(_dense_sum, dense) if dense else None
    )


def _low_rank_sum(one: LowRank, other: LowRank) -> LowRank:
    """One product of both: their ranks side by side."""
    downs = [each.down.to(torch.float32) * each.scale for each in (one, other)]
    return LowRank(torch.cat(downs), torch.cat([one.up, other.up], dim=1))


def _dense_sum(one: Dense, other: Dense) -> Dense:
    def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return b if a is None else a if b is None else a.to(torch.float32) + b

    return Dense(plus(one.weight, other.weight), plus(one.bias, other.bias))


def _weight_shape(layer: Any) -> torch.Size:
    """The shape of the weight that `layer` computes with, which is not always the one that it stores."""
    if isinstance(layer, nn.Conv2d):
        channels = layer.in_channels // layer.groups
        return torch.Size((layer.out_channels, channels, *layer.kernel_size))
    if isinstance(layer, nn.GroupNorm):
        return torch.Size((layer.num_channels,))
    if isinstance(layer, (nn.LayerNorm, RMS_NORM)):
        return torch.Size(layer.normalized_shape)
    if isinstance(layer, nn.Linear) or hasattr(layer, "in_features"):
        return torch.Size((layer.out_features, layer.in_features))
    if type(layer).__name__.startswith("Linear"):
        # Low-bit layers of some hosts: 4-bit weights know their shape, GGUF's show it as their own.
        weight = layer.weight
        stored = getattr(getattr(weight, "quant_state", None), "shape", None)
        return torch.Size(weight.shape if stored is None else stored)
    raise ValueError(f"a layer of type {type(layer).__name__} cannot take a LoRA")


def _fit_low_rank(delta: LowRank, weight_shape: torch.Size) -> Delta:
    if len(weight_shape) < 2:
        raise ValueError(f"it is low-rank, but the model's weight is {_shape(weight_shape)}")
    if delta.up[0, 0].numel() != 1:
        return _dense_of_wide_up(delta, weight_shape)
    plain = delta.folded()
    fits = (
        plain.up.shape[0] == weight_shape[0]
        and plain.down.shape[0] == plain.up.shape[1]
        and plain.down[0].numel() == weight_shape[1:].numel()
    )
    if not fits:
        raise ValueError(
            f"its matrices are {_shape(delta.up)} and {_shape(delta.down)}, the model's weight is {_shape(weight_shape)}"
        )
    return LowRank(plain.down.reshape(-1, *weight_shape[1:]), plain.up, plain.scale)


def _dense_of_wide_up(delta: LowRank, weight_shape: torch.Size) -> Dense:
    """A convolution whose kernel sits in `up`, its down being 1×1: (out, r, kh, kw) and (r, in, 1, 1)."""
    if delta.mid is not None or delta.down[0, 0].numel() != 1 or delta.down.shape[0] != delta.up.shape[1]:
        raise ValueError(f"its matrices {_shape(delta.up)} and {_shape(delta.down)} do not match each other")
    dtype = torch.promote_types(delta.up.dtype, torch.float32)
    weight = torch.einsum("orkl,ri->oikl", delta.up.to(dtype), delta.down.flatten(1).to(dtype)) * delta.scale
    if weight.shape != weight_shape:
        raise ValueError(f"its product is {_shape(weight)}, the model's weight is {_shape(weight_shape)}")
    return Dense(weight)


def _shape(of: Tensor | torch.Size) -> str:
    return "×".join(str(side) for side in (of.shape if isinstance(of, Tensor) else of))
