"""Where LoRAs diverge in the first steps, as a part of the picture for each: the places of ``at=auto``.

The mass of a pixel is how far the LoRAs diverge there, together, above their mean over the picture. k-means on the pixels' positions,
weighted with it, gives a figure's centre for each LoRA. Cuts halfway between centres divide the picture into boxes. Each LoRA gets the box
in which it diverges most, compared with the others.

Letters in shapes: N LoRAs whose places are sought, H×W latent pixels, S starts of k-means, M pixels with mass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .lazy_torch import torch
from .regions import WHOLE, Box

if TYPE_CHECKING:
    from torch import Tensor

MOST = 8
"""The most LoRAs whose places are found: all their orders are compared."""

TIE = 0.2
"""Orders that differ by less than this in how much of each LoRA's divergence lies in its own box fit alike. Found by measurement: up to
there the prompt's order makes pictures that are as often right (docs/lab/METHODS.md)."""

UPRIGHT = 3.0
"""Figures are taller than wide: distances downwards are divided by this, unless the prompt asks for top or bottom."""

APART = 3.8
"""N LoRAs have N figures if any two of the N centres are at least this many times their mean spread apart: of a figure that is divided, the
parts are √12 = 3.5 apart if it is even, and 2.7 if it fades. Found by measurement (docs/lab/METHODS.md)."""

OWN = 0.25
"""They also have N if each LoRA diverges in its own box: by this part of the way from an equal share in each box, 0, to all in one, 1."""

_STARTS, _ROUNDS = 12, 50


class Layout(NamedTuple):
    """Places that were found.

    Attributes:
        boxes: for each LoRA its part of the picture; together they are all of it.
        separation: of the two centres that are nearest to each other, the distance over their mean spread, inf for one LoRA.
        are_apart: whether there are as many figures as LoRAs; else there are fewer.
        fits: how much of each LoRA's divergence lies in its own box, from 0 to 1.
    """

    boxes: tuple[Box, ...]
    separation: float
    are_apart: bool
    fits: tuple[float, ...]


def relative_to_mean(divergence: Tensor, area: Tensor) -> Tensor:
    """D over its mean where the LoRAs may act, 0 elsewhere; (N, B, H, W) float32.

    Args:
        divergence: D = 1 − S of each LoRA and pixel, (N, B, H, W).
        area: how much of each pixel is looked at, from 0 to 1, (H, W) or (B, H, W).
    """
    mean = (divergence * area).mean(dim=(-2, -1), keepdim=True) / area.mean(
        dim=(-2, -1), keepdim=True
    ).clamp_min(1e-20)
    return divergence / mean.clamp_min(1e-20) * area


def layout(
    divergence: Tensor,
    area: Tensor,
    region: Box = WHOLE,
    towards: Sequence[tuple[float, float] | None] = (),
) -> Layout | None:
    """A part of the picture for each LoRA; None where the LoRAs diverge nowhere more than elsewhere.

    Args:
        divergence: `relative_to_mean` of each LoRA, the mean over the first evaluations, (N, H, W) float64 on the processor.
        area: as there, (H, W) float64.
        region: the part of the picture that these H×W latent pixels show.
        towards: for each LoRA where the prompt wants it, (x, y) in parts of the picture and perhaps outside of it, or None.
    """
    count, height, width = divergence.shape
    mass = (divergence.mean(dim=0) - 1).clamp_min(0) * area
    if not bool((mass > 0).sum() >= count):
        return None
    towards = towards or [None] * count
    upright = 1.0 if any(wish is not None and wish[1] != 0.5 for wish in towards) else UPRIGHT
    centres, separation = _centres(mass, count, upright)
    across, down = (region.x1 - region.x0) / width, (region.y1 - region.y0) / height
    cells = _cut({i: (x, y) for i, (x, y) in enumerate(centres)}, WHOLE, (region, across, down, upright))
    inside = torch.stack([_inside(cells[i], region, height, width) for i in range(count)])
    parts = (inside[None] * divergence[:, None]).sum(dim=(-2, -1))
    shares = (parts / parts.sum(dim=1, keepdim=True).clamp_min(1e-20)).tolist()
    middles = [(region.x0 + x * across, region.y0 + y * down) for x, y in centres]
    order = _order(shares, middles, towards)
    fits = tuple(shares[i][cell] for i, cell in enumerate(order))
    own = (sum(fits) - 1) / max(count - 1, 1)
    return Layout(tuple(cells[cell] for cell in order), separation, separation >= APART or own >= OWN, fits)


def _centres(mass: Tensor, count: int, upright: float) -> tuple[list[tuple[float, float]], float]:
    """The best of several k-means on the pixels' positions, (x, y) in pixels, and how far apart its nearest two centres are, in spreads:
    the root mean square distance of a centre's mass from it."""
    rows, columns = torch.nonzero(mass, as_tuple=True)
    weights = mass[rows, columns]
    points = torch.stack([columns + 0.5, (rows + 0.5) / upright], dim=-1).to(torch.float64)  # (M, 2)
    # Each start divides the mass into equal parts along another direction.
    angles = torch.arange(_STARTS, dtype=torch.float64) * (math.pi / _STARTS)
    along = points @ torch.stack([angles.cos(), angles.sin()])  # (M, S)
    order = along.argsort(dim=0, stable=True)
    before = weights[order].cumsum(dim=0) - weights[order] / 2
    parts = (before / weights.sum() * count).to(torch.long).clamp(0, count - 1)
    labels = torch.empty_like(order).scatter_(0, order, parts).T  # (S, M)
    for _ in range(_ROUNDS):
        of = (
            torch.nn.functional.one_hot(labels, count).to(torch.float64) * weights[None, :, None]
        )  # (S, M, N)
        centres = of.transpose(1, 2) @ points / of.sum(dim=1).clamp_min(1e-20)[..., None]  # (S, N, 2)
        distances = (points[None, :, None] - centres[:, None]).square().sum(dim=-1)
        nearest = distances.argmin(dim=-1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
    left = (distances.amin(dim=-1) * weights).sum(dim=-1)
    best = int(left.argmin())
    mass = of[best].sum(dim=0)
    spread = ((of[best] * distances[best]).sum(dim=0) / mass.clamp_min(1e-20)).sqrt()
    between = [
        float((centres[best, i] - centres[best, j]).norm() / (spread[i] + spread[j]).div(2).clamp_min(1e-20))
        for i, j in itertools.combinations(range(count), 2)
    ]
    chosen = [(float(x), float(y) * upright) for x, y in centres[best].tolist()]
    if not bool((mass > 0).all()):  # a centre without any pixel
        return chosen, 0.0
    return chosen, min(between, default=math.inf)


_Scale = tuple[Box, float, float, float]


def _cut(centres: dict[int, tuple[float, float]], box: Box, scale: _Scale) -> dict[int, Box]:
    """The box in parts, one around each centre: cut first where neighbours are farthest apart, halfway between them."""
    if len(centres) < 2:
        return dict.fromkeys(centres, box)
    region, across, down, upright = scale
    _, axis, at = max(
        (
            ((high - low) / (upright if axis else 1), axis, (low + high) / 2)
            for axis in (0, 1)
            for low, high in _neighbours(centres, axis)
        ),
        key=lambda each: each[0],
    )
    # As it is written into tags and infotexts.
    line = round((region.x0 + at * across) if axis == 0 else (region.y0 + at * down), 3)
    first = box._replace(x1=line) if axis == 0 else box._replace(y1=line)
    second = box._replace(x0=line) if axis == 0 else box._replace(y0=line)
    here = {i: centre for i, centre in centres.items() if centre[axis] < at}
    there = {i: centre for i, centre in centres.items() if centre[axis] >= at}
    if not here or not there:  # two centres in one point
        first, (here, there) = box, ({}, centres)
        return dict.fromkeys(there, box)
    return {**_cut(here, first, scale), **_cut(there, second, scale)}


def _neighbours(centres: dict[int, tuple[float, float]], axis: int) -> list[tuple[float, float]]:
    return list(itertools.pairwise(sorted(centre[axis] for centre in centres.values())))


def _inside(box: Box, region: Box, height: int, width: int) -> Tensor:
    """The pixels whose middle lies in the box, (H, W) float64."""
    x = region.x0 + (torch.arange(width, dtype=torch.float64) + 0.5) / width * (region.x1 - region.x0)
    y = region.y0 + (torch.arange(height, dtype=torch.float64) + 0.5) / height * (region.y1 - region.y0)
    across, down = (x >= box.x0) & (x < box.x1), (y >= box.y0) & (y < box.y1)
    return (down[:, None] & across[None, :]).to(torch.float64)


def _order(
    shares: Sequence[Sequence[float]],
    middles: Sequence[tuple[float, float]],
    towards: Sequence[tuple[float, float] | None],
) -> tuple[int, ...]:
    """For each LoRA its cell: the largest sum of shares; of orders that are as good, the one that the prompt's words ask for, then the one
    that has the prompt's LoRAs from left to right."""
    count = len(shares)
    fits = {
        order: sum(shares[i][cell] for i, cell in enumerate(order)) / count
        for order in itertools.permutations(range(count))
    }
    best = max(fits.values())
    alike = [order for order, fit in fits.items() if fit >= best - TIE]
    row = {cell: place for place, cell in enumerate(sorted(range(count), key=lambda cell: middles[cell]))}

    def against(order: tuple[int, ...]) -> tuple[float, int, float]:
        # Squared: of two on the same side, the one that is wanted farther out stands there.
        asked = sum(
            math.dist(middles[cell], wish) ** 2
            for cell, wish in zip(order, towards, strict=True)
            if wish is not None
        )
        places = [row[cell] for cell in order]
        turned = sum(a > b for a, b in itertools.combinations(places, 2))
        return round(asked, 6), turned, -fits[order]

    return min(alike, key=against)
