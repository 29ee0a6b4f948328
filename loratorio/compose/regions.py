"""Places: where in the picture a LoRA may act.

Letters in shapes: N LoRAs, B images, H×W latent pixels. Coordinates are parts of the picture, (0, 0) its upper left corner and (1, 1) its
lower right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

YIELDING = 0.5
"""How much of its weight a LoRA without a place gives up inside the others' places: found by measurement (docs/lab/METHODS.md)."""

_SAMPLES = 8
"""Points a latent pixel's side is sampled at, so that a place that ends inside a pixel has its part of it."""


class Box(NamedTuple):
    """A rectangle of the picture; x to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def _is_in(box: Box, around: Box) -> bool:
    return (
        around != WHOLE
        and around.x0 <= box.x0
        and box.x1 <= around.x1
        and around.y0 <= box.y0
        and box.y1 <= around.y1
    )


@dataclass(frozen=True)
class Place:
    """Where a LoRA may act: in all of these boxes.

    Attributes:
        edge: over which width, as a part of the picture's shorter side, it fades from 1 to 0 around a box's border. The
            picture's own border is none.
    """

    boxes: tuple[Box, ...]
    edge: float = 0.0

    def is_within(self, other: Place) -> bool:
        """Whether each of its boxes lies in one of the other's. A place that is the whole picture, as it is until it is found, is around
        nothing."""
        return all(any(_is_in(box, around) for around in other.boxes) for box in self.boxes)

    def mask(self, height: int, width: int, region: Box = WHOLE) -> Tensor:
        """How much of each latent pixel belongs to the place, (H, W) float32 from 0 to 1.

        Exactly 0 where no box reaches with its edge, exactly 1 inside. Boxes that meet leave no seam.

        Args:
            region: the part of the picture that these H×W latent pixels show.
        """
        # A pixel's size in parts of the picture: edges are as wide downwards as across.
        pixel_x, pixel_y = (region.x1 - region.x0) / width, (region.y1 - region.y0) / height
        shorter = min(1 / pixel_x, 1 / pixel_y)
        covered = torch.zeros(height, width, dtype=torch.float64)
        for box in self.boxes:
            across = _profile(box.x0, box.x1, self.edge * shorter * pixel_x, region.x0, pixel_x, width)
            down = _profile(box.y0, box.y1, self.edge * shorter * pixel_y, region.y0, pixel_y, height)
            covered += down[:, None] * across[None, :]
        return covered.clamp(max=1).to(torch.float32)


def _profile(start: float, end: float, edge: float, origin: float, pixel: float, count: int) -> Tensor:
    """How much of each of `count` pixels in a row lies between `start` and `end`, (count,) float64."""
    points = (torch.arange(count * _SAMPLES, dtype=torch.float64) + 0.5) / _SAMPLES * pixel + origin
    inside = torch.ones_like(points)
    if start > 0:
        inside *= _step(points - start, edge)
    if end < 1:
        inside *= _step(end - points, edge)
    return inside.view(count, _SAMPLES).mean(dim=1)


def _step(distance: Tensor, edge: float) -> Tensor:
    """0 outside of a border, 1 inside, and a ramp of width `edge` in between."""
    if edge <= 0:
        return (distance >= 0).to(distance.dtype)
    return (distance / edge + 0.5).clamp(0, 1)


class Masks(NamedTuple):
    """Where each of N LoRAs may act on latents of one size.

    Attributes:
        own: per LoRA its mask, (N, H, W); of one without a place, 1 less what it yields inside the others' places.
        coverage: how much the LoRAs have to say together, (H, W): 1 less this is the base's.
        has_gap: whether the base has anything to say anywhere.
    """

    own: Tensor
    coverage: Tensor
    has_gap: bool


def masks_of(
    places: Sequence[Place | None], height: int, width: int, region: Box = WHOLE, yielding: float = YIELDING
) -> Masks | None:
    """The masks of LoRAs with these places (None: everywhere); None where every one may act everywhere."""
    placed = [None if place is None else place.mask(height, width, region) for place in places]
    if all(mask is None or bool((mask == 1).all()) for mask in placed):
        return None
    taken = torch.zeros(height, width)
    for mask in placed:
        if mask is not None:
            taken += mask
    taken.clamp_(max=1)
    own = torch.stack([1 - yielding * taken if mask is None else mask for mask in placed])
    coverage = own.sum(dim=0).clamp(max=1)
    return Masks(own, coverage, bool((coverage < 1).any()))


class PlaceMasks:
    """The picture's part that a sampling shows, with the masks of its LoRAs, each made once.

    Args:
        region: that part; the whole picture, but for inpainting of which only the masked part is sampled.
    """

    def __init__(self, region: Box = WHOLE) -> None:
        self._region = region
        self._masks: dict[tuple[Any, ...], Masks | None] = {}
        self._single: dict[tuple[Any, ...], Tensor] = {}

    def masks(
        self, places: Sequence[Place | None], size: tuple[int, int], device: Any, yielding: float = YIELDING
    ) -> Masks | None:
        """`masks_of` LoRAs with these places on latents of this height and width, on `device`."""
        if not any(places):
            return None
        key = (tuple(places), size, device, yielding)
        if key not in self._masks:
            made = masks_of(places, *size, self._region, yielding)
            if made is not None:
                made = Masks(made.own.to(device), made.coverage.to(device), made.has_gap)
            self._masks[key] = made
        return self._masks[key]

    def mask(self, place: Place, size: tuple[int, int], device: Any) -> Tensor:
        """`Place.mask` on latents of this height and width, (H, W) float32 on `device`."""
        key = (place, size, device)
        if key not in self._single:
            self._single[key] = place.mask(*size, self._region).to(device)
        return self._single[key]
