"""Ω ∝ √D·(D / D̄)^1.5: against the formula in float64, and what follows exactly from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratorio.compose.regions import Masks
from loratorio.compose.weights import relative_divergence, spatial_weights
from loratorio.engine import Engine
from loratorio.settings import Settings
from tests.published import paper

from .. import reference
from .test_divergence import apart
from .test_more_methods import SHAPE, FakeModel, bank, run
from .test_weights import DTYPES, Case, cases


def weights(case: Case, masks: Masks | None = None) -> Tensor:
    return spatial_weights(
        case.base, case.adapters, case.patch_size, None, case.top_k, relative=True, masks=masks
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 9), st.integers(1, 9)), top_k=st.integers(0, 4)
)
def test_as_the_formula_says(dtype: torch.dtype, seed: int, size: tuple[int, int], top_k: int) -> None:
    case = apart(seed, dtype, size)
    case.top_k = top_k
    found = weights(case).double().numpy()
    wanted = reference.spatial_weights(case.base, case.adapters, 2, None, top_k, relative=True)
    assert abs(found - wanted).max() < 1e-4


@given(case=cases())
def test_weights_are_shares_of_one(case: Case) -> None:
    omega = weights(case)
    assert bool((omega >= 0).all())
    torch.testing.assert_close(omega.sum(dim=0), torch.ones_like(omega[0]), rtol=0, atol=1e-5)


@given(case=cases(least=2), seed=st.integers(0, 2**31))
def test_the_prompt_s_order_does_not_matter(case: Case, seed: int) -> None:
    order = torch.randperm(len(case.adapters), generator=torch.Generator().manual_seed(seed))
    mixed = Case(case.base, case.adapters[order], case.patch_size, 0.0, case.top_k)
    torch.testing.assert_close(weights(mixed), weights(case)[order], rtol=1e-5, atol=1e-6)


@given(case=cases(least=2))
def test_a_lora_that_is_the_base_has_nothing_where_another_diverges(case: Case) -> None:
    case.adapters[0] = case.base
    case.adapters[1] = -case.base
    case.top_k = 0
    pair = Case(case.base, torch.stack([case.base, -case.base]), case.patch_size, 0.0, 0)
    empty = weights(pair)[0] > 0  # there the second is the base, too
    assert bool(((weights(case)[0] == 0) | empty).all())


def test_where_none_diverges_all_have_equal_parts() -> None:
    base = torch.randn(1, 4, 5, 7)
    omega = weights(Case(base, base.expand(3, *base.shape), 2, 0.0, 0))
    torch.testing.assert_close(omega, torch.full_like(omega, 1 / 3))


def test_of_two_that_diverge_as_far_the_one_comes_first_that_does_so_here_alone() -> None:
    distance = torch.full((2, 1, 1, 4), 0.2)
    distance[1, ..., 1:] = 0.0
    parts = relative_divergence(distance)[:, 0, 0]
    # D̄ is 0.2 and 0.05: √0.2·(1, 4^1.5).
    torch.testing.assert_close(parts[:, 0], 0.2**0.5 * torch.tensor([1.0, 8.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        parts[:, 1:], 0.2**0.5 * torch.tensor([[1.0] * 3, [0.0] * 3]), rtol=1e-4, atol=0
    )


@given(case=cases(least=2), size=st.sampled_from([2.0, 7.0]))
def test_images_of_a_batch_do_not_touch_each_other(case: Case, size: float) -> None:
    base = torch.cat([case.base, size * case.base.flip(-1)])
    adapters = torch.cat([case.adapters, size * case.adapters.flip(-1).roll(1, dims=0)], dim=1)
    both = weights(Case(base, adapters, case.patch_size, 0.0, case.top_k))
    torch.testing.assert_close(both[:, : len(case.base)], weights(case))


@given(seed=st.integers(0, 2**31))
def test_the_mean_is_taken_where_a_lora_may_act(seed: int) -> None:
    """What a LoRA predicts outside its place does not count: neither there, nor in its mean."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 4, 6, 8, generator=random)
    adapters = base + torch.randn(2, 1, 4, 6, 8, generator=random)
    own = torch.ones(2, 6, 8)
    own[0, :, 4:] = 0
    masks = Masks(own, torch.ones(6, 8), False)
    found = weights(Case(base, adapters, 2, 0.0, 0), masks)
    elsewhere = adapters.clone()
    elsewhere[0, ..., 4:] = torch.randn(1, 4, 6, 4, generator=random)
    torch.testing.assert_close(weights(Case(base, elsewhere, 2, 0.0, 0), masks), found)
    assert bool((found[0, ..., 4:] == 0).all())
    # Slowly, pixel by pixel.
    similarity = torch.tensor(
        [
            [
                reference.cosine(
                    each[0, :, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2].double().numpy(),
                    base[0, :, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2].double().numpy(),
                )
                for x in range(8)
            ]
            for each in adapters
            for y in range(6)
        ],
        dtype=torch.float64,
    ).view(2, 6, 8)
    distance = 1 - similarity
    mean = (distance * own).sum(dim=(1, 2)) / own.sum(dim=(1, 2))
    parts = own * distance.sqrt() * (distance / mean.view(2, 1, 1)) ** 1.5
    torch.testing.assert_close(found[:, 0].double(), parts / parts.sum(dim=0), atol=2e-3, rtol=0)


def test_with_masks_as_without_where_all_may_act() -> None:
    case = apart(3, torch.float32, (6, 4))
    everywhere = Masks(torch.ones(4, 6, 4), torch.ones(6, 4), False)
    torch.testing.assert_close(weights(case, everywhere), weights(case))


def test_nothing_is_allowed_anywhere() -> None:
    parts = relative_divergence(torch.full((2, 1, 3, 3), 0.5), torch.zeros(2, 1, 3, 3))
    assert bool((parts == 0).all())


def test_the_method_is_loratorio_with_these_weights() -> None:
    model = FakeModel()
    composed = run(Engine(paper(method="relative", recentre=0.3), bank(3)), model)
    model.index = 0
    mixes = [tuple(float(i == j) for j in range(3)) for i in range(3)]

    def opinions(mix: tuple[float, ...], cond: bool) -> Tensor:
        return torch.stack([model.opinion(mix, cond, slot) for slot in range(2)])

    base = (0.0, 0.0, 0.0)
    singles = torch.stack([opinions(mix, True) for mix in mixes])
    patch_size = paper().patch_size
    omega = reference.spatial_weights(opinions(base, True), singles, patch_size, None, relative=True)
    wanted = reference.compose(singles, omega)
    assert composed.cond.shape == (2, *SHAPE)
    assert abs(composed.cond.double().numpy() - wanted).max() < 1e-3
    unconds = torch.stack([opinions(mix, False) for mix in mixes])
    anchored = reference.recentre(opinions(base, False), unconds, omega, 0.3)
    assert composed.uncond is not None
    assert abs(composed.uncond.double().numpy() - anchored).max() < 1e-3


def test_it_is_what_users_get() -> None:
    assert Settings().method == "relative"
