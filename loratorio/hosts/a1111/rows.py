"""The rows of one denoising step, and the inputs of the WebUI's model for any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...compose.mixes import Mix, Words
from ...sampling.calls import Row
from ...sampling.step import Step
from ..shared.text import Prompts, TextConditioning

Text = Any
"""Text conditioning of rows: a tensor (rows, tokens, width), or a dict of tensors for SDXL."""


@dataclass
class A1111Rows:
    """The rows that the WebUI's denoiser was about to run, and the same rows for any mix.

    Attributes:
        params: the callback's CFGDenoiserParams, after every extension has seen it.
        denoiser: the WebUI's CFGDenoiser.
        owners: image of each conditional row.
        images: number of images, which is the number of unconditional rows.
        skips_uncond: whether the WebUI leaves the unconditional rows out of this step.
        guidance: the CFG scale of this step.
        place: number of the step, and how many there are.
        own: the conditioning that the WebUI made itself. own_text: the step's of it, conditional and unconditional.
    """

    params: Any
    denoiser: Any
    texts: TextConditioning
    owners: tuple[int, ...]
    images: int
    skips_uncond: bool
    guidance: float
    place: tuple[int, int]
    own: Prompts
    own_text: tuple[Text, Text]
    _padded: dict[tuple[Mix, Words], tuple[Text, Text]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        params: Any,
        denoiser: Any,
        sampler_args: dict[str, Any],
        texts: TextConditioning,
        place: tuple[int, int],
    ) -> A1111Rows:
        from modules import prompt_parser

        own = Prompts(lambda cond: sampler_args["cond" if cond else "uncond"])
        parts, cond = prompt_parser.reconstruct_multicond_batch(own.cond, denoiser.step)
        uncond = prompt_parser.reconstruct_cond_batch(own.uncond, denoiser.step)
        owners = tuple(image for image, rows in enumerate(parts) for _ in rows)
        skips = _skips_uncond(denoiser, params.sigma, sampler_args["s_min_uncond"])
        guidance = sampler_args["cond_scale"] * denoiser.cond_scale_miltiplier
        return cls(params, denoiser, texts, owners, len(parts), skips, guidance, place, own, (cond, uncond))

    def trouble(self) -> str | None:
        """The reason why these rows cannot be composed, or None."""
        if len(self.params.x) != len(self.owners) + self.images:
            return "The LoRAs were merged as usual: another extension adds rows to the sampler's steps, which LoRAtorio cannot compose."
        if not self.texts.is_the_hosts and not self._text_is_the_webuis():
            return (
                "The LoRAs were merged as usual: another extension changes the text conditioning while sampling, which LoRAtorio "
                "cannot do for each LoRA."
            )
        return None

    def _text_is_the_webuis(self) -> bool:
        """Whether no other extension has put other text in. SDXL's dicts the WebUI has padded in place by now."""
        asked = self.params.text_cond, self.params.text_uncond
        return any(all(map(_equal, asked, own)) for own in (self.own_text, self._pad(*self.own_text)))

    def step(self) -> Step:
        from modules.sd_samplers_timesteps import CFGDenoiserTimesteps

        index, total = self.place
        of_noise = isinstance(self.denoiser, CFGDenoiserTimesteps)
        return Step(
            index=index,
            total=total,
            latents=self.params.x[: len(self.owners)],
            uncond_count=0 if self.skips_uncond else self.images,
            owners=self.owners,
            denoised=not of_noise,
            sigma=_sigma_at(self.denoiser, self.params.sigma[:1]) if of_noise else None,
            guidance=self.guidance,
        )

    def tokens(self, row: Row) -> int:
        """Length of the row's text conditioning."""
        return int(self._text(row)[0 if row.cond else 1].shape[1])

    def inputs(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The model's x, sigma and conditioning for these rows, whose text is of one length."""
        from modules import shared
        from modules.sd_samplers_cfg_denoiser import catenate_conds, subscript_cond

        params = self.params
        numbers = [row.slot if row.cond else len(self.owners) + row.slot for row in rows]
        text = catenate_conds(
            [subscript_cond(self._text(row)[0 if row.cond else 1], row.slot, row.slot + 1) for row in rows]
        )
        image = _of(params.image_cond, numbers)
        if shared.sd_model.model.conditioning_key == "crossattn-adm":
            cond = {"c_crossattn": [text], "c_adm": image}
        elif isinstance(text, dict):
            cond = {**text, "c_concat": [image]}
        else:
            cond = {"c_crossattn": [text], "c_concat": [image]}
        return _of(params.x, numbers), _of(params.sigma, numbers), cond

    def _text(self, row: Row) -> tuple[Text, Text]:
        """The step's conditional and unconditional text under the row's mix and words, padded as the WebUI would."""
        key = (row.mix, row.words)
        if key not in self._padded:
            self._padded[key] = self._pad(*self._unpadded(*key))
        return self._padded[key]

    def _unpadded(self, mix: Mix, words: Words) -> tuple[Text, Text]:
        from modules import prompt_parser

        if self.texts.is_the_hosts and not words:
            return self.params.text_cond, self.params.text_uncond
        prompts, step = self.texts.of(mix, words) or self.own, self.denoiser.step
        cond = prompt_parser.reconstruct_multicond_batch(prompts.cond, step)[1]
        return cond, prompt_parser.reconstruct_cond_batch(prompts.uncond, step)

    def _pad(self, cond: Text, uncond: Text) -> tuple[Text, Text]:
        from modules.shared import opts

        if cond.shape[1] == uncond.shape[1]:
            return cond, uncond
        # Padding writes into SDXL's dicts.
        cond, uncond = _shallow(cond), _shallow(uncond)
        if getattr(opts, "pad_cond_uncond_v0", False):
            padded: tuple[Text, Text] = self.denoiser.pad_cond_uncond_v0(cond, uncond)
        elif opts.pad_cond_uncond:
            padded = self.denoiser.pad_cond_uncond(cond, uncond)
        else:
            padded = cond, uncond
        return padded


def _of(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some rows, by slices: copying a tensor of their numbers to the device would synchronise with it."""
    return torch.cat([rows[number : number + 1] for number in numbers])


def _skips_uncond(denoiser: Any, sigma: Tensor, s_min_uncond: float) -> bool:
    """Whether the WebUI is about to drop the unconditional rows: "skip early CFG" or negative guidance minimum sigma.

    The WebUI decides after its callback without an event, so its two rules are repeated here. If they ever differ, it
    asks for rows that were not composed, and the job stops (see `A1111Pass`).
    """
    from modules.shared import opts

    early = getattr(opts, "skip_early_cond", 0.0)
    if early != 0 and denoiser.step / denoiser.total_steps <= early:
        return True
    on_turn = denoiser.step % 2 or getattr(opts, "s_min_uncond_all", False)
    return bool(on_turn and s_min_uncond > 0 and sigma[0] < s_min_uncond)


def _equal(one: Text, other: Text) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
        return False
    # A LoRA that was left out may have made NaN of the WebUI's own text.
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())


def _shallow(text: Text) -> Text:
    from modules.prompt_parser import DictWithShape

    return DictWithShape(text) if isinstance(text, dict) else text


def _sigma_at(denoiser: Any, timestep: Tensor) -> Tensor:
    """The σ of z ∝ x₀ + σ·e at a timestep of those samplers that count in timesteps, (1,)."""
    kept: Tensor = denoiser.alphas[timestep.to(torch.long)]
    return ((1 - kept) / kept).sqrt()
