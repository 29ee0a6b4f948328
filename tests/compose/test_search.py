"""Places that are found: against a slow float64 reference, and by properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratorio.compose.regions import WHOLE, Box, outside
from loratorio.compose.search import APART, TIE, UPRIGHT, Layout, layout, relative_to_mean

HEIGHT, WIDTH = 8, 24
EVERYWHERE = torch.ones(HEIGHT, WIDTH, dtype=torch.float64)


def figures(columns: list[float], strongest: list[int], seed: int = 0, clear: float = 0.5) -> Tensor:
    """D of LoRAs that all diverge on a figure at each of these columns, LoRA i most on figure `strongest[i]`; (N, 1, H, W)."""
    noise = torch.rand(len(strongest), HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    x = torch.arange(WIDTH, dtype=torch.float64)
    made = 0.02 * noise + 0.1
    for number, own in enumerate(strongest):
        for place, column in enumerate(columns):
            made[number] += (1 + clear * (place == own)) * torch.exp(-(((x - column) / 1.5) ** 2))
    return (1e-3 * made).unsqueeze(1)


def found(divergence: Tensor, **more: object) -> Layout:
    area = more.pop("area", EVERYWHERE)
    assert isinstance(area, Tensor)
    made = layout(relative_to_mean(divergence, area)[:, 0], area, **more)  # type: ignore[arg-type]
    assert made is not None
    return made


def slow_layout(divergence: np.ndarray) -> tuple[list[tuple[float, float]], float, tuple[int, ...]]:
    """Two centres, how far apart they are, and each LoRA's figure, by loops over everything that the formula names: D over its mean, the
    mass, all ways to divide the pixels by a line, the shares."""
    count, height, width = divergence.shape
    relative = [[[float(d) / float(own.mean()) for d in row] for row in own] for own in divergence]
    pixels = []
    for y in range(height):
        for x in range(width):
            mass = sum(relative[i][y][x] for i in range(count)) / count - 1
            if mass > 0:
                pixels.append((x + 0.5, (y + 0.5) / UPRIGHT, mass))

    def left(group: list[tuple[float, float, float]]) -> tuple[float, tuple[float, float]]:
        total = sum(mass for _, _, mass in group)
        middle = (
            sum(x * mass for x, _, mass in group) / total,
            sum(y * mass for _, y, mass in group) / total,
        )
        return sum(mass * ((x - middle[0]) ** 2 + (y - middle[1]) ** 2) for x, y, mass in group), middle

    best = (math.inf, [(0.0, 0.0)], 0.0)
    for angle in range(0, 180, 3):
        a, b = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        order = sorted(pixels, key=lambda each: a * each[0] + b * each[1])
        for cut in range(1, len(order)):
            one, other = left(order[:cut]), left(order[cut:])
            spreads = [
                math.sqrt(part[0] / sum(mass for *_, mass in group))
                for part, group in ((one, order[:cut]), (other, order[cut:]))
            ]
            apart = math.dist(one[1], other[1]) / max(sum(spreads) / 2, 1e-20)
            best = min(best, (one[0] + other[0], [one[1], other[1]], apart), key=lambda each: each[0])
    centres = [(x, y * UPRIGHT) for x, y in sorted(best[1])]
    cut = (centres[0][0] + centres[1][0]) / 2
    shares = []
    for own in relative:
        total = sum(sum(row) for row in own)
        first = sum(row[x] for row in own for x in range(width) if x + 0.5 < cut)
        shares.append((first / total, 1 - first / total))
    straight, turned = shares[0][0] + shares[1][1], shares[0][1] + shares[1][0]
    return centres, best[2], (1, 0) if turned / 2 > straight / 2 + TIE else (0, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strongest", [[0, 1], [1, 0], [0, 0]])
@pytest.mark.parametrize("clear", [0.05, 3.0])
def test_it_is_the_slow_reference(seed: int, strongest: list[int], clear: float) -> None:
    divergence = figures([4 + seed, 17.5], strongest, seed, clear)
    centres, separation, order = slow_layout(divergence[:, 0].numpy())
    made = found(divergence)
    assert made.separation == pytest.approx(separation, rel=1e-3)
    line = round((centres[0][0] + centres[1][0]) / 2 / WIDTH, 3)
    halves = Box(0, 0, line, 1), Box(line, 0, 1, 1)
    for box, cell in zip(made.boxes, order, strict=True):
        assert box == pytest.approx(halves[cell], abs=2e-3)


ARRANGED = st.tuples(
    st.lists(st.integers(2, WIDTH - 3), min_size=2, max_size=4, unique=True).map(sorted),
    st.randoms(use_true_random=False),
    st.integers(0, 10**6),
)


@given(ARRANGED)
@settings(max_examples=60, deadline=None)
def test_the_boxes_are_the_picture_and_each_has_its_figure(
    arranged: tuple[list[int], object, int],
) -> None:
    columns, random, seed = arranged
    assume(min(b - a for a, b in itertools.pairwise(columns)) >= 5)
    strongest = list(range(len(columns)))
    random.shuffle(strongest)  # type: ignore[attr-defined]
    made = found(figures([float(each) for each in columns], strongest, seed, clear=4.0))
    assert outside(made.boxes) == ()
    assert sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in made.boxes) == pytest.approx(1)
    for number, box in enumerate(made.boxes):
        assert box.x0 < (columns[strongest[number]] + 0.5) / WIDTH < box.x1
        assert (box.y0, box.y1) == (0, 1)


@given(st.permutations(range(3)), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_loras_does_not_matter_where_they_differ(order: list[int], seed: int) -> None:
    divergence = figures([3.0, 11.0, 19.0], [2, 0, 1], seed, clear=4.0)
    plain, shuffled = found(divergence), found(divergence[list(order)])
    assert [plain.boxes[i] for i in order] == list(shuffled.boxes)


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_mirrored_and_scaled(seed: int, scale: float) -> None:
    """A mirrored picture has mirrored places; the size of a LoRA's divergence does not matter."""
    divergence = figures([5.0, 16.0], [1, 0], seed, clear=4.0)
    made = found(divergence)
    mirrored = found(divergence.flip(-1))
    for box, other in zip(made.boxes, mirrored.boxes, strict=True):
        assert other == pytest.approx((1 - box.x1, box.y0, 1 - box.x0, box.y1), abs=1.5e-3)
    scaled = found(divergence * torch.tensor([scale, 1.0]).view(2, 1, 1, 1))
    assert scaled.boxes == made.boxes


def alike(columns: list[float], count: int) -> Tensor:
    """D of LoRAs that diverge in the same places."""
    return figures(columns, [0] * count)[:1].expand(count, -1, -1, -1)


@pytest.mark.parametrize(
    ("columns", "count"), [([12.0], 2), ([12.0], 3), ([5.0, 18.0], 3), ([4.0, 12.0, 20.0], 4)]
)
def test_fewer_figures_than_loras_are_not_apart(columns: list[float], count: int) -> None:
    """Also where most of the variance is explained: two figures for three LoRAs, of which one is divided."""
    assert found(alike([4.0, 12.0, 20.0][:3], 3)).are_apart
    made = found(alike(columns, count))
    assert not made.are_apart
    assert made.separation < 3.0 < APART


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_parts_of_an_even_line_are_the_root_of_twelve_apart(count: int) -> None:
    line = torch.full((count, 1, 1, 240), 1e-3, dtype=torch.float64)
    line[..., 60:180] += 1
    made = layout(relative_to_mean(line, torch.ones(1, 240).double())[:, 0], torch.ones(1, 240).double())
    assert made is not None
    assert made.separation == pytest.approx(12**0.5, rel=0.01)
    assert not made.are_apart


def test_where_each_diverges_in_its_own_part_figures_may_touch() -> None:
    touching = torch.full((2, 1, 1, 24), 0.05, dtype=torch.float64)
    touching[0, ..., 6:12] += 1
    touching[1, ..., 12:18] += 1
    made = layout(relative_to_mean(touching, torch.ones(1, 24).double())[:, 0], torch.ones(1, 24).double())
    assert made is not None
    assert made.separation < APART
    assert made.are_apart
    assert found(figures([12.0], [0])).are_apart  # one LoRA has all of it
    nowhere = torch.full((2, HEIGHT, WIDTH), 1.0, dtype=torch.float64)
    assert layout(nowhere, EVERYWHERE) is None  # no pixel has any mass


def test_where_both_fit_alike_words_decide_and_then_the_prompts_order() -> None:
    both = figures([6.0, 17.0], [0, 1], clear=0.0)
    both[1] = both[0]
    left, right = found(both).boxes
    assert left.x1 == right.x0
    assert found(both, towards=[(1.0, 0.5), None]).boxes == (right, left)
    assert found(both, towards=[None, (0.0, 0.5)]).boxes == (right, left)
    assert found(both, towards=[(1.0, 0.5), (1.0, 0.5)]).boxes == (left, right)
    # Four, in another order than they stand: farther out on the same side is farther out.
    alike = figures([3.0, 9.0, 15.0, 21.0], [0, 1, 2, 3], clear=0.0)
    alike[:] = alike[0].clone()
    wanted = [(0.0, 0.5), (1.5, 0.5), (-0.5, 0.5), (1.0, 0.5)]
    edges = [box.x0 for box in found(alike, towards=wanted).boxes]
    assert sorted(range(4), key=lambda number: edges[number]) == [2, 0, 3, 1]
    # LoRAs that differ clearly are where they are.
    clear = figures([6.0, 17.0], [1, 0], clear=9.0)
    assert found(clear, towards=[(0.0, 0.5), (1.0, 0.5)]).boxes[0].x0 > 0


def test_one_above_the_other_only_if_the_prompt_says_so() -> None:
    y = torch.arange(HEIGHT, dtype=torch.float64)[:, None]
    tall = (torch.exp(-((y - 1) ** 2)) + torch.exp(-((y - 6) ** 2))).expand(HEIGHT, 4)
    divergence = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.float64) + 0.01
    divergence[..., 10:14] += tall
    asked = found(divergence, towards=[(0.5, 1.0), (0.5, 0.0)])
    assert [box.y0 for box in asked.boxes] == [pytest.approx(0.5, abs=0.01), 0]
    assert asked.are_apart


def test_nothing_is_found_outside_of_the_area() -> None:
    """A drawn place, or what an inpainting mask keeps: what the LoRAs do there does not count."""
    area = EVERYWHERE.clone()
    area[:, 16:] = 0
    divergence = figures([3.0, 11.0, 20.0], [0, 1])
    inside = found(divergence, area=area)
    divergence[..., 16:] *= 50
    assert found(divergence, area=area) == inside
    assert inside.boxes[0].x1 == pytest.approx(7.5 / WIDTH, abs=0.02)


def test_of_a_part_of_the_picture_the_places_are_in_the_whole_picture() -> None:
    divergence = figures([6.0, 17.0], [0, 1], clear=4.0)
    region = Box(0.5, 0.25, 0.75, 0.5)
    whole, part = found(divergence), found(divergence, region=region)
    line = 0.5 + 0.25 * whole.boxes[0].x1
    assert part.boxes[0] == pytest.approx((0, 0, line, 1), abs=1e-3)
    assert part.boxes[1] == pytest.approx((line, 0, 1, 1), abs=1e-3)


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    found(figures([6.0, 17.0], [0, 1]))
    assert torch.equal(torch.get_rng_state(), before)


_SIDES = list(itertools.combinations((0.0, 0.25, 0.5, 0.75, 1.0), 2))


@given(st.lists(st.tuples(st.sampled_from(_SIDES), st.sampled_from(_SIDES)), max_size=4))
def test_outside_is_what_no_box_covers(
    sides: list[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    boxes = [(across[0], down[0], across[1], down[1]) for across, down in sides]
    left = outside([Box(*box) for box in boxes])
    for x, y in itertools.product((0.125, 0.375, 0.625, 0.875), repeat=2):
        covered = sum(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in left)
        assert covered == (0 if any(b[0] < x < b[2] and b[1] < y < b[3] for b in boxes) else 1)
    assert outside([]) == (WHOLE,)
