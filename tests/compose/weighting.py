"""`spatial_weights` by the values of the knobs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loratorio.compose.methods.loratorio import (
    BY_DIVERGENCE,
    BY_RELATIVE_DIVERGENCE,
    by_similarity,
)
from loratorio.compose.methods.loratorio import spatial_weights as _spatial_weights


def spatial_weights(
    base: Tensor,
    adapters: Tensor,
    patch_size: int,
    temperature: float | None,
    top_k: int = 0,
    *,
    adaptive: bool = False,
    relative: bool = False,
    **more: Any,
) -> Tensor:
    """By SoftMin at this temperature; without one by divergence, or by relative divergence."""
    without = BY_RELATIVE_DIVERGENCE if relative else BY_DIVERGENCE
    weighting = without if temperature is None else by_similarity(temperature, adaptive)
    return _spatial_weights(base, adapters, weighting, patch_size, top_k, **more)
