"""Which LoRAs are styles, against a slow reference and by properties."""

from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from loratorio.compose.styles import are_styles, uniform_part

Picture = Sequence[Sequence[float]]


def variation(picture: Picture) -> float:
    values = [value for line in picture for value in line]
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean


def correlation(one: Picture, other: Picture) -> float:
    pairs = [
        (math.sqrt(a), math.sqrt(b))
        for line, beside in zip(one, other, strict=True)
        for a, b in zip(line, beside, strict=True)
    ]
    means = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
    product = sum((a - means[0]) * (b - means[1]) for a, b in pairs)
    norms = [math.sqrt(sum((pair[side] - means[side]) ** 2 for pair in pairs)) for side in (0, 1)]
    return product / max(norms[0] * norms[1], 1e-30)


def slow(divergence: Tensor, uniform: Tensor) -> list[bool]:
    pictures = divergence.tolist()
    count, images = len(pictures), range(len(pictures[0]))
    uneven = [sum(variation(own[image]) for image in images) / len(images) for own in pictures]
    found = []
    for a in range(count):
        is_style = uneven[a] == min(uneven) and uneven[a] < 0.7 and uneven[a] < 0.9 * max(uneven)
        same = sum(uniform[a].tolist()) / len(images)
        is_style |= same >= 0.5 and uneven[a] < 0.9 * max(uneven)
        for b in range(count):
            alike = sum(correlation(pictures[a][image], pictures[b][image]) for image in images)
            is_style |= b != a and alike > 0 and uneven[a] < 0.9 * uneven[b] and uneven[a] < 1.25
        found.append(is_style)
    return found


@given(st.integers(1, 5), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**32))
def test_it_is_the_slow_reference(count: int, images: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(count, 1, 1, 1, generator=generator) * 4
    divergence = torch.rand(count, images, height, width, generator=generator).double() ** powers + 1e-3
    uniform = torch.rand(count, images, generator=generator).double()
    found = are_styles(divergence, uniform)
    assert found == slow(divergence, uniform)
    order = torch.randperm(count, generator=generator)
    assert are_styles(divergence[order], uniform[order]) == [found[position] for position in order]
    scales = torch.rand(count, images, 1, 1, generator=generator).double() + 0.1
    assert are_styles(divergence * scales, uniform) == found
    assert are_styles(divergence.flip(-1), uniform) == found
    assert not all(found)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_the_uniform_part_is_the_slow_reference(channels: int, height: int, width: int, seed: int) -> None:
    change = torch.randn(
        2, 3, channels, height, width, generator=torch.Generator().manual_seed(seed)
    ).double()
    change += torch.linspace(0, 3, 3)[None, :, None, None, None]
    found = uniform_part(change)
    for lora in range(2):
        for image in range(3):
            planes = change[lora, image].tolist()
            energy = sum(value**2 for plane in planes for line in plane for value in line)
            means = [sum(value for line in plane for value in line) / (height * width) for plane in planes]
            part = sum(mean**2 for mean in means) * height * width / energy
            assert found[lora, image].item() == pytest.approx(part, rel=1e-9)
    torch.testing.assert_close(uniform_part(change * 7), found)
    flat = torch.ones(1, channels, height, width)
    assert uniform_part(flat).tolist() == [1.0]
    assert uniform_part(0 * flat).tolist() == [0.0]


X = torch.arange(16.0)
FIGURE = 0.02 + torch.exp(-((X - 5) ** 2 + (X[:, None] - 8) ** 2) / 4)
LARGE_FIGURE = 0.02 + torch.exp(-((X - 6) ** 2 + (X[:, None] - 8) ** 2) / 13.5)
OTHER_FIGURE = 0.02 + torch.exp(-((X - 11) ** 2 + (X[:, None] - 8) ** 2) / 4)
BACKGROUND = 1.0 - 0.95 * torch.exp(-((X - 5) ** 2 + (X[:, None] - 8) ** 2) / 30)
ON_FIGURES = 0.3 + FIGURE
EVERYWHERE = 1.0 + 0.1 * torch.sin(X) * torch.ones(16, 1)


@pytest.mark.parametrize(
    ("maps", "styles"),
    [
        ((FIGURE, ON_FIGURES), [False, True]),
        ((FIGURE, EVERYWHERE), [False, True]),
        ((FIGURE, OTHER_FIGURE), [False, False]),
        ((FIGURE, 3 * FIGURE), [False, False]),
        # In the same place, and as even as a tiger's face beside a small figure: 1.3.
        ((FIGURE, LARGE_FIGURE), [False, False]),
        ((FIGURE, BACKGROUND, EVERYWHERE), [False, False, True]),
        ((FIGURE,), [False]),
        ((EVERYWHERE, EVERYWHERE), [False, False]),
        ((torch.zeros(16, 16), FIGURE), [False, False]),
    ],
)
def test_figures_backgrounds_and_styles(maps: Sequence[Tensor], styles: list[bool]) -> None:
    divergence = torch.stack(list(maps)).unsqueeze(1).double()
    assert are_styles(divergence, torch.zeros(len(maps), 1)) == styles


def test_what_gives_all_of_the_picture_other_colours_is_a_style() -> None:
    """Though it diverges as a background does, where the figure is not."""
    beside = (X > 8) + torch.full((16, 1), 0.01)
    divergence = torch.stack([FIGURE, beside]).unsqueeze(1).double()
    assert are_styles(divergence, torch.tensor([[0.1], [0.45]])) == [False, False]
    assert are_styles(divergence, torch.tensor([[0.1], [0.55]])) == [False, True]
    # A figure is none for that: it diverges least evenly.
    assert are_styles(divergence, torch.tensor([[0.9], [0.45]])) == [False, False]
