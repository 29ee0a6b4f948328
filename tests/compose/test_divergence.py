"""Ω ∝ D = 1 − S, and by relative divergence: against the formulas in float64, and what follows exactly from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio.compose.methods.loratorio import in_proportion
from loratorio.compose.patches import NEAR, patch_divergence, patch_similarity
from loratorio.compose.regions import Masks
from loratorio.sampling.engine import Engine
from tests.published import paper

from .. import reference
from .test_more_methods import SHAPE, FakeModel, bank, run
from .test_weights import DTYPES, Case, cases
from .weighting import spatial_weights

both = pytest.mark.parametrize("relative", [False, True])


def weights(case: Case, relative: bool, masks: Masks | None = None) -> torch.Tensor:
    return spatial_weights(
        case.base, case.adapters, case.patch_size, None, case.top_k, relative=relative, masks=masks
    )


def apart(seed: int, dtype: torch.dtype, size: tuple[int, int]) -> Case:
    """LoRAs that clearly differ from the base: 1 − S has figures of its own beside float32's rounding."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(2, 4, *size, generator=random)
    adapters = base + torch.tensor([0.3, 0.5, 1.0, 3.0]).view(4, 1, 1, 1, 1) * torch.randn(
        4, *base.shape, generator=random
    )
    return Case(base.to(dtype), adapters.to(dtype), 2, 0.0, 0)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 9), st.integers(1, 9)), top_k=st.integers(0, 4)
)
def test_as_the_formula_says(
    relative: bool, dtype: torch.dtype, seed: int, size: tuple[int, int], top_k: int
) -> None:
    case = apart(seed, dtype, size)
    case.top_k = top_k
    found = weights(case, relative).double().numpy()
    wanted = reference.spatial_weights(case.base, case.adapters, 2, None, top_k, relative)
    assert abs(found - wanted).max() < 1e-4


@both
@given(case=cases())
def test_weights_are_shares_of_one(relative: bool, case: Case) -> None:
    omega = weights(case, relative)
    assert bool((omega >= 0).all())
    torch.testing.assert_close(omega.sum(dim=0), torch.ones_like(omega[0]), rtol=0, atol=1e-5)


@both
@given(case=cases(least=2))
def test_a_lora_that_equals_the_base_has_nothing_where_another_diverges(relative: bool, case: Case) -> None:
    case.adapters[0] = case.base
    case.adapters[1] = -case.base
    case.top_k = 0
    pair = Case(case.base, torch.stack([case.base, -case.base]), case.patch_size, 0.0, 0)
    empty = weights(pair, relative)[0] > 0  # there the second is the base, too
    assert bool(((weights(case, relative)[0] == 0) | empty).all())


@both
def test_where_none_diverges_all_have_equal_parts(relative: bool) -> None:
    base = torch.randn(1, 4, 5, 7)
    omega = weights(Case(base, base.expand(3, *base.shape), 2, 0.0, 0), relative)
    torch.testing.assert_close(omega, torch.full_like(omega, 1 / 3))


@both
@given(case=cases(least=2), seed=st.integers(0, 2**31))
def test_the_prompt_s_order_does_not_matter(relative: bool, case: Case, seed: int) -> None:
    order = torch.randperm(len(case.adapters), generator=torch.Generator().manual_seed(seed))
    mixed = Case(case.base, case.adapters[order], case.patch_size, 0.0, case.top_k)
    torch.testing.assert_close(weights(mixed, relative), weights(case, relative)[order], rtol=1e-5, atol=1e-6)


def test_in_places_only_those_count_that_may_act_there() -> None:
    parts = torch.tensor([0.1, 0.3, 0.0]).view(3, 1, 1, 1).expand(3, 1, 1, 4)
    own = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).view(3, 1, 1, 4)
    found = in_proportion(parts * own, own)[:, 0, 0]
    wanted = torch.tensor([[0.25, 1.0, 0.0, 0.0], [0.75, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    none = in_proportion(torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4))
    assert bool((none == 0).all())


@pytest.mark.parametrize("distance", [1e-5, 1e-3, 0.1])
@given(seed=st.integers(0, 2**31), patch_size=st.integers(1, 4))
def test_divergence_has_its_figures_near_the_base_too(distance: float, seed: int, patch_size: int) -> None:
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 4, 7, 6, generator=random)
    adapters = base + distance * torch.randn(2, 1, 4, 7, 6, generator=random)
    found = patch_divergence(base, adapters, patch_size).double()
    for i, adapter in enumerate(adapters):
        for row in range(found.shape[-2]):
            for column in range(found.shape[-1]):
                top, left = row * patch_size, column * patch_size
                patch = (0, slice(None), slice(top, top + patch_size), slice(left, left + patch_size))
                a, b = adapter[patch].double().flatten(), base[patch].double().flatten()
                # In float64 the plain formula has five figures left where D is 1e-11.
                wanted = 1 - float(a @ b / (a.norm() * b.norm()))
                moved = float((a - b).square().sum())
                far = moved > 0.99 * NEAR * float(b.square().sum())
                rounding = 6e-7 if far else 1e-6 * moved / float(a.norm() * b.norm()) + 1e-15
                assert float(found[i, 0, row, column]) == pytest.approx(wanted, rel=1e-5, abs=rounding)


@given(case=cases(dtype=None))
def test_divergence_is_one_less_similarity(case: Case) -> None:
    distance = patch_divergence(case.base, case.adapters, case.patch_size)
    similarity = patch_similarity(case.base, case.adapters, case.patch_size)
    torch.testing.assert_close(distance, 1 - similarity, rtol=0, atol=1e-6)
    assert bool((distance[similarity == 1] < 1e-6).all())
    same = patch_divergence(case.base, case.base.unsqueeze(0), case.patch_size)
    assert bool((same == 0).all())


@pytest.mark.parametrize(("relative", "width"), [(False, 5), (False, 4), (True, 4)])
def test_with_masks_as_without_where_all_may_act(relative: bool, width: int) -> None:
    """By relative divergence where patches are whole: the mean is over pixels there, and over patches here."""
    case = apart(3, torch.float32, (6, width))
    everywhere = Masks(torch.ones(4, 1, 6, width), torch.ones(1, 6, width), False)
    torch.testing.assert_close(weights(case, relative, everywhere), weights(case, relative))


@both
def test_the_method_is_loratorio_with_these_weights(relative: bool) -> None:
    model = FakeModel()
    method = "relative" if relative else "divergence"
    composed = run(Engine(paper(method=method, recentre=0.3), bank(3)), model)
    model.index = 0
    mixes = [tuple(float(i == j) for j in range(3)) for i in range(3)]

    def opinions(mix: tuple[float, ...], cond: bool) -> torch.Tensor:
        return torch.stack([model.opinion(mix, cond, slot) for slot in range(2)])

    base = (0.0, 0.0, 0.0)
    singles = torch.stack([opinions(mix, True) for mix in mixes])
    patch_size = paper().patch_size
    omega = reference.spatial_weights(opinions(base, True), singles, patch_size, None, relative=relative)
    wanted = reference.compose(singles, omega)
    assert composed.cond.shape == (2, *SHAPE)
    assert abs(composed.cond.double().numpy() - wanted).max() < 1e-3
    unconds = torch.stack([opinions(mix, False) for mix in mixes])
    anchored = reference.recentre(opinions(base, False), unconds, omega, 0.3)
    assert composed.uncond is not None
    assert abs(composed.uncond.double().numpy() - anchored).max() < 1e-3
