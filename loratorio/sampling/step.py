"""One step of a sampling: where a host's sampler stands, the rows that are run for it, and what the model predicted on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..compose.methods import Composition, Predictions
from ..compose.mixes import Branch
from .calls import Row


@dataclass(frozen=True)
class Step:
    """Where a host's sampler stands.

    Attributes:
        index, total: this step, from 0, and how many there are.
        latents: the noisy latent z of every conditional row, (Bc, C, H, W) or (Bc, C, T, H, W).
        uncond_count: number of unconditional rows Bu; 0 where the step has none.
        owners: image of every conditional row; a prompt with AND has several for an image. Empty: row i is image i.
        denoised: predictions are denoised latents D, and e = (z − D)/σ; else they are the noise e itself.
        sigma: where predictions are noise, the σ of z ∝ x₀ + σ·e, a number or a tensor of one; None where the host cannot tell.
        guidance: the CFG scale s that the sampler guides with, for guidance rescale; None where the host cannot tell.
        strengths: what multiplies each of the bank's LoRAs at this step, where that changes while sampling. Empty: 1 for all.
        absent: numbers of the LoRAs that change nothing at this step, not even text.
        painted: where an inpainting mask leaves the picture to the sampler, from 0 to 1, (H, W) or (B, H, W); None: everywhere.
    """

    index: int
    total: int
    latents: Tensor
    uncond_count: int
    owners: tuple[int, ...] = ()
    denoised: bool = True
    sigma: float | Tensor | None = None
    guidance: float | None = None
    strengths: tuple[float, ...] = ()
    absent: frozenset[int] = frozenset()
    painted: Tensor | None = None

    @property
    def frames(self) -> int:
        """How many frames a latent has: 1, except in video models."""
        return self.latents.shape[2] if self.latents.ndim == 5 else 1

    def rows(self, branches: Sequence[Branch]) -> Iterator[Row]:
        """Every row of every branch: those of one mix together, and those without any LoRA last, so that the bank can batch the others."""
        counts = (len(self.latents), self.uncond_count)
        mixes = sorted(dict.fromkeys(branch.mix for branch in branches), key=lambda mix: not any(mix))
        for mix in mixes:
            for cond, count in zip((True, False), counts, strict=True):
                if Branch(mix, cond) in branches:
                    yield from (Row(mix, cond, slot) for slot in range(count))

    def predictions(self, rows: Sequence[Row], predicted: Tensor) -> Predictions:
        """What the model predicted on these rows, sorted by branch, with frames folded into the batch: (B·T, C, H, W)."""
        by_branch: dict[Branch, Tensor] = {}
        start = 0
        for branch in dict.fromkeys(Branch(row.mix, row.cond) for row in rows):
            stop = start + (len(self.latents) if branch.cond else self.uncond_count)
            by_branch[branch] = _folded(predicted[start:stop])
            start = stop
        owners = self.owners or range(len(self.latents))
        return Predictions(
            by_branch,
            tuple(owner * self.frames + frame for owner in owners for frame in range(self.frames)),
            # Only direction matters for the similarity: z − D stands for (z − D)/σ.
            _folded(self.latents) if self.denoised else None,
            None if self.denoised else self.sigma,
        )

    def unfolded(self, composition: Composition) -> Composition:
        """The composition with its frames as the model's predictions have them."""
        if self.latents.ndim != 5:
            return composition

        def unfold(prediction: Tensor) -> Tensor:
            return prediction.reshape(-1, self.frames, *prediction.shape[1:]).movedim(1, 2)

        uncond = None if composition.uncond is None else unfold(composition.uncond)
        return Composition(unfold(composition.cond), uncond, composition.weights)


def _folded(latents: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B·T, C, H, W); four dimensions stay."""
    return latents.movedim(2, 1).flatten(0, 1) if latents.ndim == 5 else latents
