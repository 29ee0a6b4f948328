"""Layers of every kind, changes for them, and the slow way to apply these: merged into a copy in float64."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, Delta, Dense, LowRank

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 10),
    "linear without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv 1x1": lambda: nn.Conv2d(6, 10, 1),
    "conv 3x3": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "conv strided": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "conv 1x1 strided": lambda: nn.Conv2d(6, 10, 1, stride=2),
    "conv dilated": lambda: nn.Conv2d(6, 10, 3, padding="same", dilation=2, bias=False),
    "conv circular": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    "conv oblong": lambda: nn.Conv2d(6, 10, (1, 3), padding=(0, 1)),
    "conv grouped": lambda: nn.Conv2d(6, 10, 3, padding=1, groups=2),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(3, 6),
}
"""Every one takes six channels."""


def rows_for(layer: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """Random input of `count` rows: pictures, or tokens."""
    shape = (count, 6, 5, 7) if isinstance(layer, (nn.Conv2d, nn.GroupNorm)) else (count, 4, 6)
    return torch.randn(*shape, generator=generator)


def low_rank(layer: Any, rank: int, generator: torch.Generator, mid: bool = False) -> LowRank:
    """A random low-rank delta as a file has it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    out, channels, *kernel = layer.weight.shape
    ones = [1] * len(kernel)
    if mid:
        return LowRank(
            normal(rank, channels, *ones), normal(out, rank, *ones), 0.5, normal(rank, rank, *kernel)
        )
    return LowRank(normal(rank, channels, *kernel), normal(out, rank, *ones), 0.5)


def dense(layer: Any, generator: torch.Generator, weight: bool = True, bias: bool = True) -> Dense:
    """A random dense delta; of the bias only where the layer has one."""
    bias = bias and layer.bias is not None
    return Dense(
        torch.randn(layer.weight.shape, generator=generator) if weight else None,
        torch.randn(layer.bias.shape, generator=generator) if bias else None,
    )


def deltas_for(layer: nn.Module, kind: str, generator: torch.Generator) -> list[Delta]:
    """Deltas of one LoRA for one layer, where a layer of its kind can have such."""
    flat = isinstance(layer, (nn.LayerNorm, nn.GroupNorm))
    if kind == "dense" or flat:
        return [dense(layer, generator, bias=kind != "none")]
    if kind == "bias":
        return [dense(layer, generator, weight=False)]
    if kind == "mid" and isinstance(layer, nn.Conv2d):
        return [low_rank(layer, 3, generator, mid=True)]
    if kind == "several":
        return [
            low_rank(layer, 2, generator),
            dense(layer, generator),
            low_rank(layer, 1, generator),
            dense(layer, generator),
        ]
    return [low_rank(layer, {"rank 1": 1, "rank 5": 5}.get(kind, 3), generator)]


KINDS = ("rank 1", "rank 3", "rank 5", "mid", "dense", "bias", "several")


def merged(layer: Any, adapters: Sequence[Adapter], mix: Sequence[float], name: str = "layer") -> nn.Module:
    """A float64 copy of the layer with the adapters' deltas in its weights."""
    copied = copy.deepcopy(layer).double()
    copied._forward_hooks.clear()  # where the bank is attached
    with torch.no_grad():
        for adapter, part in zip(adapters, mix, strict=True):
            for delta in adapter.deltas.get(name, ()):
                weight = delta.dense() if isinstance(delta, LowRank) else delta.weight
                bias = delta.bias if isinstance(delta, Dense) else None
                if weight is not None:
                    copied.weight += part * adapter.strength * weight.double().reshape(copied.weight.shape)
                if bias is not None:
                    copied.bias += part * adapter.strength * bias.double()
    return copied


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def held(bank: Bank) -> dict[int, int]:
    """What a bank keeps in memory besides its adapters' own tensors: by address, how many numbers each storage has."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [bank]
    own: dict[int, int] = {}
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (type, FunctionType, ModuleType, Adapter)):
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            storage = each.untyped_storage()
            own[storage.data_ptr()] = storage.nbytes() // each.element_size()
        else:
            waiting += gc.get_referents(each)
    deltas = [delta for adapter in bank.adapters for every in adapter.deltas.values() for delta in every]
    tensors = [value for delta in deltas for value in vars(delta).values() if isinstance(value, Tensor)]
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return {address: numbers for address, numbers in own.items() if address not in given}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__.rstrip("_") in (
            "linear",
            "matmul",
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
        )
        return func(*args, **(kwargs or {}))
