"""Weights per frequency band instead of per patch, after MultLFG (arXiv 2505.20525)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..lazy_torch import torch
from .base import Entry, Predictions, StepContext
from .loratorio import Loratorio, keep_top_k

if TYPE_CHECKING:
    from torch import Tensor


class Frequency(Loratorio):
    """Each LoRA weighted, per step and wavelet sub-band, by how much of its divergence from the base lies in that band.

    Taken from the paper: wavelet sub-bands of the predictions, weights per step and sub-band, the top-k LoRAs of each band.
    Left open, as no code was released: the measure of relevance (here the energy of eᵢ − e₀ in the band), the wavelet and its
    depth (here Haar, two levels), and the unconditional score (here the same weights, re-centred as in LoRAtorio).
    """

    levels = 2
    takes_places = False

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.knobs = ("recentre", "top_k")

    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        """(N, Bc, bands)."""
        noise = torch.stack([predictions.noise(mix) for mix in now.participants.mixes]).to(torch.float32)
        if len(noise) == 1:
            return noise.new_ones((1, noise.shape[1], 3 * self.levels + 1))
        base = predictions.noise(now.participants.base).to(torch.float32)
        # Energy as a share of each row's own, so that the unit of the predictions does not matter.
        energy = torch.stack([band_energies(each - base, self.levels) for each in noise])
        total = energy.sum(dim=0, keepdim=True)
        even = torch.full_like(energy, 1 / len(noise))
        return keep_top_k(torch.where(total > 0, energy / total, even), now.knobs["top_k"])

    def shown(self, weights: Tensor) -> Tensor | None:
        return None

    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        bands: list[Tensor] | None = None
        for prediction, shares in zip(predictions, weights, strict=True):
            own = [
                band * share[:, None, None, None]
                for band, share in zip(
                    split_bands(prediction.to(torch.float32), self.levels), shares.unbind(dim=-1), strict=True
                )
            ]
            bands = own if bands is None else [a + b for a, b in zip(bands, own, strict=True)]
        assert bands is not None
        return join_bands(bands, predictions.shape[-2], predictions.shape[-1])


def split_bands(picture: Tensor, levels: int) -> list[Tensor]:
    """Haar sub-bands of (B, C, H, W), finest first: three a level, then the coarse rest. Any H and W (edges repeated)."""
    bands: list[Tensor] = []
    for _ in range(levels):
        height, width = picture.shape[-2:]
        picture = torch.nn.functional.pad(picture, (0, width % 2, 0, height % 2), mode="replicate")
        a, b = picture[..., 0::2, 0::2], picture[..., 0::2, 1::2]
        c, d = picture[..., 1::2, 0::2], picture[..., 1::2, 1::2]
        bands += [(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]
        picture = (a + b + c + d) / 2
    return [*bands, picture]


def join_bands(bands: list[Tensor], height: int, width: int) -> Tensor:
    """The picture, (B, C, height, width), of which `split_bands` makes these bands."""
    sizes = [(height, width)]
    for _ in range((len(bands) - 1) // 3 - 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    picture = bands[-1]
    for level in reversed(range(len(sizes))):
        across, down, diagonal = bands[3 * level : 3 * level + 3]
        whole = picture.new_empty((*picture.shape[:-2], 2 * picture.shape[-2], 2 * picture.shape[-1]))
        whole[..., 0::2, 0::2] = (picture + across + down + diagonal) / 2
        whole[..., 0::2, 1::2] = (picture - across + down - diagonal) / 2
        whole[..., 1::2, 0::2] = (picture + across - down - diagonal) / 2
        whole[..., 1::2, 1::2] = (picture - across - down + diagonal) / 2
        picture = whole[..., : sizes[level][0], : sizes[level][1]]
    return picture


def band_energies(picture: Tensor, levels: int) -> Tensor:
    """Mean square of each sub-band of (B, C, H, W): (B, bands), in the order of `split_bands`."""

    def energies() -> Iterator[Tensor]:
        for band in split_bands(picture, levels):
            yield band.square().mean(dim=(1, 2, 3))

    return torch.stack(list(energies()), dim=-1)


FREQUENCY = Frequency(
    Entry(
        "frequency",
        "Frequency bands",
        "after MultLFG, arXiv 2505.20525",
        "Gives each LoRA the frequency bands in which it differs most from the base model.",
    )
)
