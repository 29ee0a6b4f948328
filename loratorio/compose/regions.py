"""Places: where in the picture a LoRA may act.

Letters in shapes: N LoRAs, B images, H×W latent pixels. Coordinates are parts of the picture, (0, 0) its upper left corner and (1, 1) its
lower right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def outside(boxes: Sequence[Box], area: Sequence[Box] = (WHOLE,)) -> tuple[Box, ...]:
    """What of an area no box covers, as boxes that meet."""
    left = list(area)
    for box in boxes:
        left = [part for each in left for part in _without(each, box)]
    return tuple(left)


def _without(area: Box, box: Box) -> list[Box]:
    x0, y0 = max(area.x0, box.x0), max(area.y0, box.y0)
    x1, y1 = min(area.x1, box.x1), min(area.y1, box.y1)
    if x0 >= x1 or y0 >= y1:
        return [area]
    parts = (
        Box(area.x0, area.y0, x0, area.y1),
        Box(x1, area.y0, area.x1, area.y1),
        Box(x0, area.y0, x1, y0),
        Box(x0, y1, x1, area.y1),
    )
    return [part for part in parts if part.x0 < part.x1 and part.y0 < part.y1]


@dataclass(frozen=True)
class Place:
    """Where a LoRA may act: in all of these boxes.

    Attributes:
        edge: over which width, as a part of the picture's shorter side, it fades from 1 to 0 around a box's border. The
            picture's own border is none.
        sought: its own part of these boxes is still to be found (`loratorio.compose.search`); until then it may act in all of them.
        towards: of a sought place, where the prompt wants it, (x, y); None: the prompt does not say.
    """

    boxes: tuple[Box, ...]
    edge: float = 0.0
    sought: bool = False
    towards: tuple[float, float] | None = None

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


_ROUNDING = 1e-6
"""Masks that meet add up to 1 but for this."""


class Masks(NamedTuple):
    """Where each of N LoRAs may act on latents of one size, in R pictures; R is 1 where all pictures have the same places.

    Attributes:
        own: per LoRA its mask, (N, R, H, W); of one without a place, 1 less what it yields inside the others' places.
        coverage: how much the LoRAs have to say together, (R, H, W): 1 less this is the base's.
        has_gap: whether the base has anything to say anywhere.
    """

    own: Tensor
    coverage: Tensor
    has_gap: bool

    def of(self, pictures: Sequence[int]) -> Masks:
        """The masks of rows that belong to these pictures."""
        if self.own.shape[1] == 1 or tuple(pictures) == tuple(range(self.own.shape[1])):
            return self
        # By slices and not by an index tensor, which would have to be copied to the device at every step.
        own = torch.stack([self.own[:, each] for each in pictures], dim=1)
        return Masks(own, torch.stack([self.coverage[each] for each in pictures]), self.has_gap)


def masks_of(
    pictures: Sequence[Sequence[Place | None]],
    height: int,
    width: int,
    region: Box = WHOLE,
    yielding: float = YIELDING,
) -> Masks | None:
    """The masks of LoRAs with these places (None: everywhere) in each picture; None where every one may act everywhere in all."""
    each = [_own_masks(places, height, width, region, yielding) for places in pictures]
    if all(own is None for own in each):
        return None
    everywhere = torch.ones(len(pictures[0]), height, width)
    own = torch.stack([everywhere if own is None else own for own in each], dim=1)
    coverage = own.sum(dim=0).clamp(max=1)
    return Masks(own, coverage, bool((coverage < 1 - _ROUNDING).any()))


def _own_masks(
    places: Sequence[Place | None], height: int, width: int, region: Box, yielding: float
) -> Tensor | None:
    """The masks in one picture, (N, H, W); None where every LoRA may act everywhere."""
    placed = [None if place is None else place.mask(height, width, region) for place in places]
    if all(mask is None or bool((mask == 1).all()) for mask in placed):
        return None
    taken = torch.zeros(height, width)
    for place, mask in zip(places, placed, strict=True):
        if place is not None and mask is not None and not place.sought:
            taken += mask
    taken.clamp_(max=1)
    return torch.stack([1 - yielding * taken if mask is None else mask for mask in placed])


class PlaceMasks:
    """The picture's part that a sampling shows, with the masks of its LoRAs, each made once.

    Args:
        region: that part; the whole picture, but for inpainting of which only the masked part is sampled.

    Attributes:
        found: for each picture of the batch, and each frame of it, the places that were found, by LoRA number. Empty before.
    """

    def __init__(self, region: Box = WHOLE) -> None:
        self.found: tuple[Mapping[int, Place], ...] = ()
        self._region = region
        self._masks: dict[tuple[Any, ...], Masks | None] = {}
        self._single: dict[tuple[Any, ...], Tensor] = {}

    def masks(
        self,
        places: Mapping[int, Place | None],
        size: tuple[int, int],
        device: Any,
        yielding: float = YIELDING,
    ) -> Masks | None:
        """`masks_of` LoRAs with these places, by number, on latents of this height and width, on `device`."""
        if not any(places.values()):
            return None
        pictures = tuple(
            tuple(found.get(number, place) for number, place in places.items())
            for found in self.found or ({},)
        )
        key = (pictures, size, device, yielding)
        if key not in self._masks:
            made = masks_of(pictures, *size, self._region, yielding)
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
