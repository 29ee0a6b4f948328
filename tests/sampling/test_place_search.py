"""Places that are found while sampling: what is run until then, and whose place is where afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import Participants
from loratorio.compose.regions import WHOLE, Box, Place
from loratorio.errors import LoratorioError
from loratorio.prompt.places import wishes
from loratorio.prompt.roles import TaggedLora, lone_place_note, not_found_note, participants_of
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Composition, Engine
from loratorio.sampling.step import Step
from loratorio.settings import Settings

HEIGHT, WIDTH, TOTAL = 8, 24, 20
AUTO = {"at": "auto"}


def pair(*options: dict[str, str], prompt: str = "") -> Participants:
    return participants_of([TaggedLora(name, each) for name, each in zip("abc", options)], prompt=prompt)  # noqa: B905


class Model:
    """LoRAs draw figures at columns that differ from picture to picture; LoRA i most the i-th one."""

    def __init__(self, columns: Sequence[Sequence[float]] = ((6, 17), (4, 13), (8, 20))) -> None:
        self.columns = columns
        self.asked: list[list[Row]] = []

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        self.asked.append(list(rows))
        return torch.stack([self.predicted(row) for row in rows])

    def predicted(self, row: Row) -> Tensor:
        made = torch.randn(4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
        change = torch.randn(4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))
        x = torch.arange(WIDTH)
        for number, part in enumerate(row.mix):
            for place, column in enumerate(self.columns[row.slot % len(self.columns)]):
                strong = 1.0 if place == number else 0.7
                made = made + part * strong * torch.exp(-(((x - column) / 2) ** 2)) * change
        return made if row.cond else made / 2

    def mixes(self, call: int) -> set[tuple[float, ...]]:
        return {row.mix for row in self.asked[call]}


def engine(participants: Participants, **more: object) -> Engine:
    knobs = {name: more.pop(name) for name in ("method", "find_after", "share", "reuse") if name in more}
    settings = Settings(enabled=True, **knobs)  # type: ignore[arg-type]
    bank = Bank([Adapter(str(i), {}) for i in range(len(participants.base))])
    return Engine(settings, bank, participants, **more)  # type: ignore[arg-type]


def run(
    made: Engine,
    model: Model,
    steps: int = 8,
    pictures: int = 1,
    start: int = 0,
    total: int = TOTAL,
    **more: object,
) -> list[Composition]:
    latents = torch.zeros(pictures, 4, HEIGHT, WIDTH)
    return [
        made.step(replace(Step(index, total, latents, pictures, denoised=False), **more), model)  # type: ignore[arg-type]
        for index in range(start, start + steps)
    ]


def test_until_places_are_found_all_run_everywhere_and_then_each_in_its_own() -> None:
    made, model = engine(pair(AUTO, AUTO), find_after=3), Model()
    done = run(made, model)
    for index in range(3):
        assert {(1.0, 0.0), (0.0, 1.0)} <= model.mixes(index)  # Reuse leaves none out
        assert done[index].weights is not None
        assert float(done[index].weights.amin(dim=(-1, -2)).min()) >= 0
        assert (done[index].weights[0, 0, :, 0] > 0).any() or (done[index].weights[1, 0, :, 0] > 0).any()
    assert any(not {(1.0, 0.0), (0.0, 1.0)} <= model.mixes(index) for index in range(4, 8))
    ((first, second),) = [(found[0], found[1]) for found in made.places.found or ()]
    line = first.boxes[0].x1
    assert line == pytest.approx(12 / WIDTH, abs=0.02)
    assert second.boxes[0] == Box(line, 0, 1, 1)
    weights = done[5].weights
    assert weights is not None
    assert (weights[0, 0, :, :10] == 1).all()
    assert (weights[0, 0, :, 14:] == 0).all()


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.takes_places])
def test_every_method_with_places_finds_them(method: str) -> None:
    made = engine(pair(AUTO, AUTO), method=method)
    run(made, Model(), steps=5)
    assert [sorted(found) for found in made.places.found or ()] == [[0, 1]]


def test_a_batchs_pictures_are_those_of_single_ones() -> None:
    together = engine(pair(AUTO, AUTO, {}))
    done = run(together, Model(), pictures=3)
    lines = [found[0].boxes[0].x1 for found in together.places.found or ()]
    assert len(set(lines)) == 3
    for number, columns in enumerate(Model().columns):
        alone = engine(pair(AUTO, AUTO, {}))
        single = run(alone, Model([columns]))
        assert (alone.places.found or ())[0][0].boxes[0].x1 == pytest.approx(lines[number], abs=1e-3)
        for one, other in zip(done, single, strict=True):
            torch.testing.assert_close(one.cond[number], other.cond[0], atol=0.02, rtol=0)
            assert one.uncond is not None
            assert other.uncond is not None
            torch.testing.assert_close(one.uncond[number], other.uncond[0], atol=0.02, rtol=0)


def test_rows_of_and_and_frames_have_their_pictures_place() -> None:
    made = engine(pair(AUTO, AUTO))
    latents = torch.zeros(4, 4, 2, HEIGHT, WIDTH)
    model = Model()

    def predict(rows: Sequence[Row]) -> Tensor:
        own = [row._replace(slot=row.slot // 2 if row.cond else row.slot) for row in rows]
        return torch.stack([model.predicted(row) for row in own])[:, :, None].expand(-1, -1, 2, -1, -1)

    for index in range(6):
        done = made.step(Step(index, TOTAL, latents, 2, owners=(0, 0, 1, 1), denoised=False), predict)
    assert len(made.places.found or ()) == 2
    lines = [found[0].boxes[0].x1 for found in made.places.found or ()]
    assert lines == [pytest.approx(12 / WIDTH, abs=0.02), pytest.approx(9 / WIDTH, abs=0.02)]
    assert done.cond.shape == latents.shape
    assert done.weights is not None
    for row, line in enumerate([lines[0]] * 4 + [lines[1]] * 4):  # row by row, two frames each
        column = round(line * WIDTH)
        assert (done.weights[0, row, :, : column - 2] == 1).all()
        assert (done.weights[0, row, :, column + 2 :] == 0).all()


def test_a_later_pass_goes_on_with_the_places_and_seeks_none() -> None:
    first = engine(pair(AUTO, AUTO))
    run(first, Model())
    second, model = engine(pair(AUTO, AUTO), found=first.places.found), Model()
    done = run(second, model, steps=1)
    assert second.places.found == first.places.found
    assert done[0].weights is not None
    assert (done[0].weights[0, 0, :, :10] == 1).all()


@pytest.mark.parametrize(("total", "after"), [(20, 4), (15, 3), (8, 2), (5, 1), (4, 1), (2, 1)])
def test_few_steps_are_searched_for_a_quarter_of_them(total: int, after: int) -> None:
    made = engine(pair(AUTO, AUTO), find_after=4)
    run(made, Model(), steps=after, total=total)
    assert made.places.is_on
    run(made, Model(), steps=1, start=after, total=total)
    assert not made.places.is_on
    only = engine(pair(AUTO, AUTO))
    run(only, Model(), steps=1, total=1)
    assert "too few steps" in not_found_note(["a", "b"], only.places.named(["a", "b"]), 1)


def test_a_lora_that_acts_later_is_waited_for() -> None:
    made = engine(pair(AUTO, AUTO), find_after=2)
    run(made, Model(), steps=4, absent=frozenset({1}))
    assert made.places.is_on
    run(made, Model(), steps=3, start=4)
    assert not made.places.is_on


def test_evaluations_of_one_step_count_once() -> None:
    made = engine(pair(AUTO, AUTO), find_after=2)
    for _ in range(3):
        run(made, Model(), steps=1)
    assert made.places.is_on
    run(made, Model(), steps=1, start=1)
    run(made, Model(), steps=1, start=2)
    assert not made.places.is_on


def test_what_an_inpainting_mask_keeps_does_not_count() -> None:
    painted = torch.zeros(HEIGHT, WIDTH)
    painted[:, 12:] = 1
    made = engine(pair(AUTO, AUTO))
    run(made, Model([(4, 14, 21)]), steps=5, painted=painted)
    (found,) = made.places.found or ()
    assert found[0].boxes[0].x1 == pytest.approx(18 / WIDTH, abs=0.03)


def test_found_places_keep_out_of_drawn_ones() -> None:
    participants = pair(AUTO, {"at": "right"}, AUTO)
    assert participants.loras[0].place == Place((Box(0, 0, 0.5, 1),), 0.1, sought=True)
    made, model = engine(participants), Model([(3, 18, 9)])
    done = run(made, model)
    (found,) = made.places.found or ()
    assert [place.boxes[0].x1 for place in found.values()] == [pytest.approx(6.5 / WIDTH, abs=0.03), 0.5]
    assert done[0].weights is not None
    assert (done[0].weights[1, 0, :, 15:] == 1).all()  # from the first step on
    rest = pair(AUTO, {"at": "right"})
    assert rest.loras[0].place == Place((Box(0, 0, 0.5, 1),), 0.1)  # nothing to find


def test_one_figure_is_said_and_composed_without_places() -> None:
    made = engine(pair(AUTO, AUTO))
    done = run(made, Model([(12, 12)]))
    assert made.places.found == ({},)
    assert done[6].weights is not None
    assert float(done[6].weights.min()) > 0
    note = not_found_note(["alice", "bob"], made.places.named(["alice", "bob"]), 1)
    assert note.startswith(
        "One figure was found for alice and bob, so none has a place there. Write two people"
    )
    assert "in picture 2," in not_found_note(["a", "b"], [[1], []], 2)
    assert "Fewer than 3 figures were found for a, b and c" in not_found_note(["a", "b", "c"], [[]], 1)
    assert not_found_note(["a", "b"], [[1], [1]], 2) == not_found_note([], [], 1) == ""


def test_what_cannot_be_sought_is_a_sentence() -> None:
    for options, why in (
        ([AUTO, {**AUTO, "role": "style"}], "with role=style, as b is"),
        ([AUTO, {**AUTO, "role": "always"}], "with role=always"),
        ([AUTO, {**AUTO, "pool": "1"}], "of a pool"),
        ([AUTO, {"at": "left"}, {"at": "right"}], "leave nothing of the picture to a"),
    ):
        with pytest.raises(LoratorioError, match=why):
            pair(*options)
    with pytest.raises(LoratorioError, match="up to 8 LoRAs, not of 9"):
        participants_of([TaggedLora(str(i), AUTO) for i in range(9)])
    alone = [TaggedLora("a", AUTO), TaggedLora("b")]
    assert not participants_of(alone).has_places
    assert lone_place_note(alone).startswith("at=auto of LoRA a has no effect")
    assert lone_place_note([*alone, TaggedLora("c", {"at": "left"})]) == ""
    assert pair(AUTO, AUTO).loras[0].place == Place((WHOLE,), 0.1, sought=True)


@pytest.mark.parametrize(
    ("prompt", "own", "asked"),
    [
        ("alice on the left, bob on the right", ["", ""], [(0, 0.5), (1, 0.5)]),
        ("Alice to the right of bob", ["", ""], [(1, 0.5), None]),
        ("on the right alice and bob in the middle", ["", ""], [(1, 0.5), (0.5, 0.5)]),
        ("top left alice; bob at the bottom", ["", ""], [(0, 0), (0.5, 1)]),
        ("alice on the left, bob on the Far Left", ["", ""], [(0, 0.5), (-0.5, 0.5)]),
        ("far right alice, bob at the bottom far left", ["", ""], [(1.5, 0.5), (-0.5, 1)]),
        ("alice and bob, left-handed people", ["", ""], [None, None]),
        ("malice left, copyright bob", ["", ""], [None, None]),
        ("two friends", ["alice at the right", ""], [(1, 0.5), None]),
        ("", ["", ""], [None, None]),
    ],
)
def test_words_of_position(prompt: str, own: list[str], asked: list[tuple[float, float] | None]) -> None:
    assert wishes(prompt, [["alice"], ["bob"]], own) == asked
