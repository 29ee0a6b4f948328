"""Exact consequences of the published method (arXiv 2508.11624), on random predictions of any shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from loratorio.compose import patches
from loratorio.compose.guidance import compose, guide, recentre
from loratorio.compose.methods.loratorio import keep_top_k, softmin
from loratorio.compose.patches import patch_similarity, upsample

from .. import reference
from .weighting import spatial_weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    """Predictions of a base and N LoRAs, and the knobs."""

    base: Tensor
    adapters: Tensor
    patch_size: int
    temperature: float
    top_k: int

    def weights(self) -> Tensor:
        return spatial_weights(self.base, self.adapters, self.patch_size, self.temperature, self.top_k)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype | None = torch.float32, least: int = 1) -> Case:
    """LoRAs that differ from the base a little or a lot; some patches empty, constant, or equal to the base's."""
    count, batch, channels = (draw(st.integers(low, high)) for low, high in ((least, 4), (1, 2), (1, 5)))
    height, width, patch_size = (draw(st.integers(1, high)) for high in (9, 9, 12))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = torch.randn(batch, channels, height, width, generator=random)
    distance = draw(st.sampled_from([0.01, 0.3, 3.0]))
    adapters = base + distance * torch.randn(count, *base.shape, generator=random)
    for _ in range(draw(st.integers(0, 3))):
        target = draw(st.sampled_from([base, *adapters]))
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        target[..., top:, left:] = draw(st.sampled_from([0.0, 1.0, -2.5]))
    if draw(st.booleans()):
        adapters[draw(st.integers(0, count - 1))] = base
    return Case(
        base.to(dtype),
        adapters.to(dtype),
        patch_size,
        draw(st.sampled_from([0.02, 0.1, 1.0])),
        draw(st.integers(0, count + 1)),
    )


@given(cases(dtype=None))
def test_weights_equal_the_slow_reference(case: Case) -> None:
    without_ties = Case(case.base, case.adapters, case.patch_size, case.temperature, 0)
    expected = reference.spatial_weights(case.base, case.adapters, case.patch_size, case.temperature)
    np.testing.assert_allclose(without_ties.weights().numpy(), expected, atol=2e-4)


@given(cases())
def test_top_k_equals_the_slow_reference(case: Case) -> None:
    # From our own weights, because LoRAs that tie exactly need not tie after rounding in another order.
    weights = softmin(patch_similarity(case.base, case.adapters, case.patch_size), case.temperature)
    kept = keep_top_k(weights, case.top_k).numpy()
    flat = weights.flatten(1).double().numpy().T
    expected = np.array([reference.top_shares(list(patch), case.top_k) for patch in flat]).T
    np.testing.assert_allclose(kept, expected.reshape(kept.shape), atol=1e-6)


@given(cases(dtype=None))
def test_weights_are_finite_and_sum_to_one(case: Case) -> None:
    weights = case.weights()
    assert weights.dtype == torch.float32
    assert weights.shape == (len(case.adapters), len(case.base), *case.base.shape[-2:])
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(weights[0]))


@given(cases())
def test_patches_are_constant(case: Case) -> None:
    weights, patch = case.weights(), case.patch_size
    height, width = weights.shape[-2:]
    for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 2)):
        corner = weights[..., row // patch * patch, column // patch * patch]
        assert torch.equal(weights[..., row, column], corner)


@given(cases(least=2))
def test_equal_predictions_give_the_plain_mean(case: Case) -> None:
    case.adapters[:] = case.adapters[0].clone()
    weights = case.weights()
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))
    mean = case.adapters.mean(dim=0)
    torch.testing.assert_close(compose(case.adapters, weights), mean)


@given(cases(least=2))
def test_high_temperature_is_the_mean(case: Case) -> None:
    weights = spatial_weights(case.base, case.adapters, case.patch_size, 1e9)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))


@given(cases(least=2), st.sampled_from([1e-6, 1e-30, 1e-45]))
def test_low_temperature_is_the_most_divergent_alone(case: Case, temperature: float) -> None:
    similarity = patch_similarity(case.base, case.adapters, case.patch_size)
    lowest = similarity.amin(dim=0, keepdim=True)
    near = similarity - lowest < 1e-3
    weights = softmin(similarity, temperature)
    assert bool(weights.isfinite().all())
    assert bool((weights[~near] == 0).all())
    torch.testing.assert_close((weights * near).sum(dim=0), torch.ones_like(weights[0]))


@given(cases(dtype=None), st.data())
def test_a_lora_of_strength_zero_never_outweighs(case: Case, data: st.DataObject) -> None:
    idle = data.draw(st.integers(0, len(case.adapters) - 1))
    case.adapters[idle] = case.base
    assert bool((patch_similarity(case.base, case.adapters, case.patch_size)[idle] == 1).all())
    weights = spatial_weights(case.base, case.adapters, case.patch_size, case.temperature)
    assert bool((weights[idle] <= weights).all())


@given(cases(), st.sampled_from([1e-12, 0.37, 3.0, 4096.0, 1e12]))
def test_scaling_all_predictions_leaves_the_weights(case: Case, scale: float) -> None:
    scaled = Case(case.base * scale, case.adapters * scale, case.patch_size, case.temperature, 0)
    case.top_k = 0
    torch.testing.assert_close(scaled.weights(), case.weights(), atol=1e-4, rtol=0)


@given(cases(dtype=torch.float16), st.sampled_from([2.0**-14, 0.5, 256.0]))
def test_half_precision_neither_overflows_nor_vanishes(case: Case, scale: float) -> None:
    case.top_k = 0
    scaled = Case(
        case.base.float() * scale, case.adapters.float() * scale, case.patch_size, case.temperature, 0
    )
    torch.testing.assert_close(scaled.weights(), case.weights(), atol=1e-4, rtol=0)


@given(cases(), st.data())
def test_shuffling_the_loras_shuffles_the_weights(case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(case.adapters))))
    shuffled = Case(case.base, case.adapters[order], case.patch_size, case.temperature, case.top_k)
    weights, new_weights = case.weights(), shuffled.weights()
    torch.testing.assert_close(new_weights, weights[order])
    torch.testing.assert_close(
        compose(shuffled.adapters, new_weights), compose(case.adapters, weights), atol=1e-5, rtol=1e-5
    )


@given(cases(least=3), st.data())
def test_ties_do_not_depend_on_the_order(case: Case, data: st.DataObject) -> None:
    case.adapters[1] = case.adapters[0]
    case.top_k = 1
    order = data.draw(st.permutations(range(len(case.adapters))))
    shuffled = Case(case.base, case.adapters[order], case.patch_size, case.temperature, 1)
    torch.testing.assert_close(shuffled.weights(), case.weights()[order])
    assert torch.equal(case.weights()[0], case.weights()[1])


@given(cases(), st.floats(0.05, 20))
def test_denoised_latents_compose_to_the_same(case: Case, sigma: float) -> None:
    random = torch.Generator().manual_seed(0)
    latents = 10 * torch.randn(case.base.shape, generator=random)
    weights = case.weights()
    of_denoised = compose(latents - sigma * case.adapters, weights)
    of_noise = latents - sigma * compose(case.adapters, weights)
    torch.testing.assert_close(of_denoised, of_noise, atol=1e-4 * max(1, sigma), rtol=1e-5)


@given(cases(dtype=None), st.floats(0, 1))
def test_composing_equals_the_slow_reference(case: Case, strength: float) -> None:
    weights = case.weights()
    slow = weights.double().numpy()
    np.testing.assert_allclose(
        compose(case.adapters, weights), reference.compose(case.adapters, slow), atol=1e-4
    )
    unconds = case.adapters.flip(0) * 0.5
    np.testing.assert_allclose(
        recentre(case.base, unconds, weights, strength),
        reference.recentre(case.base, unconds, slow, strength),
        atol=1e-4,
    )


@given(cases(dtype=None))
def test_recentring_ends_are_exact(case: Case) -> None:
    weights = case.weights()
    assert torch.equal(recentre(case.base, case.adapters, weights, 1.0), case.base.float())
    assert torch.equal(recentre(case.base, case.adapters, weights, 0.0), compose(case.adapters, weights))


def test_one_lora_alone_is_its_own_prediction() -> None:
    base, adapter = torch.randn(2, 4, 5, 7), torch.randn(1, 2, 4, 5, 7)
    weights = spatial_weights(base, adapter, 2, 0.01)
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(compose(adapter, weights), adapter[0])


def test_guidance_is_the_usual_one() -> None:
    cond, uncond = torch.randn(2, 1, 4, 3, 3)
    torch.testing.assert_close(guide(cond, uncond, 7.5), 7.5 * cond - 6.5 * uncond, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)


def test_border_patches_are_never_padded() -> None:
    base, adapters = torch.randn(1, 4, 5, 5), torch.randn(2, 1, 4, 5, 5)
    cut = spatial_weights(base, adapters, 4, 0.1)
    alone = spatial_weights(base[..., 4:, 4:], adapters[..., 4:, 4:], 4, 0.1)
    torch.testing.assert_close(cut[..., 4:, 4:], alone)


def test_a_patch_larger_than_the_picture_is_the_picture() -> None:
    base, adapters = torch.randn(1, 4, 5, 6), torch.randn(3, 1, 4, 5, 6)
    whole = spatial_weights(base, adapters, 6, 0.1)
    assert torch.equal(spatial_weights(base, adapters, 10_000, 0.1), whole)
    torch.testing.assert_close(whole, whole[..., :1, :1].expand_as(whole))


def test_upsampling_repeats() -> None:
    weights = torch.arange(6.0).view(1, 1, 2, 3)
    expected = weights.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[..., :7, :9]
    assert torch.equal(upsample(weights, 4, 7, 9), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 0}, "patch size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"adapters": torch.zeros(2, 1, 4, 8, 7)}, r"\(1, 4, 8, 8\)"),
        ({"adapters": torch.zeros(0, 1, 4, 8, 8)}, "at least 1"),
        ({"base": torch.zeros(4, 8, 8)}, "base must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "base": torch.zeros(1, 4, 8, 8),
        "adapters": torch.zeros(2, 1, 4, 8, 8),
        "patch_size": 2,
        "temperature": 0.1,
    }
    with pytest.raises(ValueError, match=words):
        spatial_weights(**{**arguments, **change})


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that `work` held at once, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = np.cumsum([each.nbytes() for each in sorted(events, key=lambda event: event.start_ns())])
    return int(live.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(("patch_size", "top_k"), [(1, 0), (2, 0), (3, 1)])
def test_extra_memory_is_little_more_than_the_input(
    dtype: torch.dtype, count: int, patch_size: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many LoRAs there are: they are compared a few at a time, each prediction with some numbers of float32 beside it."""
    monkeypatch.setattr(patches, "AT_ONCE", 1)
    base = torch.randn(2, 4, 64, 48).to(dtype)
    adapters = torch.randn(count, 2, 4, 64, 48).to(dtype)
    peak = peak_bytes(lambda: spatial_weights(base, adapters, patch_size, 0.1, top_k))
    weights_bytes = 4 * adapters[:, :, 0].numel()
    assert weights_bytes <= peak <= base.nbytes + adapters.nbytes + 16 * 4 * base.numel()
