"""LoRAtorio (arXiv 2508.11624), and two other ways to turn divergence into weights.

From top to bottom as in the paper: how far each LoRA's prediction diverges from the base's, patch by patch; each LoRA's share of a
patch; the k largest; the composed conditional prediction; the re-centred unconditional one.

Letters in shapes: N LoRAs, B images, Bc conditional and Bu unconditional rows, C channels, H×W latent pixels, h×w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..guidance import compose, recentred
from ..lazy_torch import torch
from ..mixes import Branch, Participants
from ..patches import BLENDS, at_pixels, patch_divergence, patch_similarity
from ..regions import Masks
from .base import Composition, Entry, Method, Predictions, StepContext, Weights
from .reuse import KNOBS as REUSE_KNOBS
from .reuse import Reuse

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_SPREAD = 0.03
"""The spread of S at which an adaptive temperature equals the fixed one: what is typical of the middle of sampling."""


# -- how LoRAs are compared in a patch, and what share each of them gets ---------------------------------------------------


class Weighting(NamedTuple):
    """How much each LoRA counts in a patch: what tells the published method from its two variants.

    Attributes:
        measure: (base (B, C, H, W), adapters (N, B, C, H, W), P, stride) to (N, B, h, w): similarity S with the base, or divergence
            D = 1 − S.
        shares: (measured, allowed) to Ω, summing to 1 over N wherever a LoRA is allowed, and to what the k largest are ranked by.
            allowed: where each LoRA may act, from 0 to 1, of the same shape; None: everywhere.
    """

    measure: Callable[[Tensor, Tensor, int, int | None], Tensor]
    shares: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def by_similarity(temperature: float, adaptive: bool = False) -> Weighting:
    """The published weighting: Ω the SoftMin of S at temperature τ.

    Args:
        adaptive: τ is multiplied by the spread of S in this image at this step, over `REFERENCE_SPREAD`.

    Raises:
        ValueError: τ is not a finite number above 0.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature must be a finite number above 0, not {temperature}")

    def measure(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None) -> Tensor:
        similarity = patch_similarity(base, adapters, patch_size, stride)
        return at_reference_spread(similarity) if adaptive else similarity

    def shares(similarity: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = softmin(similarity, temperature, allowed)
        return weights, -similarity if allowed is None else weights

    return Weighting(measure, shares)


def _in_proportion_to_divergence(divergence: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = divergence if allowed is None else divergence * allowed
    return in_proportion(parts, allowed), parts


def _in_proportion_to_relative_divergence(
    divergence: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    parts = relative_divergence(divergence, allowed)
    return in_proportion(parts, allowed), parts


BY_DIVERGENCE = Weighting(patch_divergence, _in_proportion_to_divergence)
"""Ω ∝ D = 1 − S."""

BY_RELATIVE_DIVERGENCE = Weighting(patch_divergence, _in_proportion_to_relative_divergence)
"""Ω ∝ √D·(D / D̄)^1.5."""


def softmin(similarity: Tensor, temperature: float, allowed: Tensor | None = None) -> Tensor:
    """Ω[i] = exp(−S[i]/τ) / Σⱼ exp(−S[j]/τ) over the first dimension, times `allowed` and renormalised; 0 where none is allowed."""
    temperature = max(temperature, 1e-30)
    if allowed is None:
        # Differences to the smallest S, so that a tiny τ cannot overflow float32.
        distance = similarity - similarity.amin(dim=0, keepdim=True)
        return torch.softmax(distance.div_(-temperature), dim=0)
    # In the exponent, so that it holds where nearly all of Ω lies with LoRAs that may not act.
    return torch.softmax(allowed.log() - similarity / temperature, dim=0).nan_to_num(0.0)


def at_reference_spread(similarity: Tensor) -> Tensor:
    """S stretched, per image, to the spread `REFERENCE_SPREAD`; (N, B, h, w) to the same.

    S lies close to 1 early in sampling and spreads later, so that a fixed temperature is undecided early. The spread is the
    root mean square, over patches, of the LoRAs' differences from their mean. It is stretched a hundredfold at most, so that
    differences that are only rounding stay small.
    """
    deviation = similarity - similarity.mean(dim=0, keepdim=True)
    spread = deviation.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()
    return similarity * (REFERENCE_SPREAD / spread.clamp_min(0.01 * REFERENCE_SPREAD))


def in_proportion(parts: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Parts (N, …) over their sum. Where all are 0, equal parts of what is `allowed`: there the predictions are alike."""
    total = parts.sum(dim=0, keepdim=True)
    even: Tensor | float = 1 / len(parts)
    if allowed is not None:
        even = (allowed / allowed.sum(dim=0, keepdim=True)).nan_to_num(0.0)
    # Far above the smallest numbers, whose quotients are not to be trusted.
    return torch.where(total > 1e-30, parts / total.clamp_min(1e-30), even)


def relative_divergence(distance: Tensor, allowed: Tensor | None = None) -> Tensor:
    """√D·(D / D̄)^1.5 with D̄ the mean of D over the picture: a LoRA's divergence compared with its divergence elsewhere.

    A background diverges in all patches, a thing in its own alone: there it comes first, though the background diverges as far. How
    the exponents were found: docs/lab/METHODS.md. A LoRA that predicts what the base does has exactly 0.

    Args:
        distance: D = 1 − S, (N, B, h, w), from 0 to 2.
        allowed: where each LoRA may act, the same shape, from 0 to 1. The mean is weighted by it, and so is what is returned.

    Returns:
        (N, B, h, w) float32, from 0.
    """
    if allowed is None:
        mean = distance.mean(dim=(-2, -1), keepdim=True)
    else:
        area = allowed.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        mean = (distance * allowed).sum(dim=(-2, -1), keepdim=True) / area
    # D² / D̄^1.5: where the mean is 0, so is D.
    parts = distance.square() / mean.clamp_min(1e-20) ** 1.5
    return parts if allowed is None else parts * allowed


def keep_top_k(weights: Tensor, top_k: int, ranking: Tensor | None = None) -> Tensor:
    """Keep each patch's k largest weights (N, …), renormalised to sum to 1; k = 0 or k ≥ N keeps all.

    LoRAs that tie with the k-th largest are all kept: which of them came first in the prompt must not matter.
    Raises ValueError for k < 0.

    Args:
        ranking: what they are ranked by, (N, …), where it can tell weights apart that rounding has made alike.
    """
    if top_k < 0:
        raise ValueError(f"top-k must be 0 (all) or more, not {top_k}")
    if top_k == 0 or top_k >= weights.shape[0]:
        return weights
    # Weights are quotients of a sum, whose rounding depends on the LoRAs' order: so near ties would too.
    ranking = weights if ranking is None else ranking
    kept = weights * (ranking >= ranking.topk(top_k, dim=0).values[-1:])
    return kept.div_(kept.sum(dim=0, keepdim=True))


def spread_styles(weights: Tensor, styles: Sequence[bool]) -> Tensor:
    """Give every style its mean weight over the picture, everywhere; the other LoRAs share what is left as before.

    weights: Ω↑, (N, B, H, W), summing to 1 over N; styles: which of the N are styles. Sums to 1 again.
    """
    means = weights.mean(dim=(2, 3), keepdim=True)
    if all(styles):
        return means.expand_as(weights).contiguous()
    # LoRA by LoRA, with no tensor of ours that would have to be copied to the device.
    contents = [torch.zeros_like(own) if style else own for own, style in zip(weights, styles, strict=True)]
    total = torch.stack(contents).sum(dim=0)
    left = 1 - torch.stack([mean for mean, style in zip(means, styles, strict=True) if style]).sum(dim=0)
    even = 1 / (len(styles) - sum(styles))
    # A pixel that belonged to styles alone has no shares among the others to keep.
    shares = [
        torch.where(total > 0, own / total.clamp_min(torch.finfo(weights.dtype).tiny), even)
        for own in contents
    ]
    return torch.stack(
        [
            mean.expand_as(share) if style else share * left
            for share, mean, style in zip(shares, means, styles, strict=True)
        ]
    )


def spatial_weights(
    base: Tensor,
    adapters: Tensor,
    weighting: Weighting,
    patch_size: int,
    top_k: int = 0,
    blend: str = "hard",
    masks: Masks | None = None,
) -> Tensor:
    """Ω↑, the weight of every LoRA at every latent pixel.

    Args:
        base: noise predicted by the base model, (B, C, H, W), any floating dtype.
        adapters: noise predicted with each LoRA alone, (N, B, C, H, W).
        patch_size: side P of a patch in latent pixels. A border patch is made of the pixels that are there.
        top_k: how many LoRAs a patch may use; 0, or N and more, means all.
        blend: one of `BLENDS`. The paper's is "hard"; with P = 1 all are alike.
        masks: where each LoRA may act, by row. Top-k then counts, pixel by pixel, among those that may act there.

    Returns:
        (N, B, H, W) float32, summing to 1 over N, or to the masks' coverage.

    Raises:
        ValueError: shapes that do not fit, P < 1, k < 0, an unknown blend.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, not {blend!r}")
    height, width = base.shape[-2:]
    stride = 1 if blend == "overlapping" and patch_size > 1 else None
    measured = weighting.measure(base, adapters, patch_size, stride)
    if masks is None:
        shares, ranking = weighting.shares(measured, None)
        weights = keep_top_k(shares, top_k, ranking)
        return at_pixels(weights, patch_size, height, width, blend)
    # S or D is brought to the pixels, not Ω: what a LoRA predicts where it may not act must not count at all.
    measured = at_pixels(measured, patch_size, height, width, blend)
    allowed = masks.own.expand_as(measured)
    shares, ranking = weighting.shares(measured, allowed)
    return keep_top_k(shares, top_k, ranking).nan_to_num(0.0) * masks.coverage


# -- the method -----------------------------------------------------------------------------------------------------------


class Loratorio(Method):
    """LoRAtorio: patch by patch, the LoRAs that diverge from the base; the unconditional prediction re-centred on the base's.

    From the paper: patches, cosine similarity, SoftMin, re-centring with λ = 0.5, top-k for pools. Left open there and measured
    here: patch size and temperature. Not in it: the other two weightings, shared parts, styles, places, softer patches.

    Methods that weight the LoRAs' predictions in another way derive from it: they say `weights`, and `combine` where the weights are
    not those of pixels.
    """

    takes_places = True
    compares: ClassVar[bool] = True
    """Whether the weights need the reference's conditional rows, as soon as there are two LoRAs."""

    def __init__(
        self,
        entry: Entry,
        weighting: Callable[[Mapping[str, Any]], Weighting],
        knobs: Sequence[str] = (),
    ) -> None:
        self.entry = entry
        self.knobs = (
            "patch_size",
            *knobs,
            "top_k",
            "blend",
            "recentre",
            "share",
            "yielding",
            "find_after",
            "find_styles",
            *REUSE_KNOBS,
        )
        self._weighting = weighting

    def begin(self, participants: Participants, weights: Weights) -> Method:
        return Reuse(self) if set(REUSE_KNOBS) <= set(self.knobs) else self

    def branches(self, now: StepContext) -> list[Branch]:
        """Rows of the base and of the LoRAs, without those whose weight or factor is known to be 0 or 1 beforehand."""
        participants, strength = now.participants, now.recentring
        mixes, reference = participants.mixes, participants.reference
        # With one LoRA its weight is 1 whatever the reference predicts.
        compared = now.has_gap or (self.compares and len(mixes) > 1)
        branches = [Branch(reference, True)] if compared else []
        branches += [Branch(mix, True) for mix in mixes]
        if now.has_uncond:
            branches += [Branch(participants.base, False)] if strength > 0 else []
            branches += [Branch(mix, False) for mix in mixes] if strength < 1 else []
            branches += [Branch(reference, False)] if strength < 1 and now.has_gap else []
        for added in participants.additions:
            branches += [Branch(reference, True), Branch(added.mix, True)]
            if now.has_uncond:
                branches += [Branch(reference, False), Branch(added.mix, False)]
        # LoRAs that share all of themselves are all one mix.
        return list(dict.fromkeys(branches))

    def compose(self, now: StepContext, predictions: Predictions) -> Composition:
        """ẽ(c) = Σᵢ Ω↑[i]·eᵢ(c); ẽ(∅) = λ·e₀(∅) + (1−λ)·Σᵢ Ω↑[i]·eᵢ(∅), with the same Ω↑."""
        strength = now.recentring
        weights = self.weights(now, predictions)
        cond = self._added(self._composed(weights, now, predictions, True), now, predictions, True)
        if not now.has_uncond:
            return Composition(cond, None, self.shown(weights))
        uncond = None
        if strength < 1:
            images = len(predictions.uncond(now.participants.mixes[0]))
            per_image = predictions.per_image(weights, images)
            uncond = self._composed(per_image, now, predictions, False)
        if strength > 0:
            uncond = recentred(predictions.uncond(now.participants.base), uncond, strength)
        assert uncond is not None
        return Composition(cond, self._added(uncond, now, predictions, False), self.shown(weights))

    def weights(self, now: StepContext, predictions: Predictions) -> Tensor:
        """Ω↑ of the conditional rows, (N, Bc, H, W) float32, summing to 1 over N, or to the coverage of the LoRAs' places."""
        loras, knobs = now.participants.loras, now.knobs
        masks = None if now.masks is None else now.masks.of(predictions.owners)
        noise = torch.stack([predictions.noise(lora.mix) for lora in loras])
        if len(loras) == 1:
            ones = noise.new_ones((1, noise.shape[1], *noise.shape[3:]), dtype=torch.float32)
            return ones if masks is None else ones * masks.coverage
        base = predictions.noise(now.participants.reference)
        weighting = self._weighting(knobs)
        weights = spatial_weights(
            base, noise, weighting, knobs["patch_size"], knobs["top_k"], knobs["blend"], masks
        )
        styles = [lora.style for lora in loras]  # of a pool: the others have no weight
        return spread_styles(weights, styles) if any(styles) else weights

    def combine(self, predictions: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of (N, B, C, H, W) by the weights of the same rows, (B, C, H, W) float32."""
        return compose(predictions, weights)

    def shown(self, weights: Tensor) -> Tensor | None:
        """Ω↑ for the weight maps, (N, Bc, H, W), where the weights are those of pixels."""
        return weights

    def _composed(self, weights: Tensor, now: StepContext, predictions: Predictions, cond: bool) -> Tensor:
        """Σᵢ Ω↑[i]·eᵢ, and the reference's prediction where no LoRA's place reaches, (B, C, H, W) float32."""
        participants = now.participants
        each = torch.stack([predictions.by_branch[Branch(mix, cond)] for mix in participants.mixes])
        composed = self.combine(each, weights)
        masks = now.masks
        if masks is not None and masks.has_gap:
            reference = predictions.by_branch[Branch(participants.reference, cond)]
            pictures = predictions.owners if cond else range(len(reference))
            gap = 1 - masks.of(pictures).coverage.unsqueeze(1)
            composed = composed + reference.to(torch.float32) * gap
        return composed

    def _added(self, composed: Tensor, now: StepContext, predictions: Predictions, cond: bool) -> Tensor:
        """ẽ + Σ over the additions of mask·(e(reference and LoRA) − e(reference)), (B, C, H, W) float32."""
        reference = Branch(now.participants.reference, cond)
        for added in now.participants.additions:
            own = predictions.by_branch[Branch(added.mix, cond)].to(torch.float32)
            difference = own - predictions.by_branch[reference].to(torch.float32)
            composed = composed + now.mask(added.place) * difference
        return composed


PUBLISHED = Loratorio(
    Entry(
        "loratorio",
        "LoRAtorio",
        "arXiv 2508.11624",
        "Weights each LoRA, patch by patch, by how far its prediction diverges from that of the base model.",
    ),
    lambda knobs: by_similarity(knobs["temperature"], knobs["adaptive"]),
    ("temperature", "adaptive"),
)

DIVERGENCE = Loratorio(
    Entry(
        "divergence",
        "LoRAtorio by divergence",
        "after arXiv 2508.11624",
        "Like LoRAtorio, but without a temperature: a LoRA that changes nothing in a patch gets no weight there.",
    ),
    lambda knobs: BY_DIVERGENCE,
)
"""In the first steps every S is near 1, and SoftMin gives a LoRA that predicts the same as the base (S = 1) nearly as much as one that
diverges: 0.475 next to one with S = 0.99 at τ = 0.1. Here it gets exactly 0."""

RELATIVE = Loratorio(
    Entry(
        "relative",
        "LoRAtorio, relative",
        "after arXiv 2508.11624",
        "Gives each LoRA the places where it changes more than it does elsewhere.",
    ),
    lambda knobs: BY_RELATIVE_DIVERGENCE,
)
