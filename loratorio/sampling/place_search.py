"""The places of LoRAs with ``at=auto``, found while sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..compose.methods import Predictions, StepContext
from ..compose.mixes import Branch, ComposedLora, Participants
from ..compose.patches import patch_divergence
from ..compose.regions import WHOLE, Box, Place, outside
from ..compose.search import Layout, layout, relative_to_mean

SHARE = 4
"""Places are found after this part of the steps at the latest."""

Found = Mapping[int, Place]
"""Places of one picture by LoRA number; none where they could not be found."""


class PlaceSearch:
    """Where the LoRAs with sought places diverge, summed up on the device over the first steps; then, once, their places.

    Args:
        after: of how many steps.
        found: the places by picture, where they are known from a pass before.

    Attributes:
        found: for each picture its places; None while they are sought, and where nothing is.
    """

    def __init__(
        self,
        participants: Participants,
        after: int,
        region: Box = WHOLE,
        found: Sequence[Found] | None = None,
    ) -> None:
        self.found: tuple[Found, ...] | None = None if found is None else tuple(found)
        self._sought = [lora for lora in participants.loras if lora.place is not None and lora.place.sought]
        self._after, self._region = after, region
        self._sum: Tensor | None = None  # (N, images, H, W)
        self._area: Tensor
        self._count = 0
        self._steps: set[int] = set()

    @property
    def numbers(self) -> list[int]:
        """The LoRAs whose places are sought, or were."""
        return [lora.number for lora in self._sought]

    @property
    def is_on(self) -> bool:
        """Whether places are sought at this step."""
        return bool(self._sought) and self.found is None

    def named(self, names: Sequence[str]) -> tuple[tuple[tuple[str, Place], ...], ...]:
        """For each picture the names, out of those of all LoRAs, and the places that were found; empty while they are sought."""
        return tuple(
            tuple((names[number], place) for number, place in each.items()) for each in self.found or ()
        )

    def settles_at(self, index: int, total: int) -> bool:
        """Whether enough has been seen before step `index` of `total`."""
        after = min(self._after, max(1, total // SHARE))
        return self.is_on and index not in self._steps and len(self._steps) >= after

    def branches(self, now: StepContext) -> list[Branch]:
        """The rows that the search needs at this step."""
        return [
            Branch(mix, True)
            for mix in (now.participants.reference, *(lora.mix for lora in self._present(now)))
        ]

    def look(self, now: StepContext, predictions: Predictions, frames: int, painted: Tensor | None) -> None:
        """Add up a step's divergence."""
        loras = self._present(now)
        if len(loras) < len(self._sought):
            return  # a LoRA that does not act yet
        base = predictions.noise(now.participants.reference)
        noise = torch.stack([predictions.noise(lora.mix) for lora in loras])
        pictures = len(set(predictions.owners))
        divergence = predictions.per_image(patch_divergence(base, noise, 1), pictures)
        # A clip's frames have one place.
        divergence = divergence.view(len(loras), pictures // frames, frames, *divergence.shape[2:]).mean(
            dim=2
        )
        place = self._sought[0].place
        assert place is not None
        area = now.mask(place)
        area = area.expand_as(divergence[0]) if painted is None else area * painted
        seen = relative_to_mean(divergence, area)
        if self._sum is not None and self._sum.shape == seen.shape:
            seen = self._sum + seen
        else:
            self._count = 0
        self._sum, self._area = seen, area.expand(seen.shape[1:])
        self._count += 1
        self._steps.add(now.index)

    def settle(self) -> None:
        """Find the places in what was seen. The one time that the search waits for the device."""
        assert self._sum is not None
        divergence, area = (each.to("cpu", torch.float64) for each in (self._sum / self._count, self._area))
        self._sum = None
        towards = [lora.place.towards for lora in self._sought if lora.place is not None]
        self.layouts = [
            layout(divergence[:, image], area[image], self._region, towards) for image in range(len(area))
        ]
        self.found = tuple(self._places(each) for each in self.layouts)

    def _places(self, found: Layout | None) -> Found:
        if found is None or not found.are_apart:
            return {}
        places = {}
        for lora, box in zip(self._sought, found.boxes, strict=True):
            assert lora.place is not None
            own = outside(outside([box]), lora.place.boxes)
            places[lora.number] = Place(own, lora.place.edge)
        return places

    def _present(self, now: StepContext) -> list[ComposedLora]:
        numbers = {lora.number for lora in self._sought}
        return [lora for lora in now.participants.loras if lora.number in numbers]
