"""The arithmetic of a delta: what it adds to a layer's output, added in place.

Letters in shapes: G groups of rows of equal length, R rows of all groups together, r rank, H′×W′ pixels of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import RMS_NORM, Dense


def add_low_rank(
    layer: nn.Module, rows: Tensor, output: Tensor, down: Tensor, up: Tensor, factor: float | Tensor = 1.0
) -> None:
    """output += factor · up · down · rows, each group of rows with its own product.

    Args:
        layer: Linear or Conv2d, whose stride, padding and tiling count.
        rows: its input, R rows: (R, …, in) or (R, in, H, W).
        output: its output for these rows, of the same dtype.
        down: (G, r, in) or (G, r, in, kh, kw). up: (G, r, out).
        factor: one number, or one for each group, (G, 1), or for each of the ranks, (1, r).
    """
    if not isinstance(layer, nn.Conv2d):
        tokens = rows.reshape(len(down), -1, rows.shape[-1])
        _add_product(output, torch.bmm(tokens, down.transpose(1, 2)), up, factor)
        return
    # Group by group: one product for all would need their lowered pictures put together, and `up` copied for every picture.
    each = len(rows) // len(down)
    for number, (own_down, own_up) in enumerate(zip(down, up, strict=True)):
        part = slice(number * each, (number + 1) * each)
        own = factor[number : number + 1] if isinstance(factor, Tensor) and len(factor) > 1 else factor
        # `_conv_forward` knows the layer's padding mode, which tiling changes while the model lives.
        _add_to_pictures(output[part], layer._conv_forward(rows[part], own_down, None), own_up, own)


class Lowering:
    """factors ∘ (down · rows), for rows that have several LoRAs, each in its own measure.

    One product serves layers that get the same input one after another, such as the queries, keys and values of an attention: it is
    computed for the first of them, and freed after the last. Whether a layer's input is that one is decided by identity.
    """

    def __init__(self, down: Tensor, factors: Tensor, layers: int = 1) -> None:
        """down: (r, in) or (r, in, kh, kw), r ranks of all layers. factors: by row and rank, (R, r). layers: how many share it."""
        self._down, self._layers = down, layers
        self._factors = factors[:, :, None, None] if down.ndim == 4 else factors[:, None]
        self._input: Tensor | None = None
        self._version: int | None = None
        self._lowered: Tensor | None = None
        self._left = 0

    def of(self, layer: nn.Module, given: Tensor, rows: Tensor) -> Tensor:
        """(R, …, r), or (R, r, H′, W′) of a convolution.

        Args:
            given: the layer's whole input, the same object for layers that share it.
            rows: the R of its rows that count, (R, …, in) or (R, in, H, W).
        """
        lowered, version = self._lowered, None if given.is_inference() else given._version
        if lowered is None or self._input is not given or self._version != version:
            if isinstance(layer, nn.Conv2d):
                # `_conv_forward` knows the layer's padding mode, which tiling changes while the model lives.
                lowered = layer._conv_forward(rows, self._down, None) * self._factors
            else:
                lowered = F.linear(rows.reshape(len(rows), -1, rows.shape[-1]), self._down) * self._factors
            self._left = self._layers
        self._left -= 1
        kept = self._left > 0
        self._input, self._version, self._lowered = (given, version, lowered) if kept else (None, None, None)
        return lowered


def add_lowered(layer: nn.Module, lowered: Tensor, output: Tensor, up: Tensor) -> None:
    """output += up · lowered, with the `Lowering` of these ranks and rows; up (r, out)."""
    if isinstance(layer, nn.Conv2d):
        _add_to_pictures(output, lowered, up, 1.0)
    elif output.is_contiguous():
        output.view(-1, up.shape[1]).addmm_(lowered.flatten(0, 1), up)
    else:
        output.add_((lowered @ up).view(output.shape))


def _add_to_pictures(output: Tensor, lowered: Tensor, up: Tensor, factor: float | Tensor) -> None:
    """output (n, out, H′, W′) += factor · up (r, out) · lowered (n, r, H′, W′), without a copy of the output where its layout allows."""
    if output.is_contiguous():
        count, rank = lowered.shape[:2]
        values, alpha = _scaled(lowered.reshape(count, rank, -1), factor, -1)
        output.view(count, up.shape[1], -1).baddbmm_(up.T.expand(count, -1, -1), values, alpha=alpha)
    else:
        _add_product(output.movedim(1, -1), lowered.movedim(1, -1), up.unsqueeze(0), factor)


def _add_product(output: Tensor, lowered: Tensor, up: Tensor, factor: float | Tensor) -> None:
    """output (R, …, out) += factor · lowered (R, …, r) · up (G, r, out), by group."""
    groups, rank, width = up.shape
    values, alpha = _scaled(lowered.reshape(groups, -1, rank), factor, 1)
    if output.is_contiguous():
        output.view(groups, -1, width).baddbmm_(values, up, alpha=alpha)
    else:
        output.add_(torch.bmm(values, up).reshape(output.shape), alpha=alpha)


def _scaled(lowered: Tensor, factor: float | Tensor, dim: int) -> tuple[Tensor, float]:
    """`lowered`, (G, …) with its ranks last, or with `dim` −1 second, times a factor by group or rank; and what is left of the factor."""
    if not isinstance(factor, Tensor):
        return lowered, factor
    return lowered * factor.unsqueeze(dim), 1.0


def add_dense(layer: nn.Module, rows: Tensor, output: Tensor, delta: Dense, factor: float) -> None:
    """output += factor · (ΔW · rows + Δb) for a Linear, Conv2d or norm layer."""
    weight, bias = delta.weight, delta.bias
    if weight is None:
        if bias is not None:
            pictures = isinstance(layer, (nn.Conv2d, nn.GroupNorm))
            output.add_(bias.view(-1, *[1] * (output.ndim - 2)) if pictures else bias, alpha=factor)
    elif isinstance(layer, nn.Conv2d):
        output.add_(layer._conv_forward(rows, weight, bias), alpha=factor)
    elif isinstance(layer, nn.GroupNorm):
        output.add_(F.group_norm(rows, layer.num_groups, weight, bias, layer.eps), alpha=factor)
    elif isinstance(layer, nn.LayerNorm):
        output.add_(F.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps), alpha=factor)
    elif isinstance(layer, RMS_NORM):
        output.add_(F.rms_norm(rows, layer.normalized_shape, weight, layer.eps), alpha=factor)
    else:
        output.add_(F.linear(rows, weight, bias), alpha=factor)
