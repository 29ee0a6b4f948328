"""Pools whose files say nothing of trigger words: which candidates a prompt calls, and what is made of the others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.candidates import CALLED, branches_for_reactions, called, reactions
from loratorio.compose.methods.base import Predictions
from loratorio.compose.mixes import Branch, Mix, Participants
from loratorio.prompt.roles import reactions_note
from loratorio.sampling.engine import Engine
from tests.published import paper

from .test_more_methods import SHAPE, FakeModel, bank, run


class Reacting(FakeModel):
    """Differs from the base by a LoRA's own pattern: under the prompt by `factors` more, in units of what the prompt does, than else."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = factors

    def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
        made = super().opinion((), cond, slot)
        prompt = (super().opinion((), True, slot) - super().opinion((), False, slot)).norm()
        for number, part in enumerate(mix):
            pattern = super().opinion((float(number),), True, 0)
            made = made + part * pattern / pattern.norm() * prompt * (2 + self.factors[number] * cond)
        return made


def asked(model: FakeModel) -> set[tuple[Mix, bool]]:
    """What was run since they were cleared, in however many calls."""
    return {(row.mix, row.cond) for call in model.asked for row in call}


FACTORS = (-0.3, 1.5, 0.3, 0.7)


@given(seed=st.integers(0, 2**31), owners=st.sampled_from([(0, 1), (0, 0, 1), (1, 0)]))
def test_reactions_are_what_the_formula_says(seed: int, owners: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(seed)
    participants = Participants.of(3, pooled=[0, 2])
    branches = branches_for_reactions(participants)
    made = {
        branch: torch.randn(len(owners) if branch.cond else 2, *SHAPE, generator=random).to(torch.float16)
        for branch in branches
    }
    found = reactions(Predictions(made, owners), participants)
    assert set(found) == {0, 2}
    base = participants.base
    for number, score in found.items():
        mix = participants.mixes[number]
        ratios = []
        for row, image in enumerate(owners):
            e0, u0 = made[Branch(base, True)][row].double(), made[Branch(base, False)][image].double()
            cond = (made[Branch(mix, True)][row].double() - e0).norm()
            uncond = (made[Branch(mix, False)][image].double() - u0).norm()
            ratios.append(float((cond - uncond) / (e0 - u0).norm()))
        assert float(score) == pytest.approx(sum(ratios) / len(ratios), rel=1e-4, abs=1e-5)


def test_a_lora_that_changes_nothing_is_not_called() -> None:
    participants = Participants.of(2, pooled=[0, 1])
    one = torch.randn(1, *SHAPE)
    made = {branch: one + branch.cond for branch in branches_for_reactions(participants)}
    assert [float(each) for each in reactions(Predictions(made, (0,)), participants).values()] == [0.0, 0.0]


def test_called_are_those_above_the_threshold_at_most_so_many() -> None:
    assert called([0.4, 3.0, CALLED, 2.0], 5) == [1, 2, 3]
    assert called([0.4, 3.0, CALLED, 2.0], 2) == [1, 3]
    assert called([-1.0, 0.2], 5) == []


@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reuse", [1, 3])
@pytest.mark.parametrize("method", ["loratorio", "divergence"])
def test_a_settled_pool_is_the_pool_of_those_that_are_called(
    recentre: float, reuse: int, method: str
) -> None:
    """From the first step on, and at the cost of LoRAs that are named."""
    knobs = {"method": method, "recentre": recentre, "reuse": reuse, "pool_size": 3}
    model, alone, named = Reacting(FACTORS), Reacting(FACTORS), Reacting(FACTORS)
    engine = Engine(paper(**knobs), bank(4), Participants.of(4, pooled=[0, 1, 2, 3]))
    two = Engine(paper(**knobs), bank(4), Participants.of(4, pooled=[0, 1, 2, 3]).without({0, 2}))
    three = Engine(paper(**knobs), bank(4), Participants.of(4).without({0, 2}))
    for index in range(20):
        made, wanted = run(engine, model, index), run(two, alone, index)
        plain = run(three, named, index)
        torch.testing.assert_close(made.cond, wanted.cond)
        torch.testing.assert_close(made.cond, plain.cond)
        assert made.uncond is not None
        torch.testing.assert_close(made.uncond, wanted.uncond)
        if index:
            assert asked(model) == asked(named)
        model.asked.clear()
        named.asked.clear()
    assert engine.pool.left_out == {0, 2}
    assert engine.pool.reactions is not None
    assert list(engine.pool.reactions) == [0, 1, 2, 3]
    assert engine.pool.reactions[1] == pytest.approx(1.5, rel=1e-3)
    assert set(engine.history.shares) == {1, 3}


def test_a_named_lora_is_no_candidate_and_shares_as_before() -> None:
    model, wanted = Reacting(FACTORS), Reacting(FACTORS)
    engine = Engine(paper(share=0.25), bank(4), Participants.of(4, pooled=[1, 2, 3]))
    other = Engine(paper(share=0.25), bank(4), Participants.of(4, pooled=[1, 3]).without({2}))
    for index in range(3):
        made, plain = run(engine, model, index), run(other, wanted, index)
        torch.testing.assert_close(made.cond, plain.cond)
    assert engine.pool.left_out == {2}
    assert 0 not in (engine.pool.reactions or {})


def test_where_none_is_called_all_stay() -> None:
    model = Reacting((-0.1, 0.0, 0.2))
    engine = Engine(paper(pool_interval=1), bank(3), Participants.of(3, pooled=[0, 1, 2]))
    run(engine, model)
    model.asked.clear()
    run(engine, model, 1)
    assert engine.pool.left_out == frozenset()
    assert len({mix for mix, _ in asked(model)}) == 4


def test_without_unconditional_rows_nothing_is_settled() -> None:
    engine = Engine(paper(), bank(3), Participants.of(3, pooled=[0, 1, 2]))
    run(engine, Reacting((3.0, 0.0, 0.0)), uncond=False)
    assert engine.pool.reactions is None
    assert engine.pool.left_out == frozenset()


def test_merged_steps_have_no_candidate_settled_or_not() -> None:
    model = Reacting(FACTORS)
    engine = Engine(paper(end=0.5), bank(4), Participants.of(4, pooled=[1, 2, 3]))
    for index in range(20):
        run(engine, model, index)
    assert {row.mix for row in model.asked[-1]} == {(1.0, 0.0, 0.0, 0.0)}
    assert engine.pool.left_out == {2}


def test_what_is_left_out_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[frozenset[int]] = []
    monkeypatch.setattr(Bank, "release", lambda self, numbers: gone.append(frozenset(numbers)))
    engine = Engine(
        paper(), Bank([Adapter(str(i), {}) for i in range(4)]), Participants.of(4, pooled=[0, 1, 2, 3])
    )
    run(engine, Reacting(FACTORS))
    assert gone == [frozenset({0, 2})]


def test_notes() -> None:
    names = ["a", "b", "c"]
    assert reactions_note(names, {0: 1.04, 1: 0.1, 2: -0.9}, {1, 2}) == (
        "Chosen from the pool, by how much more they change under the prompt than under the negative prompt (the prompt itself is 1): "
        "a (1.0). 2 others were not used."
    )
    assert ": a (3.0), c (2.0). 1 other was not used." in reactions_note(names, {0: 3.0, 1: 0.0, 2: 2.0}, {1})
    assert reactions_note(names, {0: 3.0, 2: 2.0}, set()).endswith(": a (3.0), c (2.0).")
    assert "calls no LoRA of the pool" in reactions_note(names, {0: 0.1, 1: 0.2}, set())
