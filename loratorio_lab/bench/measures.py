"""What is measured on pictures, and statistics of it. Numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""(H, W, 3)."""
Floats = NDArray[np.float64]


def border_ratio(picture: Pixels, period: int) -> float:
    """Mean difference of neighbouring pixels across the lines of a grid of `period` pixels, divided by the mean difference elsewhere."""
    values = picture.astype(np.float64)
    across: list[Floats] = []
    elsewhere: list[Floats] = []
    for axis in (0, 1):
        steps = np.abs(np.diff(values, axis=axis)).mean(axis=2)
        lines = np.moveaxis(steps, axis, 0)
        border = (np.arange(len(lines)) + 1) % period == 0
        across.append(lines[border].ravel())
        elsewhere.append(lines[~border].ravel())
    rest = float(np.concatenate(elsewhere).mean())
    own = np.concatenate(across)
    return float(own.mean()) / rest if rest > 0 and len(own) else 1.0


def saturation(picture: Pixels) -> float:
    """Mean of (max − min)/max over R, G, B; black counts as 0."""
    values = picture.astype(np.float64)
    top, bottom = values.max(axis=2), values.min(axis=2)
    return float(np.where(top > 0, (top - bottom) / np.maximum(top, 1), 0.0).mean())


def clipped(picture: Pixels) -> float:
    """Share of channel values at 0 or 255."""
    return float(((picture == 0) | (picture == 255)).mean())


def frechet(first: Floats, second: Floats) -> float:
    """Fréchet distance of two sets of features, (n, D) and (m, D), as between Gaussians of their means and covariances.

    Comparable only between sets of equal size: few samples bias it upwards.
    """
    if len(first) < 2 or len(second) < 2:
        return float("nan")
    difference = first.mean(axis=0) - second.mean(axis=0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _root(np.atleast_2d(a))
    # tr √(A·B) = tr √(√A·B·√A), which is symmetric.
    crossed = np.linalg.eigvalsh(root @ np.atleast_2d(b) @ root).clip(min=0)
    return float(
        difference @ difference
        + np.trace(np.atleast_2d(a))
        + np.trace(np.atleast_2d(b))
        - 2 * np.sqrt(crossed).sum()
    )


def _root(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    rooted: Floats = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return rooted


def bootstrap(groups: Sequence[Floats], rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over all values, resampling whole groups (a combination's pictures belong together)."""
    if not groups:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(0, len(groups), (rounds, len(groups)))
    sums = np.array([group.sum() for group in groups])
    counts = np.array([len(group) for group in groups])
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)
