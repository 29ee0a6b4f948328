"""The world draws what it says, the same each time."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from loratorio.toybox.elements import BY_NAME, CATEGORIES, ELEMENTS
from loratorio_lab.toybox.shapes import PIXELS
from loratorio_lab.toybox.tokens import byte_symbols, merges_for
from loratorio_lab.toybox.world import (
    Scene,
    caption,
    random_elements,
    random_scene,
    render,
    words,
)


def test_every_category_has_elements() -> None:
    assert {element.category for element in ELEMENTS} == set(CATEGORIES)
    assert len({element.trigger for element in ELEMENTS}) == len(ELEMENTS) >= 10


def test_same_seed_same_picture() -> None:
    first, again = (random_scene(random.Random(5), "cat", "night") for _ in range(2))
    assert first == again
    assert np.array_equal(render(first), render(again))


def test_base_scenes_hold_no_element() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert scene.elements() == ()
        assert not any(element.trigger in caption(scene) for element in ELEMENTS)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_an_element_shows_and_is_named(element) -> None:
    plain = random_scene(random.Random(1))
    scene = replace(plain, **{element.category: element.name})
    assert scene.elements() == (element.name,)
    assert element.trigger in caption(scene).replace(",", "").split()
    assert np.abs(render(scene).astype(int) - render(plain).astype(int)).mean() > 2


def test_every_combination_of_five_can_be_drawn() -> None:
    by_category = [[e.name for e in ELEMENTS if e.category == category] for category in CATEGORIES]
    for names in product(*by_category):
        scene = random_scene(random.Random(2), *names)
        assert set(scene.elements()) == set(names)
        picture = render(scene)
        assert picture.shape == (PIXELS, PIXELS, 3)
        assert picture.dtype == np.uint8


def test_random_elements_are_of_different_categories() -> None:
    rng = random.Random(3)
    for count in range(1, 6):
        chosen = random_elements(rng, count)
        assert len({BY_NAME[name].category for name in chosen}) == count


def test_caption_of_a_full_scene() -> None:
    scene = Scene("cat", "stripes", "ink", "night", "mushroom", side="left")
    assert caption(scene) == "mimsy wearing strypo, shrumi on the left, lunara background, inkash style"


def test_each_word_of_the_world_becomes_one_token() -> None:
    vocabulary = words()
    made = {"".join(pair) for pair in merges_for(vocabulary)} | {f"{symbol}</w>" for symbol in byte_symbols()}
    assert all(f"{word}</w>" in made for word in vocabulary)
    assert len(set(byte_symbols())) == 256
