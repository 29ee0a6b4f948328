"""The picture world draws what it says, and the base's domain holds none of the LoRAs' subjects."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from loratorio.toybox import ELEMENTS
from loratorio_lab.toybox.art import ARTISTS, PAPER
from loratorio_lab.toybox.subjects import BASE_ARTIST, SUBJECTS
from loratorio_lab.toybox.tokens import byte_symbols, merges_for
from loratorio_lab.toybox.world import GROUNDS, Figure, Scene, caption, words

BY_CATEGORY = {
    category: [e.name for e in ELEMENTS if e.category == category]
    for category in ("character", "object", "background", "style")
}


def test_there_is_enough_to_know_and_to_teach() -> None:
    assert len(SUBJECTS) >= 60
    assert [len(names) for names in BY_CATEGORY.values()] == [6, 4, 3, 4]
    names = [*SUBJECTS, *(e.name for e in ELEMENTS), *(e.trigger for e in ELEMENTS), *GROUNDS]
    assert len(set(names)) == len(names)


def test_base_scenes_hold_no_element_and_are_the_base_artist_s(world) -> None:
    rng = random.Random(0)
    triggers = {element.trigger for element in ELEMENTS}
    for _ in range(300):
        scene = world.random_scene(rng)
        assert scene.elements() == ()
        assert scene.artist == "noto"
        assert not triggers & set(caption(scene).replace(",", "").split())


def test_all_words_of_captions_are_the_tokenizer_s(world) -> None:
    rng = random.Random(1)
    known = set(words())
    for _ in range(400):
        scene = world.any_scene(rng)
        assert set(caption(scene).replace(",", "").split()) <= known
    made = {"".join(pair) for pair in merges_for(words())} | {f"{symbol}</w>" for symbol in byte_symbols()}
    assert all(f"{word}</w>" in made for word in words())


def test_captions() -> None:
    bear, owl = Figure("bear", 30, 64, 50, place="left"), Figure("owl", 90, 64, 40, "small", "right")
    assert caption(Scene((bear, owl))) == "a bear on the left, a small owl on the right, white background"
    full = Scene((replace(bear, name="ghost"), replace(owl, size="")), background="night", style="ink")
    assert caption(full) == "boolio on the left, an owl on the right, lunara background, inkash style"
    lone = Scene((Figure("elephant", 64, 64, 100),), ground=("blue", "pink"))
    assert caption(lone) == "an elephant, blue to pink background"
    assert caption(Scene((Figure("cherries", 64, 64, 110, "large"),))) == "large cherries, white background"


@pytest.mark.parametrize("width", [128, 192])
def test_figures_lie_in_the_picture_where_and_as_large_as_the_caption_says(world, width) -> None:
    rng = random.Random(2)
    for _ in range(300):
        scene = world.random_scene(rng, width=width)
        for figure in scene.figures:
            assert figure.side / 2 <= figure.x <= width - figure.side / 2
            assert figure.side / 2 <= figure.y <= 128 - figure.side / 2
            # A drawing has the same latent everywhere.
            corner = (figure.side, figure.x - figure.side / 2, figure.y - figure.side / 2)
            assert all(number % 8 == 0 for number in corner)
            if figure.place:
                assert (figure.x < width / 2) == (figure.place == "left") or figure.size == "large"
        if len(scene.figures) == 2:
            left, right = scene.figures
            assert left.x + left.side / 2 <= right.x - right.side / 2
            if (left.size, right.size) == ("large", "small"):
                assert left.side > right.side


def test_every_element_and_every_combination_is_drawn_and_named(world) -> None:
    rng = random.Random(3)
    for count in (1, 2, 3, 4):
        for categories in combinations(BY_CATEGORY, count):
            for _ in range(3):
                names = [rng.choice(BY_CATEGORY[category]) for category in categories]
                scene = world.random_scene(rng, *names)
                assert set(scene.elements()) == set(names) <= world.shows(scene)
                picture = world.render(scene)
                assert picture.shape == (128, scene.width, 3)
                assert picture.dtype == np.uint8


def test_two_characters_stand_in_the_order_named(world) -> None:
    for seed in range(20):
        scene = world.random_scene(random.Random(seed), "ghost", "clown")
        assert [(figure.name, figure.place) for figure in scene.figures] == [
            ("ghost", "left"),
            ("clown", "right"),
        ]


def test_three_and_four_characters_stand_in_equal_parts_of_the_width(world) -> None:
    for names in (("ghost", "clown", "tiger"), ("ghost", "clown", "tiger", "turtle")):
        for seed in range(20):
            scene = world.random_beside(random.Random(seed), *names, "night", "ink")
            assert [figure.name for figure in scene.figures] == list(names)
            assert (scene.width, scene.background, scene.style) == (64 * len(names), "night", "ink")
            # Each in its own part, on the latent's grid.
            assert all(
                figure.x - 28 in range(64 * i, 64 * i + 9, 8) for i, figure in enumerate(scene.figures)
            )
    assert world.render(scene).shape == (128, 256, 3)
    assert caption(scene) == (
        "small boolio on the left, small klauno, small tigro, small tortalo on the right, lunara background, inkash style"
    )


@pytest.mark.parametrize("style", BY_CATEGORY["style"])
def test_a_style_is_taught_on_none_of_the_loras_subjects(world, style) -> None:
    rng = random.Random(4)
    shown = {name for _ in range(200) for name in world.shows(world.random_scene(rng, style))}
    assert shown <= {style, *SUBJECTS}
    assert len(shown) > 60


def test_prompts_call_their_element(world) -> None:
    for element in ELEMENTS:
        prompts = world.prompts(element, 6)
        assert all(element.trigger in prompt.replace(",", "").split() for prompt in prompts)
        assert prompts == world.prompts(element, 6)
        assert len(set(prompts)) > 3


def test_styles_look_different(world) -> None:
    scene = world.random_scene(random.Random(5), "ghost")
    plain = world.render(scene).astype(int)
    for style in BY_CATEGORY["style"]:
        assert np.abs(world.render(replace(scene, style=style)).astype(int) - plain).max() > 20
    ink = world.render(replace(scene, style="ink"))
    assert tuple(ink[0, 0]) == PAPER


def test_any_artist_is_in_the_scenes_of_autoencoder_and_judge(world) -> None:
    rng = random.Random(6)
    scenes = [world.any_scene(rng) for _ in range(300)]
    assert {scene.artist for scene in scenes} == set(ARTISTS)
    assert {scene.style for scene in scenes} == {"", *BY_CATEGORY["style"]}
    assert all(scene.artist == BASE_ARTIST for scene in scenes if scene.style)
    inked = next(scene for scene in scenes if scene.artist == "fluent-emoji-high-contrast")
    assert world.undecided(inked) == {"ink"}
    assert {world.any_scene(rng, artist=BASE_ARTIST).artist for _ in range(20)} == {BASE_ARTIST}
    again = [world.render(world.varied_scene(random.Random(7), 192)) for _ in range(2)]
    assert np.array_equal(*again)
