"""The arithmetic of a delta: what it adds to a layer's output, added in place.

Letters in shapes: G groups of rows of equal length, R rows of all groups together, r rank, H′×W′ pixels of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import RMS_NORM, Dense


def add_low_rank(layer: nn.Module, rows: Tensor, output: Tensor, down: Tensor, up: Tensor) -> None:
    """output += up · down · rows, each group of rows with its own product.

    Args:
        layer: Linear or Conv2d, whose stride, padding and tiling count.
        rows: its input, R rows: (R, …, in) or (R, in, H, W).
        output: its output for these rows, of the same dtype.
        down: (G, r, in) or (G, r, in, kh, kw). up: (G, r, out).
    """
    if isinstance(layer, nn.Conv2d):
        # `_conv_forward` knows the layer's padding mode, which tiling changes while the model lives.
        parts = zip(rows.chunk(len(down)), down, strict=True)
        lowered = torch.cat([layer._conv_forward(part, own, None) for part, own in parts])
        _add_product(output.movedim(1, -1), lowered.movedim(1, -1), up)
    else:
        tokens = rows.reshape(len(down), -1, rows.shape[-1])
        _add_product(output, torch.bmm(tokens, down.transpose(1, 2)), up)


def _add_product(output: Tensor, lowered: Tensor, up: Tensor) -> None:
    """output (R, …, out) += lowered (R, …, r) · up (G, r, out), by group, without a copy of the output where its layout allows."""
    groups, rank, width = up.shape
    if output.is_contiguous():
        output.view(groups, -1, width).baddbmm_(lowered.reshape(groups, -1, rank), up)
        return
    pictures = output.movedim(-1, 1)
    if pictures.is_contiguous():
        count = len(pictures)
        own_up = up.transpose(1, 2).repeat_interleave(count // groups, dim=0)
        pictures.view(count, width, -1).baddbmm_(own_up, lowered.movedim(-1, 1).reshape(count, rank, -1))
        return
    output.add_(torch.bmm(lowered.reshape(groups, -1, rank), up).reshape(output.shape))


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
