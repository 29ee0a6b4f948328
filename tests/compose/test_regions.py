"""Masks of places and the weights that come of them: against a slow float64 reference, and by properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratorio.compose.methods.loratorio import in_proportion, softmin
from loratorio.compose.regions import WHOLE, Box, Place, PlaceMasks, masks_of
from tests import reference
from tests.compose.weighting import spatial_weights

sides = st.integers(1, 24)
parts = st.floats(0, 1, width=32)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x0, x1 = sorted((draw(parts), draw(parts)))
    y0, y1 = sorted((draw(parts), draw(parts)))
    return Box(x0, y0, x1, y1)


@st.composite
def places(draw: st.DrawFn) -> Place:
    edge = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.5)))
    return Place(tuple(draw(st.lists(boxes(), min_size=1, max_size=3))), edge)


def slow_mask(place: Place, height: int, width: int, samples: int = 8) -> np.ndarray:
    """Point by point in float64: the share of each pixel's points that the place covers, each by its distance to the borders."""
    shorter = min(height, width)
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            total = 0.0
            for box in place.boxes:
                # A box's cover is a product, so its mean over a grid of points is the product of the means.
                across = [
                    _inside(
                        (x + (i + 0.5) / samples), box.x0 * width, box.x1 * width, width, place.edge * shorter
                    )
                    for i in range(samples)
                ]
                down = [
                    _inside(
                        (y + (i + 0.5) / samples),
                        box.y0 * height,
                        box.y1 * height,
                        height,
                        place.edge * shorter,
                    )
                    for i in range(samples)
                ]
                total += sum(across) / samples * sum(down) / samples
            found[y, x] = min(1.0, total)
    return found


def _inside(at: float, start: float, end: float, whole: float, edge: float) -> float:
    value = 1.0
    for distance, is_border in ((at - start, start > 0), (end - at, end < whole)):
        if is_border:
            value *= min(1.0, max(0.0, distance / edge + 0.5)) if edge > 0 else float(distance >= 0)
    return value


@given(places(), sides, sides)
@settings(max_examples=60)
def test_masks_are_those_of_the_slow_reference(place: Place, height: int, width: int) -> None:
    found = place.mask(height, width).double().numpy()
    # A point that lies on a hard border within rounding may fall to either side of it.
    tolerance = 1e-5 if place.edge > 0 else 0.26
    assert np.abs(found - slow_mask(place, height, width)).max() < tolerance


@given(places(), sides, sides)
def test_a_mask_is_zero_outside_and_one_inside(place: Place, height: int, width: int) -> None:
    mask = place.mask(height, width)
    assert mask.dtype == torch.float32
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    reach = place.edge * min(height, width) / 2 + 1e-3
    for y in range(height):
        for x in range(width):
            outside = all(
                x + 1 < box.x0 * width - reach
                or x > box.x1 * width + reach
                or y + 1 < box.y0 * height - reach
                or y > box.y1 * height + reach
                for box in place.boxes
            )
            if outside:
                assert mask[y, x] == 0


@given(sides, sides, st.sampled_from([0.0, 0.05, 0.1, 0.3]), st.floats(0.1, 0.9))
def test_places_that_meet_leave_no_seam(height: int, width: int, edge: float, at: float) -> None:
    left, right = Place((Box(0, 0, at, 1),), edge), Place((Box(at, 0, 1, 1),), edge)
    both = Place((*left.boxes, *right.boxes), edge)
    assert torch.equal(both.mask(height, width), torch.ones(height, width))
    assert masks_of([[both, None]], height, width) is None
    assert (
        float((left.mask(height, width) + right.mask(height, width)).min()) > 1 - 0.13
    )  # a point on a hard border


@given(places(), sides, sides)
def test_a_part_of_the_picture_has_its_part_of_the_mask(place: Place, height: int, width: int) -> None:
    """Inpainting "only masked" samples a part at the size of a picture: here with pixels of the same size."""
    whole = place.mask(2 * height, 2 * width)
    quarter = place.mask(height, width, Box(0.5, 0.0, 1.0, 0.5))
    torch.testing.assert_close(quarter, whole[:height, width:], atol=0.13, rtol=0)


def noises(count: int, batch: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, height, width, generator=random),
        torch.randn(count, batch, 4, height, width, generator=random),
    )


@given(
    st.lists(st.one_of(st.none(), places()), min_size=1, max_size=4),
    st.integers(1, 4),
    sides,
    sides,
    st.integers(1, 5),
    st.sampled_from([1e-4, 0.003, 0.1, 10.0]),
    st.integers(0, 3),
    st.sampled_from(["hard", "interpolated", "overlapping"]),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_weights_in_places(
    wanted: list[Place | None], batch: int, height: int, width: int, patch: int, temperature: float,
    top_k: int, blend: str, adaptive: bool, seed: int,
) -> None:  # fmt: skip
    base, adapters = noises(len(wanted), batch, height, width, seed)
    masks = masks_of([wanted], height, width)
    weights = spatial_weights(
        base, adapters, patch, temperature, top_k, blend=blend, adaptive=adaptive, masks=masks
    )
    coverage = torch.ones(1, height, width) if masks is None else masks.coverage
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(dim=0), coverage.expand(batch, -1, -1), atol=1e-5, rtol=0)
    for own, place in zip(weights, wanted, strict=True):
        if place is not None:
            assert not own[:, place.mask(height, width) == 0].any()  # exactly 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_weights_are_those_of_the_formula(dtype: torch.dtype, temperature: float, top_k: int) -> None:
    """Ω·m over its sum, times the coverage, in float64; where all of Ω lies with others, SoftMin among those allowed."""
    wanted = [
        Place((Box(0, 0, 0.4, 1),), 0.2),
        Place((Box(0.3, 0.2, 0.9, 1),), 0.0),
        Place((Box(0.6, 0, 1, 0.6),), 0.1),
    ]
    base, adapters = noises(3, 2, 7, 11, 5)
    base, adapters = base.to(dtype), adapters.to(dtype)
    masks = masks_of([wanted], 7, 11)
    assert masks is not None
    assert masks.has_gap
    found = spatial_weights(base, adapters, 2, temperature, top_k, masks=masks).double().numpy()
    own, coverage = masks.own[:, 0].double().numpy(), masks.coverage[0].double().numpy()
    for image in range(2):
        for y in range(7):
            for x in range(11):
                patch = np.s_[:, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
                e0 = base[image].double().numpy()[patch]
                similarity = [
                    reference.cosine(adapters[i, image].double().numpy()[patch], e0) for i in range(3)
                ]
                allowed = [i for i in range(3) if own[i, y, x] > 0]
                expected = np.zeros(3)
                if allowed:
                    least = min(similarity[i] for i in allowed)
                    powers = {
                        i: own[i, y, x] * math.exp(-(similarity[i] - least) / temperature) for i in allowed
                    }
                    kept = sorted(powers.values(), reverse=True)[: top_k or None][-1]
                    powers = {i: power for i, power in powers.items() if power >= kept * (1 - 1e-9)}
                    for i, power in powers.items():
                        expected[i] = power / sum(powers.values()) * coverage[y, x]
                assert np.abs(found[:, image, y, x] - expected).max() < 2e-4


def test_a_lora_without_a_place_yields_inside_the_others() -> None:
    masks = masks_of([[Place((Box(0, 0, 0.5, 1),)), None]], 2, 4, yielding=0.75)
    assert masks is not None
    assert not masks.has_gap
    assert masks.own[1, 0].tolist() == [[0.25, 0.25, 1.0, 1.0]] * 2
    allowed = masks.own
    weights = in_proportion(0.5 * allowed, allowed) * masks.coverage
    torch.testing.assert_close(weights[1, 0, 0], torch.tensor([0.2, 0.2, 1.0, 1.0]))


def test_one_lora_in_a_place_leaves_the_rest_to_the_base() -> None:
    masks = masks_of([[Place((Box(0, 0, 0.5, 1),))]], 2, 4)
    assert masks is not None
    assert masks.has_gap
    assert masks.coverage[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    allowed = masks.own
    even = in_proportion(allowed, allowed) * masks.coverage
    assert even[0].tolist() == masks.coverage.tolist()
    alone = softmin(torch.ones(1, 1, 2, 4), 1e-4, allowed)
    assert alone[0].tolist() == masks.coverage.tolist()


def test_a_canvas_makes_each_mask_once() -> None:
    canvas, place = PlaceMasks(WHOLE), Place((Box(0, 0, 0.5, 1),))
    assert canvas.masks({0: None, 1: None}, (4, 4), torch.device("cpu")) is None
    first = canvas.masks({0: place, 1: None}, (4, 4), torch.device("cpu"))
    assert first is not None
    assert canvas.masks({0: place, 1: None}, (4, 4), torch.device("cpu")) is first
    assert canvas.mask(place, (4, 4), torch.device("cpu")) is canvas.mask(place, (4, 4), torch.device("cpu"))


def test_a_place_is_within_another() -> None:
    left, corner = Place((Box(0, 0, 0.5, 1),)), Place((Box(0, 0, 0.3, 0.4),), 0.1)
    both = Place((*corner.boxes, Box(0.6, 0, 1, 1)))
    assert corner.is_within(left)
    assert corner.is_within(both)
    assert left.is_within(left)
    assert not left.is_within(corner)
    assert not both.is_within(left)
    whole = Place((WHOLE,))
    assert not any(one.is_within(whole) for one in (left, whole))
