"""Weights beyond the paper: interpolated and overlapping patches, the adaptive temperature, guidance rescale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.guidance import guide, rescale, rescaled_cond
from loratorio.compose.methods.loratorio import REFERENCE_SPREAD, at_reference_spread
from loratorio.compose.patches import BLENDS
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper

from .weighting import spatial_weights


def noise(count: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(2, 4, height, width, generator=random)
    return base, base + torch.randn(count, 2, 4, height, width, generator=random)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    patch=st.integers(1, 12),
    top_k=st.integers(0, 4),
    blend=st.sampled_from(BLENDS),
    adaptive=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_weights_sum_to_one(
    count: int, height: int, width: int, patch: int, top_k: int, blend: str, adaptive: bool, seed: int
) -> None:
    base, adapters = noise(count, height, width, seed)
    weights = spatial_weights(base, adapters, patch, 0.05, top_k, blend=blend, adaptive=adaptive)
    assert weights.shape == (count, 2, height, width)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, height, width))


@pytest.mark.parametrize("blend", BLENDS)
def test_single_pixel_patches_are_alike_in_every_blend(blend: str) -> None:
    base, adapters = noise(3, 6, 7, 0)
    torch.testing.assert_close(
        spatial_weights(base, adapters, 1, 0.1, blend=blend), spatial_weights(base, adapters, 1, 0.1)
    )


def test_overlapping_patches_are_the_mean_of_all_patches_over_a_pixel() -> None:
    base, adapters = noise(2, 5, 4, 1)
    side, tau = 3, 0.1
    total = torch.zeros(2, 2, 5, 4, dtype=torch.float64)
    count = torch.zeros(5, 4, dtype=torch.float64)
    for top in range(3):
        for left in range(2):
            window = (..., slice(top, top + side), slice(left, left + side))
            one = base[window].double().flatten(1)
            similar = torch.stack(
                [torch.cosine_similarity(each[window].double().flatten(1), one, dim=1) for each in adapters]
            )
            weight = torch.softmax(-similar / tau, dim=0)
            total[window] += weight[:, :, None, None]
            count[top : top + side, left : left + side] += 1
    weights = spatial_weights(base, adapters, side, tau, blend="overlapping")
    torch.testing.assert_close(weights.double(), total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blend", ["interpolated", "overlapping"])
def test_softer_blends_have_smaller_jumps(blend: str) -> None:
    base, adapters = noise(2, 16, 16, 2)

    def largest_jump(weights: Tensor) -> float:
        return float(weights.diff(dim=-1).abs().mean(dim=-2).amax())

    hard = spatial_weights(base, adapters, 4, 0.05)
    assert largest_jump(spatial_weights(base, adapters, 4, 0.05, blend=blend)) < 0.75 * largest_jump(hard)


def test_unknown_blend() -> None:
    base, adapters = noise(2, 4, 4, 0)
    with pytest.raises(ValueError, match="blend"):
        spatial_weights(base, adapters, 2, 0.1, blend="melt")


@settings(deadline=None, max_examples=20)
@given(shrink=st.floats(0.02, 1.0), seed=st.integers(0, 2**31))
def test_adaptive_temperature_does_not_care_how_small_the_spread_is(shrink: float, seed: int) -> None:
    similarity = 0.9 + 0.1 * torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    mean = similarity.mean(dim=0, keepdim=True)
    squeezed = mean + (similarity - mean) * shrink
    stretched = at_reference_spread(squeezed)
    deviation = stretched - stretched.mean(dim=0, keepdim=True)
    spread = deviation.square().mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(spread, torch.full((2,), REFERENCE_SPREAD), rtol=1e-2, atol=1e-4)


def test_adaptive_temperature_of_equal_opinions_is_uniform() -> None:
    base, _ = noise(1, 4, 4, 3)
    weights = spatial_weights(base, torch.stack([base * 2, base * 3]), 2, 0.01, adaptive=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5), rtol=0, atol=2e-3)


def test_rescale_gives_the_guided_picture_the_unguided_contrast() -> None:
    cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    guided = guide(cond, uncond, 7.0)
    torch.testing.assert_close(rescale(guided, cond, 0.0), guided)
    full = rescale(guided, cond, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert not rescale(torch.zeros_like(cond), cond, 1.0).isnan().any()
    through = guide(rescaled_cond(cond, uncond, 7.0, 0.7), uncond, 7.0)
    torch.testing.assert_close(through, rescale(guided, cond, 0.7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 1.0, 7.0])
def test_the_engine_rescales_only_where_it_knows_the_guidance(scale: float | None) -> None:
    def step(strength: float) -> Tensor:
        engine = Engine(paper(rescale=strength), Bank([Adapter("a", {}), Adapter("b", {})]))
        shape = (2, 4, 4, 4)
        random = torch.Generator().manual_seed(0)
        return engine.step(
            Step(0, 10, torch.zeros(shape), 2, guidance=scale),
            lambda rows: torch.randn(len(rows), 4, 4, 4, generator=random),
        ).cond

    same = torch.equal(step(0.0), step(0.7))
    assert same == (scale != 7.0)
