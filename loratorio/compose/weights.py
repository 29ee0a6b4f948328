"""How much each LoRA is trusted in each patch of the latent (LoRAtorio, arXiv 2508.11624, section on skill composition).

Letters in shapes: N LoRAs, B images, C channels, H×W latent pixels, h×w patches with h = ⌈H/P⌉ and w = ⌈W/P⌉.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .lazy_torch import torch
from .regions import Masks

if TYPE_CHECKING:
    from torch import Tensor

BLENDS = ("hard", "interpolated", "overlapping")
"""How weights go over from patch to patch: at once, by interpolation between patch centres, or as the mean of overlapping patches."""

REFERENCE_SPREAD = 0.03
"""The spread of S at which an adaptive temperature equals the fixed one: what is typical of the middle of sampling."""

NEAR = 0.01
"""Below this part of the base's square a patch's divergence is worked out from its difference: cosines near 1 have lost its figures."""


def spatial_weights(
    base: Tensor,
    adapters: Tensor,
    patch_size: int,
    temperature: float | None,
    top_k: int = 0,
    *,
    blend: str = "hard",
    adaptive: bool = False,
    relative: bool = False,
    masks: Masks | None = None,
) -> Tensor:
    """Ω↑, the weight of every LoRA at every latent pixel.

    Args:
        base: noise predicted by the base model, (B, C, H, W), any floating dtype.
        adapters: noise predicted with each LoRA alone, (N, B, C, H, W).
        patch_size: side P of a patch in latent pixels. A border patch is made of the pixels that are there.
        temperature: τ of the SoftMin; towards 0 the most divergent LoRA alone, towards ∞ the plain mean. None: in proportion to
            D = 1 − S.
        top_k: how many LoRAs a patch may use; 0, or N and more, means all.
        blend: one of `BLENDS`. The paper's is "hard"; with P = 1 all are alike.
        adaptive: τ is multiplied by the spread of S in this image at this step, over `REFERENCE_SPREAD`.
        relative: without τ, by `relative_divergence` instead.
        masks: where each LoRA may act. Top-k then counts, pixel by pixel, among those that may act there.

    Returns:
        (N, B, H, W) float32, summing to 1 over N; with masks, to their coverage (see `placed_weights`).

    Raises:
        ValueError: shapes that do not fit, P < 1, τ ≤ 0 or not finite, k < 0, an unknown blend.
    """
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, not {blend!r}")
    height, width = base.shape[-2:]
    stride = 1 if blend == "overlapping" and patch_size > 1 else None
    if temperature is None:
        measured = patch_divergence(base, adapters, patch_size, stride)
    else:
        measured = patch_similarity(base, adapters, patch_size, stride)
        if adaptive:
            measured = at_reference_spread(measured)
    if masks is None:
        if temperature is None:
            parts = relative_divergence(measured) if relative else measured
            weights = keep_top_k(in_proportion(parts), top_k, parts)
        else:
            weights = keep_top_k(softmin(measured, temperature), top_k, -measured)
        return _at_pixels(weights, patch_size, height, width, blend)
    # S or D is brought to the pixels, not Ω: what a LoRA predicts where it may not act must not count at all.
    at_pixels = _at_pixels(measured, patch_size, height, width, blend)
    if temperature is None:
        allowed = masks.own.unsqueeze(1).expand_as(at_pixels)
        parts = relative_divergence(at_pixels, allowed) if relative else at_pixels * allowed
        return _covered(in_proportion(parts, allowed), masks, top_k)
    return _covered(softmin_among_allowed(at_pixels, masks, temperature), masks, top_k)


def _at_pixels(weights: Tensor, patch_size: int, height: int, width: int, blend: str) -> Tensor:
    """Patches' weights (N, B, h, w) as pixels' (N, B, height, width), in the way that `blend` says."""
    if blend == "overlapping" and patch_size > 1:
        return _mean_of_covering(weights, patch_size, height, width)
    if blend == "interpolated" and patch_size > 1:
        return _interpolated(weights, patch_size, height, width)
    return upsample(weights, patch_size, height, width)


def placed_weights(weights: Tensor, masks: Masks) -> Tensor:
    """Ω times each LoRA's mask, normalised over the LoRAs that may act in a pixel, times the coverage.

    Args:
        weights: Ω↑, (N, B, H, W), above 0.
        masks: where each LoRA may act, on the weights' device.

    Returns:
        (N, B, H, W) float32, exactly 0 where a LoRA may not act, summing to the coverage over N.
    """
    masked = weights * masks.own.unsqueeze(1)
    # Pixels where no LoRA may act give 0/0.
    return _covered((masked / masked.sum(dim=0, keepdim=True)).nan_to_num(0.0), masks, top_k=0)


def softmin_among_allowed(similarity: Tensor, masks: Masks, temperature: float) -> Tensor:
    """Ω·mask over its sum, for Ω the SoftMin of S, (N, B, H, W) float32.

    Worked out in the exponent, so that it holds where all of Ω lies, as far as float32 can tell, with LoRAs that may not act.
    0 where none may.
    """
    logits = masks.own.unsqueeze(1).log() - similarity / max(temperature, 1e-30)
    return torch.softmax(logits, dim=0).nan_to_num(0.0)


def _covered(shares: Tensor, masks: Masks, top_k: int) -> Tensor:
    """Shares of a pixel (N, B, H, W) cut to the k largest, times the coverage."""
    if 0 < top_k < len(shares):
        shares = keep_top_k(shares, top_k).nan_to_num(0.0)
    return shares * masks.coverage


def patch_similarity(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """Cosine similarity of each LoRA's patches, over all channels, with the base's: S, (N, B, h, w) float32.

    Patches lie side by side; with `stride` 1 there is one at every place where it fits whole, so h = H − P + 1.

    A patch that equals the base's has exactly S = 1, two empty patches count as equal, and an empty patch
    against one that is not empty has S = 0. Raises ValueError when shapes do not fit or P < 1.
    """
    _check(base, adapters, patch_size)
    scale = _scale(base)
    reference, _ = _patch_products(base, base, scale, patch_size, stride)
    similarity = base.new_empty((adapters.shape[0], *reference.shape), dtype=torch.float32)
    for own, adapter in zip(similarity, adapters, strict=True):
        square, dot = _patch_products(adapter, base, scale, patch_size, stride)
        both_empty = (square == 0) & (reference == 0)
        # √(a·a) is exactly a in binary floating point, so that equal patches give exactly 1.
        norm = square.mul_(reference).sqrt_()
        torch.div(dot, norm, out=own)
        own.clamp_(-1.0, 1.0).masked_fill_(norm == 0, 0.0).masked_fill_(both_empty, 1.0)
    return similarity


def patch_divergence(base: Tensor, adapters: Tensor, patch_size: int, stride: int | None = None) -> Tensor:
    """D = 1 − S of each LoRA's patches, (N, B, h, w) float32 from 0 to 2, with all its figures where S is nearly 1, as in the first steps.

    With d = a − b: 1 − a·b / |a||b| = (|d|² − (|a| − |b|)²) / 2|a||b|, and |a| − |b| = d·(a + b) / (|a| + |b|); so where |d|² is below
    `NEAR` of |b|².

    A patch that equals the base's has exactly 0. The rest as in `patch_similarity`.
    """
    _check(base, adapters, patch_size)
    scale = _scale(base)
    reference, _ = _patch_products(base, base, scale, patch_size, stride)
    divergence = base.new_empty((adapters.shape[0], *reference.shape), dtype=torch.float32)
    for own, adapter in zip(divergence, adapters, strict=True):
        square, dot = _patch_products(adapter, base, scale, patch_size, stride)
        moved = base.new_zeros((len(base), *base.shape[2:]), dtype=torch.float32)
        longer = torch.zeros_like(moved)
        for one, other in zip(adapter.unbind(1), base.unbind(1), strict=True):
            here, there = one.to(torch.float32), other.to(torch.float32)
            # Subtracted before anything is rounded: of numbers that are close, the difference is exact.
            difference = (here - there) * scale
            moved.addcmul_(difference, difference)
            longer.addcmul_(difference, (here + there) * scale)
        moved, longer = (_patch_sum(each, patch_size, stride) for each in (moved, longer))
        both_empty = (square == 0) & (reference == 0)
        norm = (square * reference).sqrt_()
        longer = longer / square.sqrt_().add_(reference.sqrt())
        own[:] = torch.where(
            moved < NEAR * reference, (moved - longer.square_()) / (2 * norm), 1 - dot / norm
        )
        own.clamp_(0.0, 2.0).masked_fill_(norm == 0, 1.0).masked_fill_(both_empty, 0.0)
    return divergence


def _check(base: Tensor, adapters: Tensor, patch_size: int) -> None:
    if base.ndim != 4 or adapters.ndim != 5 or adapters.shape[1:] != base.shape or adapters.shape[0] < 1:
        raise ValueError(
            f"base must be (B, C, H, W) and adapters (N, B, C, H, W) with N of at least 1, "
            f"not {tuple(base.shape)} and {tuple(adapters.shape)}"
        )
    if patch_size < 1:
        raise ValueError(f"the patch size must be at least 1, not {patch_size}")


def softmin(similarity: Tensor, temperature: float) -> Tensor:
    """Ω[i] = exp(−S[i]/τ) / Σⱼ exp(−S[j]/τ) over the first dimension. Raises ValueError unless τ is finite and > 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature must be a finite number above 0, not {temperature}")
    # Differences to the smallest S, so that a tiny τ cannot overflow float32.
    distance = similarity - similarity.amin(dim=0, keepdim=True)
    return torch.softmax(distance.div_(-max(temperature, 1e-30)), dim=0)


def relative_divergence(distance: Tensor, allowed: Tensor | None = None) -> Tensor:
    """√D·(D / D̄)^1.5, D̄ the mean of D over the picture: a LoRA's divergence where it counts beside what it has everywhere.

    A background diverges in all patches, a thing in its own alone: there it comes first, though the background diverges as far. How
    the exponents were found: docs/METHODS.md. A LoRA that predicts what the base does has exactly 0.

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


def in_proportion(parts: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Parts (N, …) over their sum. Where all are 0, equal parts of what is `allowed`: there the predictions are alike."""
    ones = torch.ones_like(parts) if allowed is None else allowed
    total = parts.sum(dim=0, keepdim=True)
    even = (ones / ones.sum(dim=0, keepdim=True)).nan_to_num(0.0)
    # Far above the smallest numbers, whose quotients are not to be trusted.
    return torch.where(total > 1e-30, parts / total.clamp_min(1e-30), even)


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


def at_reference_spread(similarity: Tensor) -> Tensor:
    """S stretched, per image, to the spread `REFERENCE_SPREAD`; (N, B, h, w) to the same.

    S lies close to 1 early in sampling and spreads later, so that a fixed temperature is undecided early. The spread is the
    root mean square, over patches, of the LoRAs' differences from their mean. It is stretched a hundredfold at most, so that
    differences that are only rounding stay small.
    """
    deviation = similarity - similarity.mean(dim=0, keepdim=True)
    spread = deviation.square().mean(dim=(0, 2, 3), keepdim=True).sqrt()
    return similarity * (REFERENCE_SPREAD / spread.clamp_min(0.01 * REFERENCE_SPREAD))


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


def upsample(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Give every latent pixel its patch's weight: (N, B, h, w) to (N, B, height, width)."""
    if patch_size == 1:
        return weights
    rows = torch.arange(height, device=weights.device) // patch_size
    columns = torch.arange(width, device=weights.device) // patch_size
    return weights[..., rows, :][..., columns]


def _scale(base: Tensor) -> Tensor:
    """(B, 1, 1) float32: what brings each image's largest magnitude to 1, so that squares neither overflow nor vanish."""
    dims = (-3, -2, -1)
    largest = torch.maximum(base.amax(dims), -base.amin(dims)).to(torch.float32)
    return torch.where(largest > 0, 1 / largest.clamp_min(1e-30), torch.ones_like(largest)).view(-1, 1, 1)


def _patch_products(
    prediction: Tensor, base: Tensor, scale: Tensor, patch_size: int, stride: int | None
) -> tuple[Tensor, Tensor]:
    """The patches' products p·p and p·b over all channels, (B, h, w) each, of predictions times `scale`."""
    square = prediction.new_zeros((len(prediction), *prediction.shape[2:]), dtype=torch.float32)
    dot = torch.zeros_like(square)
    # Channel by channel, so that no prediction is ever held in float32 as a whole.
    for own, other in zip(prediction.unbind(1), base.unbind(1), strict=True):
        scaled = own.to(torch.float32) * scale
        square.addcmul_(scaled, scaled)
        dot.addcmul_(scaled, other.to(torch.float32) * scale)
    return _patch_sum(square, patch_size, stride), _patch_sum(dot, patch_size, stride)


def _patch_sum(values: Tensor, patch_size: int, stride: int | None) -> Tensor:
    """Sum over each patch's pixels: (B, H, W) to (B, h, w). Of overlapping patches the mean, which is as good for a cosine."""
    if patch_size == 1:
        return values
    height, width = values.shape[-2:]
    # A patch never reaches over more than the picture.
    rows, columns = min(patch_size, height), min(patch_size, width)
    if stride is not None:
        return torch.nn.functional.avg_pool2d(values.unsqueeze(1), (rows, columns), stride).squeeze(1)
    # Zeros add nothing to a border patch's sums: it is made of the pixels that are there.
    padded = torch.nn.functional.pad(values, (0, -width % columns, 0, -height % rows))
    across = padded.shape[-1] // columns
    return padded.reshape(len(values), -1, rows, across, columns).sum(dim=(2, 4))


def _interpolated(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Weights between the patches' centres by linear interpolation: (N, B, h, w) to (N, B, height, width)."""
    size = (weights.shape[-2] * patch_size, weights.shape[-1] * patch_size)
    return torch.nn.functional.interpolate(weights, size=size, mode="bilinear", align_corners=False)[
        ..., :height, :width
    ]


def _mean_of_covering(weights: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The mean, at every pixel, of the weights of all patches that lie over it: (N, B, h, w) to (N, B, height, width)."""
    side = (height - weights.shape[-2] + 1, width - weights.shape[-1] + 1)
    padding = (side[1] - 1, side[1] - 1, side[0] - 1, side[0] - 1)
    summed = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(weights, padding), side, 1)
    covered = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(torch.ones_like(weights[:1, :1]), padding), side, 1
    )
    return summed / covered
