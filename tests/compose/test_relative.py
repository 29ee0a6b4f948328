"""Ω ∝ √D·(D / D̄)^1.5: what it has beyond `test_divergence.py`, where both kinds of weights are held to their formulas."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio.compose.methods.loratorio import relative_divergence
from loratorio.compose.regions import Masks
from loratorio.settings import Settings

from .. import reference
from .test_divergence import weights as either_weights
from .test_weights import Case, cases

weights = partial(either_weights, relative=True)


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
    masks = Masks(own.unsqueeze(1), torch.ones(1, 6, 8), False)
    found = weights(Case(base, adapters, 2, 0.0, 0), masks=masks)
    elsewhere = adapters.clone()
    elsewhere[0, ..., 4:] = torch.randn(1, 4, 6, 4, generator=random)
    torch.testing.assert_close(weights(Case(base, elsewhere, 2, 0.0, 0), masks=masks), found)
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


def test_nothing_is_allowed_anywhere() -> None:
    parts = relative_divergence(torch.full((2, 1, 3, 3), 0.5), torch.zeros(2, 1, 3, 3))
    assert bool((parts == 0).all())


def test_it_is_what_users_get() -> None:
    assert Settings().method == "relative"
