"""Styles that are found at the first step: who they are, and how they act from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import STYLE_SHARE, Participants
from loratorio.prompt.roles import TaggedLora, participants_of, style_note
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Composition, Engine
from loratorio.sampling.step import Step
from loratorio.settings import Settings

SIZE, TOTAL = 16, 20
Mixes = set[tuple[float, ...]]


def named(*options: dict[str, str]) -> Participants:
    return participants_of([TaggedLora(name, each) for name, each in zip("abcd", options)])  # noqa: B905


class Model:
    """LoRAs 0 and 2 draw a figure each, LoRA 1 changes the whole picture, in the same way everywhere."""

    def __init__(self) -> None:
        self.asked: list[Sequence[Row]] = []

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        self.asked.append(rows)
        return torch.stack([self.predicted(row) for row in rows])

    def predicted(self, row: Row) -> Tensor:
        x = torch.arange(float(SIZE))
        change = torch.ones(4, SIZE, SIZE)
        made = torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).sign()
        for number, column in ((0, 4.0), (2, 11.0)):
            figure = torch.exp(-((x - column) ** 2 + (x[:, None] - 8) ** 2) / 4)
            made = made + (row.mix[number] if number < len(row.mix) else 0.0) * figure * change.flip(0)
        everywhere = made.roll(1, 0) * 0.3
        return (made + row.mix[1] * everywhere) * (1.0 if row.cond else 0.5)

    def conds(self, call: int) -> Mixes:
        return {row.mix for row in self.asked[call] if row.cond}


def engine(participants: Participants, styles: frozenset[int] | None = None, **knobs: object) -> Engine:
    settings = Settings.from_mapping({"enabled": True, "share": 0.0, **knobs})
    bank = Bank([Adapter(str(i), {}) for i in range(len(participants.base))])
    return Engine(settings, bank, participants, styles=styles)


def run(made: Engine, model: Model, steps: int = 3, **more: object) -> list[Composition]:
    latents = torch.zeros(2, 4, SIZE, SIZE)
    step = replace(Step(0, TOTAL, latents, 2, denoised=False), **more)  # type: ignore[arg-type]
    return [made.step(replace(step, index=index), model) for index in range(steps)]


def test_from_the_second_step_on_it_acts_as_with_its_role() -> None:
    made, model = engine(named({}, {}, {})), Model()
    done = run(made, model)
    assert made.styles.found == {1}
    assert model.conds(0) == {(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)}
    own = {(0, STYLE_SHARE, 0), (1, STYLE_SHARE, 0), (0, STYLE_SHARE, 1)}
    assert model.conds(1) == own
    told, other = engine(named({}, {"role": "style"}, {})), Model()
    wanted = run(told, other)
    assert other.conds(0) == own
    assert told.styles.found == frozenset()  # its tag says it
    # What is reused after the first step is the only difference.
    torch.testing.assert_close(done[1].cond, wanted[1].cond)
    torch.testing.assert_close(done[1].uncond, wanted[1].uncond)
    assert done[1].weights is not None
    assert (done[1].weights[1] == 1).all()


def test_the_weight_history_knows_the_styles() -> None:
    for options in ({}, {"role": "style"}):
        made = engine(named({}, options, {}), weight_maps=True)
        run(made, Model())
        assert made.history.styles == {1}
        assert all((weights[1] == 1).all() for weights in made.history.weights[1:])
    plain = engine(named({}, {}, {}), weight_maps=True, find_styles=False)
    run(plain, Model())
    assert not plain.history.styles


def test_the_first_step_is_composed_as_without_styles() -> None:
    (first, *_), (plain, *_) = (run(engine(named({}, {}), find_styles=on), Model()) for on in (True, False))
    torch.testing.assert_close(first.cond, plain.cond)
    torch.testing.assert_close(first.uncond, plain.uncond)


@pytest.mark.parametrize(
    "options",
    [({}, {"role": "content"}), ({}, {"at": "left"}), ({}, {"words": "b"}), ({}, {"pool": "1"}), ({},)],
)
def test_what_is_never_taken_for_a_style(options: Sequence[dict[str, str]]) -> None:
    made, model = engine(named(*options)), Model()
    run(made, model) if len(options) > 1 else None
    assert not made.styles.found


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_roles_of_styles_look_for_none(method: str) -> None:
    made, model = engine(named({}, {}, {}), method=method), Model()
    run(made, model)
    # The published method does so only where it is told to.
    able, asked = "find_styles" in METHODS[method].knobs, method != "loratorio"
    assert made.styles.found == (None if not able and asked else frozenset({1} if able and asked else ()))
    off = engine(named({}, {}, {}), method=method, find_styles=False)
    run(off, Model())
    assert off.styles.found == frozenset()


def test_a_later_pass_goes_on_with_them() -> None:
    made, model = engine(named({}, {}, {}), styles=frozenset({1})), Model()
    run(made, model, steps=1)
    assert model.conds(0) == {(0, STYLE_SHARE, 0), (1, STYLE_SHARE, 0), (0, STYLE_SHARE, 1)}


def test_a_lora_that_acts_later_is_weighted_until_there_is_another() -> None:
    made, model = engine(named({}, {})), Model()
    run(made, model, absent=frozenset({0}))
    assert made.styles.found is None
    run(made, model)
    assert made.styles.found == {1}


def test_few_steps_and_no_guidance() -> None:
    made, model = engine(named({}, {})), Model()
    latents = torch.zeros(1, 4, SIZE, SIZE)
    for index in range(2):
        made.step(Step(index, 2, latents, 0, denoised=False), model)
    assert made.styles.found == {1}
    assert model.conds(1) == {(1, STYLE_SHARE)}


def test_all_rows_that_may_come_are_known_before() -> None:
    made, model = engine(named({}, {}, {}), share=0.15), Model()
    ahead = set(made.branches_ahead(TOTAL, True))
    run(made, model, steps=TOTAL)
    assert {(row.mix, row.cond) for rows in model.asked for row in rows} <= ahead


def test_it_is_said() -> None:
    assert style_note([]) == ""
    assert style_note(["ink"]) == (
        "ink changes the whole picture evenly, and acts as a style, in all passes. To compose it instead, write "
        "role=content into the tag."
    )
    assert "ink, neon change the whole picture evenly, and act as styles" in style_note(["ink", "neon"])
