"""The rows of one evaluation of the model: those of the host, and the same rows under other mixes of LoRAs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compose.methods import Composition
from ...compose.mixes import Branch, Mix, Words
from ...errors import LoratorioError
from ...sampling.calls import Row
from ...sampling.step import Step
from ..shared.text import TextConditioning
from .variants import Sampling

MARK = "loratorio_block"
"""The name of a condition that stays with a block of rows through the host's batching and identifies the block.
Conditional blocks are numbered 0, 1, … (several where the prompt has AND), unconditional ones −1, −2, …"""

COND, UNCOND = 0, 1


@dataclass(frozen=True)
class Piece:
    """Rows that go through the model together: a block of every image's row, or one image's row of it.

    Has the fields of the host's own `cond_obj`, which its `can_concat_cond` compares.
    """

    numbers: tuple[int, ...]
    kind: int
    input_x: Tensor
    sigma: Tensor
    conditioning: dict[str, Any]
    control: Any
    patches: Any


class Call(NamedTuple):
    """One model call: which of the wanted rows, and the host's arguments for them."""

    numbers: tuple[int, ...]
    x: Tensor
    sigma: Tensor
    c: dict[str, Any]
    cond_or_uncond: list[int]


class ForgeRows:
    """One evaluation of the model as the host would run it.

    Args:
        denoiser_step: the host's own count, by which it reads prompt schedules.
        cond, uncond: the host's compiled conditions, with all LoRAs' text; one entry per AND part.
        x: the noisy latents, (B, C, H, W) or (B, C, T, H, W). sigma: (B,).
    """

    def __init__(
        self,
        functions: Sampling,
        texts: TextConditioning,
        denoiser_step: int,
        cond: list[Any],
        uncond: list[Any] | None,
        x: Tensor,
        sigma: Tensor,
    ) -> None:
        self._functions = functions
        self._texts = texts
        self._denoiser_step = denoiser_step
        self._marked = {True: list(cond), False: list(uncond or ())}
        self._host = {
            kind: [self._with(entry, {}) for entry in entries] for kind, entries in self._marked.items()
        }
        self._kinds: Mapping[bool, int] = {True: COND, False: UNCOND}
        self.x = x
        self.sigma = sigma
        self._active = {kind: self._now(entries) for kind, entries in self._host.items()}
        self._blocks: dict[tuple[Branch, Words], list[Any]] = {}

    @property
    def count(self) -> int:
        """Number of rows that the host itself would run."""
        return len(self.x) * sum(map(len, self._active.values()))

    def _now(self, entries: list[Any]) -> list[int]:
        """Numbers of the conditions that hold at this σ."""
        return [number for number, entry in enumerate(entries) if self._block(entry) is not None]

    def _block(self, entry: Any) -> Any:
        """The host's rows for a condition, or None where it does not hold at this σ."""
        block = self._functions.get_area_and_mult(entry, self.x, self.sigma)
        if block is not None and block.input_x.shape != self.x.shape:
            raise LoratorioError(
                "Another extension gives a prompt its own area of the picture, which LoRAtorio cannot compose. "
                "Untick LoRAtorio, or switch off the other extension."
            )
        return block

    def step(self, place: tuple[int, int], guidance: float) -> Step:
        """place: number of the step, and how many there are."""
        images, parts = len(self.x), len(self._active[True])
        return Step(
            index=place[0],
            total=place[1],
            latents=torch.cat([self.x] * parts),
            uncond_count=images * len(self._active[False]),
            owners=tuple(range(images)) * parts,
            guidance=guidance,
        )

    # -- the host's side ------------------------------------------------------------------------------------------

    def mark(self) -> set[int]:
        """Give each of the host's conditions its number, until `unmark`. Returns the numbers of those that hold now.

        The marks are in the host's own objects, because guidance extensions get those and may run the model on them once more.
        """
        for kind, entries in self._marked.items():
            for number, entry in enumerate(entries):
                # Filled on the device: a copy from here would be waited for.
                mark = torch.full((1,), _mark(kind, number), device=self.x.device)
                entry["model_conds"][MARK] = self._functions.Condition(mark)
        return {_mark(kind, number) for kind, numbers in self._active.items() for number in numbers}

    def unmark(self) -> None:
        for entries in self._marked.values():
            for entry in entries:
                entry["model_conds"].pop(MARK, None)

    def blocks_in(self, marks: Tensor | None, x: Tensor) -> list[int] | None:
        """The numbers of the conditions whose blocks `x` (rows, C, H, W) has; None where its rows are not of this evaluation."""
        images = len(self.x)
        if marks is None or len(x) != len(marks) or len(x) % images or x.shape[1:] != self.x.shape[1:]:
            return None
        return [int(mark) for mark in marks[::images].tolist()]

    def on(self, x: Tensor, sigma: Tensor, kinds: Mapping[bool, int]) -> ForgeRows:
        """The same rows on other latents; `kinds`: what they are to the host, by whether they are conditional."""
        other = copy.copy(self)
        other.x, other.sigma, other._blocks = x[: len(self.x)], sigma[: len(self.x)], {}
        other._kinds = {**self._kinds, **kinds}
        return other

    @staticmethod
    def _with(entry: Any, conditions: dict[str, Any]) -> Any:
        return {**entry, "model_conds": {**entry["model_conds"], **conditions}}

    def pick(self, composition: Composition, marks: Sequence[int]) -> Tensor:
        """The composed rows of the blocks with these marks."""
        return torch.cat([self._picked(composition, mark) for mark in marks])

    def _picked(self, composition: Composition, mark: int) -> Tensor:
        source = composition.cond if mark >= 0 else composition.uncond
        assert source is not None
        place = self._active[mark >= 0].index(mark if mark >= 0 else -1 - mark)
        return source[place * len(self.x) : (place + 1) * len(self.x)]

    # -- the model's side -----------------------------------------------------------------------------------------

    def calls(self, wanted: Sequence[Row], options: dict[str, Any]) -> list[Call]:
        """Model calls for these rows: as few as the host's rules for batching conditions allow."""
        batches: list[list[Piece]] = []
        for piece in self._pieces(wanted):
            for batch in batches:
                if self._functions.can_concat_cond(piece, batch[0]):
                    batch.append(piece)
                    break
            else:
                batches.append([piece])
        return [self._call(batch, options) for batch in batches]

    def _pieces(self, wanted: Sequence[Row]) -> Iterator[Piece]:
        images, number = len(self.x), 0
        while number < len(wanted):
            row = wanted[number]
            block = wanted[number : number + images]
            whole = [row._replace(slot=row.slot + i) for i in range(images)]
            if row.slot % images == 0 and list(block) == whole:
                yield self._piece(row, number, slice(0, images))
                number += images
            else:
                image = row.slot % images
                yield self._piece(row, number, slice(image, image + 1))
                number += 1

    def _piece(self, row: Row, number: int, images: slice) -> Piece:
        block = self._blocks_of(row)[row.slot // len(self.x)]
        count = images.stop - images.start
        conditioning = block.conditioning
        if count < len(self.x):
            conditioning = {name: _sliced(condition, images) for name, condition in conditioning.items()}
        return Piece(
            numbers=tuple(range(number, number + count)),
            kind=self._kinds[row.cond],
            input_x=block.input_x[images],
            sigma=self.sigma[images],
            conditioning=conditioning,
            control=block.control,
            patches=block.patches,
        )

    def _blocks_of(self, row: Row) -> list[Any]:
        """The host's rows for every condition that holds now, with the text of the row's mix and words."""
        key = (Branch(row.mix, row.cond), row.words)
        if key not in self._blocks:
            entries = self._entries(row.mix, row.cond, row.words)
            self._blocks[key] = [self._block(entries[number]) for number in self._active[row.cond]]
        return self._blocks[key]

    def _entries(self, mix: Mix, cond: bool, words: Words) -> list[Any]:
        """The host's conditions with the text of `mix`, read with these words, instead of their own text; everything else is kept."""
        host, prompts = self._host[cond], self._texts.of(mix, words)
        if prompts is None:
            return host
        from modules import prompt_parser

        if cond:
            weights, text = prompt_parser.reconstruct_multicond_batch(prompts.cond, self._denoiser_step)
            own = self._functions.compile_weighted_conditions(text, weights)
        else:
            text = prompt_parser.reconstruct_cond_batch(prompts.uncond, self._denoiser_step)
            own = self._functions.compile_conditions(text)
        if len(own) != len(host):
            raise LoratorioError(
                "Another extension changes the parts of the prompt while sampling, which LoRAtorio cannot follow. "
                "Untick LoRAtorio, or switch off the other extension."
            )
        return [self._with(entry, other["model_conds"]) for entry, other in zip(host, own, strict=True)]

    def _call(self, pieces: list[Piece], options: dict[str, Any]) -> Call:
        kinds = [piece.kind for piece in pieces]
        x = torch.cat([piece.input_x for piece in pieces])
        sigma = torch.cat([piece.sigma for piece in pieces])
        c = self._functions.cond_cat([piece.conditioning for piece in pieces])
        c["transformer_options"] = self._options(options, kinds, pieces[0].sigma)
        control = pieces[0].control
        if control is not None:
            self._functions.add_control(control, c, x, sigma, len(pieces))
        numbers = tuple(number for piece in pieces for number in piece.numbers)
        return Call(numbers, x, sigma, c, kinds)

    @staticmethod
    def _options(options: dict[str, Any], kinds: list[int], sigma: Tensor) -> dict[str, Any]:
        """The host's transformer options for a batch with these blocks, each of as many rows as `sigma` has."""
        by_row = [kind for kind in kinds for _ in range(len(sigma))]
        own = {
            "cond_or_uncond": list(kinds),
            "sigmas": sigma,
            "cond_mark": torch.cat([torch.full_like(sigma, kind) for kind in kinds]),
            "cond_indices": [row for row, kind in enumerate(by_row) if kind == COND],
            "uncond_indices": [row for row, kind in enumerate(by_row) if kind == UNCOND],
        }
        return {**options, **{name: value for name, value in own.items() if name in options}}


def _mark(cond: bool, number: int) -> int:
    return number if cond else -1 - number


def _sliced(condition: Any, images: slice) -> Any:
    """One image's part of a host's condition; a constant is for every image."""
    value = condition.cond
    return condition._copy_with(value[images]) if isinstance(value, Tensor) else condition
