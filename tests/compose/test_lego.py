"""LoRA-LEGO: against a slow reference in float64, exact cases, and what the engine and the bank make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, Delta, Dense, LowRank
from loratorio.compose.methods.lego import Product, assembled, clusters
from loratorio.compose.mixes import Participants
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper

Unit = tuple[np.ndarray, np.ndarray]


def slow_units(down: Tensor, up: Tensor) -> list[Unit]:
    """A product (r, in, …), (r, out) rank by rank, both halves of one norm."""
    units = []
    for rank in range(len(down)):
        a, b = down[rank].double().flatten().numpy(), up[rank].double().numpy()
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        size = math.sqrt(lengths[0] * lengths[1])
        units.append((a / lengths[0] * size, b / lengths[1] * size) if size else (a * 0, b * 0))
    return units


def slow_clusters(points: Sequence[np.ndarray], count: int) -> list[int]:
    centres = [max(points, key=lambda point: float(np.sum(point**2)))]
    while len(centres) < count:
        centres.append(max(points, key=lambda point: min(float(np.sum((point - c) ** 2)) for c in centres)))
    before: list[int] = []
    while True:
        now = [
            min(range(count), key=lambda c, own=point: float(np.sum((own - centres[c]) ** 2)))  # type: ignore[misc]
            for point in points
        ]
        if now == before:
            return now
        before = now
        for c in range(count):
            own = [point for point, cluster in zip(points, now, strict=True) if cluster == c]
            if own:
                centres[c] = np.mean(own, axis=0)


def slow_change(products: Sequence[Product], units: float) -> np.ndarray:
    """ΔW (out, in) of the assembled LoRA, by the formula: k-means over units, both reweightings."""
    every = [unit for product in products for unit in slow_units(*product)]
    mean_rank = np.mean([len(product.down) for product in products])
    count = min(len(every), max(1, round(units * mean_rank)))
    found = slow_clusters([np.concatenate(unit) for unit in every], count)
    filled = sorted(set(found))
    change = np.zeros((len(every[0][1]), len(every[0][0])))
    for cluster in filled:
        members = [unit for unit, of in zip(every, found, strict=True) if of == cluster]
        a, b = (np.mean([unit[half] for unit in members], axis=0) for half in (0, 1))
        wanted = np.mean([math.hypot(np.linalg.norm(u[0]), np.linalg.norm(u[1])) for u in members])
        length = math.hypot(np.linalg.norm(a), np.linalg.norm(b))
        factor = wanted / length if length else 0.0
        change += np.outer(factor * b, factor * a)
    return change * math.sqrt(mean_rank / len(filled))


def change(product: Product) -> Tensor:
    return product.up.T @ product.down.flatten(1)


def random_products(ranks: Sequence[int], inner: tuple[int, ...], out: int, seed: int) -> list[Product]:
    random = torch.Generator().manual_seed(seed)
    return [
        Product(
            torch.randn(rank, *inner, generator=random) * 10 ** float(torch.randn(1, generator=random)),
            torch.randn(rank, out, generator=random),
        )
        for rank in ranks
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.sampled_from([(7,), (16,), (3, 3, 3), (5, 1, 1)]),
    st.integers(1, 13),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 2**31),
)
def test_it_is_what_the_formula_says(
    ranks: list[int], inner: tuple[int, ...], out: int, units: float, seed: int
) -> None:
    products = random_products(ranks, inner, out, seed)
    double = [Product(*(half.double() for half in product)) for product in products]
    made = assembled(double, units)
    assert made.down.shape[1:] == inner
    assert made.down.dtype == torch.float64
    np.testing.assert_allclose(change(made).numpy(), slow_change(products, units), rtol=1e-8, atol=1e-9)


def test_in_float32_it_is_nearly_the_same() -> None:
    products = random_products([8, 8, 4], (24,), 20, seed=5)
    expected = torch.from_numpy(slow_change(products, 1.0))
    made = change(assembled(products, 1.0)).double()
    assert float((made - expected).norm() / expected.norm()) < 1e-5


def test_a_lora_with_itself_is_that_lora() -> None:
    """Equal units are one cluster each, whose centroid is the unit."""
    (product,) = random_products([6], (12,), 10, seed=1)
    torch.testing.assert_close(
        change(assembled([product, product], 1.0)), change(product), rtol=1e-4, atol=1e-4
    )


def test_with_a_cluster_for_each_unit_it_is_merging_but_for_the_scale() -> None:
    products = random_products([4, 4], (12,), 10, seed=2)
    merged = sum(change(product) for product in products)
    torch.testing.assert_close(change(assembled(products, 2.0)) * math.sqrt(2), merged, rtol=1e-4, atol=1e-4)


def test_it_does_not_matter_how_a_file_splits_its_scale() -> None:
    products = random_products([4, 6], (12,), 10, seed=3)
    other = [Product(down * 8, up / 8) for down, up in products]
    torch.testing.assert_close(change(assembled(other)), change(assembled(products)), rtol=1e-4, atol=1e-4)


def test_ranks_that_change_nothing_are_units_at_zero() -> None:
    products = random_products([4, 4], (12,), 10, seed=4)
    products[0].up[1] = 0
    products[1].down[2] = 0
    made = assembled(products)
    assert torch.isfinite(change(made)).all()
    np.testing.assert_allclose(change(made).numpy(), slow_change(products, 1.0), rtol=1e-3, atol=1e-3)


def test_nothing_at_all_is_nothing() -> None:
    products = [Product(torch.randn(3, 5), torch.zeros(3, 4))] * 2
    assert not change(assembled(products)).any()


@given(st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_every_point_is_in_the_nearest_cluster(count: int, seed: int) -> None:
    points = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = clusters(points, count)
    assert int(found.max()) < count
    centres = {c: points[found == c].mean(dim=0) for c in set(found.tolist())}
    for point, own in zip(points, found.tolist(), strict=True):
        nearest = min(float((point - centre).norm()) for centre in centres.values())
        assert float((point - centres[own]).norm()) <= nearest + 1e-9


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def low_rank(seed: int, rank: int = 2) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 6, generator=random), torch.randn(6, rank, generator=random)
    return LowRank(down, up, 0.5)


def as_product(delta: Delta, strength: float) -> Product:
    assert isinstance(delta, LowRank)
    return Product(delta.down, delta.up.T * delta.scale * strength)


def composed(
    loras: Bank, model: nn.Module, rows: Tensor, participants: Participants | None = None, **at: float
) -> Tensor:
    layers = dict(model.named_children())
    with torch.no_grad(), loras.attached(layers):
        engine = Engine(paper(method="lego", **at), loras, participants)
        steps = [
            engine.step(Step(i, 20, rows, 0, denoised=False), lambda asked: model(rows)).cond
            for i in range(2)
        ]
    assert torch.equal(*steps)
    return steps[0]


def with_changes(model: TwoLayers, first: Tensor, second: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    hidden = torch.tanh(nn.functional.linear(rows, model.first.weight + first, model.first.bias + bias))
    return nn.functional.linear(hidden, model.second.weight + second, model.second.bias)


@pytest.mark.parametrize("always", [False, True])
def test_the_model_computes_with_the_assembled_lora(always: bool) -> None:
    """Layers that one LoRA touches have that; dense changes are merged; a LoRA that always acts is added."""
    model, rows = TwoLayers().requires_grad_(False), torch.randn(3, 6)
    bias = torch.randn(6)
    one, two = low_rank(1), low_rank(2, rank=3)
    adapters = [
        Adapter("one", {"first": [one, Dense(None, bias)], "second": [low_rank(3)]}, strength=0.8),
        Adapter("two", {"first": [two]}, strength=-0.5),
    ]
    first = change(assembled([as_product(one, 0.8), as_product(two, -0.5)]))
    participants = None
    if always:
        adapters.append(Adapter("fast", {"first": [low_rank(4)]}, strength=0.3))
        first = first + low_rank(4).dense() * 0.3
        participants = Participants.of(3, always=[2])
    expected = with_changes(model, first, low_rank(3).dense() * 0.8, bias * 0.8, rows)
    torch.testing.assert_close(composed(Bank(adapters), model, rows, participants), expected)


def test_steps_that_are_not_composed_merge() -> None:
    model, rows = TwoLayers().requires_grad_(False), torch.randn(3, 6)
    loras = Bank([Adapter("one", {"first": [low_rank(1)]}), Adapter("two", {"first": [low_rank(2)]})])
    merged = low_rank(1).dense() + low_rank(2).dense()
    expected = with_changes(model, merged, torch.zeros(6, 6), torch.zeros(6), rows)
    torch.testing.assert_close(composed(loras, model, rows, start=0.9), expected)


def test_a_strength_that_changes_is_followed() -> None:
    model, rows = TwoLayers().requires_grad_(False), torch.randn(3, 6)
    loras = Bank([Adapter("one", {"first": [low_rank(1)]}), Adapter("two", {"first": [low_rank(2)]})])
    with torch.no_grad(), loras.attached({"first": model.first}):
        engine = Engine(paper(method="lego"), loras)
        for strengths in ((1.0, 1.0), (0.5, 2.0), (1.0, 1.0)):
            step = Step(0, 20, rows, 0, denoised=False, strengths=strengths)
            made = engine.step(step, lambda asked: model(rows)).cond
            first = change(
                assembled([as_product(low_rank(i + 1), strength) for i, strength in enumerate(strengths)])
            )
            expected = with_changes(model, first, torch.zeros(6, 6), torch.zeros(6), rows)
            torch.testing.assert_close(made, expected)
    assert not model.first._forward_hooks


def test_on_a_refiner_that_no_lora_fits_nothing_of_the_first_models_lora_is_left() -> None:
    model, rows = TwoLayers().requires_grad_(False), torch.randn(3, 6)
    adapters = [Adapter(name, {"first": [low_rank(seed)]}) for seed, name in enumerate("ab")]
    first, refiner = Bank(adapters), Bank([Adapter(name, {}) for name in "ab"])
    engine = Engine(paper(method="lego"), first)
    for bank in (first, refiner):
        if bank is refiner:
            engine.rebind(bank)
        with torch.no_grad(), bank.attached(dict(model.named_children())):
            found = engine.step(Step(0, 20, rows, 0, denoised=False), lambda asked: model(rows)).cond
    assert torch.equal(found, model(rows))
