"""Reuse against the formulas, slowly and in float64: which LoRAs are run when, and what the others are taken to predict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.methods.reuse import (
    DAMPING,
    FIRST,
    GROWTH,
    LATE,
    MANY,
    SHORT,
    TURN,
    UNCOND,
    UNCOND_APART,
    UncondResidual,
)
from loratorio.compose.mixes import Mix, Participants
from loratorio.compose.regions import Box, Place
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper

LEFT = Place((Box(0, 0, 0.5, 1),))


def bank(count: int) -> Bank:
    return Bank([Adapter(f"lora{i}", {}) for i in range(count)])


class Model:
    """Predicts, per mix and evaluation, something of its own; keeps what it was asked."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.shape, self.dtype, self.seed = shape, dtype, seed
        self.evaluation = 0
        self.asked: list[list[Row]] = []

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        self.asked[-1].extend(rows)
        return torch.stack([self.predicts(row.mix, row.cond, row.slot) for row in rows])

    def predicts(self, mix: Mix, cond: bool, slot: int) -> Tensor:
        random = torch.Generator().manual_seed(hash((mix, cond, slot, self.evaluation, self.seed)) % 2**31)
        return torch.randn(self.shape, generator=random).to(self.dtype)

    def begin(self, evaluation: int) -> None:
        self.evaluation = evaluation
        self.asked.append([])

    def run_at(self, evaluation: int, participants: Participants, cond: bool = True) -> list[int]:
        """Places of the LoRAs whose conditional, or unconditional, rows were run."""
        mixes = {row.mix for row in self.asked[evaluation] if row.cond == cond}
        return [place for place, mix in enumerate(participants.mixes) if mix in mixes]

    def base_uncond_was_run_at(self, evaluation: int, participants: Participants) -> bool:
        return any(row.mix == participants.base and not row.cond for row in self.asked[evaluation])


def latents(batch: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(seed))


def rms(tensor: Tensor) -> Tensor:
    return tensor.double().square().mean().sqrt()


def slowly(history: list[tuple[int, Tensor]], now: int) -> Tensor:
    """What a LoRA that was run at these evaluations, with these residuals, is taken to differ by: formula of the docs."""
    last_time, last = history[-1]
    if len(history) == 1:
        return last
    before_time, before = history[-2]
    onward = DAMPING * min(1.0, (now - last_time) / (last_time - before_time))
    return last + onward * (last - before)


def along(uncond: Tensor, cond: Tensor) -> Tensor:
    """How much of one residual lies along the other, by picture, from 0 to 1: (B, 1, 1, 1)."""
    parts = []
    for own, other in zip(uncond, cond, strict=True):
        dot, square = float((own * other).sum()), float((other * other).sum())
        parts.append(min(1.0, max(0.0, dot / square)) if square else 0.0)
    return torch.tensor(parts, dtype=torch.float64).reshape(-1, 1, 1, 1)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 5),
    every_nth=st.integers(2, 6),
    recentre=st.sampled_from([0.0, 0.4, 1.0]),
    denoised=st.booleans(),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.3]),
    sigmas=st.sampled_from([None, (14.6, 0.9), (2.0, 0.03)]),
)
def test_what_is_composed_is_the_formula(
    count: int,
    every_nth: int,
    recentre: float,
    denoised: bool,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    share: float,
    sigmas: tuple[float, float] | None,
) -> None:
    """Every evaluation equals one in which all rows are run and those out of turn predict what the formula says."""
    shape, total = (4, *size), 16
    knobs = paper(reuse=every_nth, recentre=recentre, share=share)
    engine, model = Engine(knobs, bank(count)), Model(shape, dtype)
    participants = engine.participants.with_shared_parts(share)
    base, reference = participants.base, participants.reference
    conds: dict[int, list[tuple[int, Tensor]]] = {}
    unconds: dict[int, tuple[Tensor, Tensor]] = {}
    guidance: list[tuple[int, Tensor]] = []
    for index in range(total):
        model.begin(index)
        z = latents(batch, shape, index)
        # Falling by equal factors from the first to the second.
        sigma = None if sigmas is None else sigmas[0] * (sigmas[1] / sigmas[0]) ** (index / (total - 1))
        found = engine.step(Step(index, total, z, batch, denoised=denoised, sigma=sigma), model)

        def now(mix: Mix, cond: bool) -> Tensor:
            return torch.stack([model.predicts(mix, cond, slot) for slot in range(batch)]).double()

        noise = z.double() - now(reference, True) if denoised else now(reference, True)
        unit = rms(noise)
        if denoised or sigma is not None:
            unit = unit / math.sqrt(1 + (float(rms(noise)) if denoised else float(sigma or 0)) ** 2 / TURN**2)
        base_uncond = now(base, False)
        if model.base_uncond_was_run_at(index, participants):
            guidance.append((index, (base_uncond - now(reference, True)) / unit))
        else:
            base_uncond = now(reference, True) + unit * slowly(guidance, index)
        answers: dict[tuple[Mix, bool], Tensor] = {
            (base, False): base_uncond,
            (reference, True): now(reference, True),
        }
        run = model.run_at(index, participants)
        run_uncond = model.run_at(index, participants, cond=False)
        for place, mix in enumerate(participants.mixes):
            if place in run:
                conds.setdefault(place, []).append((index, (now(mix, True) - now(reference, True)) / unit))
            residual = slowly(conds[place], index) if place not in run else conds[place][-1][1]
            if place in run_uncond:
                unconds[place] = (now(mix, False) - base_uncond) / unit, residual
            answers[mix, True] = now(reference, True) + unit * residual
            if place in unconds:  # with λ = 1 none of them is run
                uncond, beside = unconds[place]
                uncond = uncond + DAMPING * along(uncond, beside) * (residual - beside)
                answers[mix, False] = base_uncond + unit * uncond

        def full(rows: Sequence[Row], answers: dict[tuple[Mix, bool], Tensor] = answers) -> Tensor:
            return torch.stack([answers[row.mix, row.cond][row.slot] for row in rows]).float()

        plain = Engine(paper(recentre=recentre, share=share), bank(count))
        wanted = plain.step(Step(index, total, z, batch, denoised=denoised), full)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-2, atol=20 * tolerance)
        torch.testing.assert_close(found.cond, wanted.cond, rtol=1e-2, atol=20 * tolerance)
        torch.testing.assert_close(found.uncond, wanted.uncond, rtol=1e-2, atol=20 * tolerance)


@pytest.mark.parametrize("count", [2, 3, 5, 7, 12])
@pytest.mark.parametrize("every_nth", [2, 3, 4, 10])
def test_turns(count: int, every_nth: int) -> None:
    """All at first; then neighbours in turn, three of them in n evaluations, a few more where there are more; at the end faster."""
    total = 60
    engine, model = Engine(paper(reuse=every_nth, recentre=1.0), bank(count)), Model((4, 4, 4))
    for index in range(total):
        model.begin(index)
        engine.step(Step(index, total, latents(1, (4, 4, 4)), 1, denoised=False), model)
    runs = [model.run_at(index, engine.participants) for index in range(total)]
    assert runs[0] == list(range(count))
    late = math.ceil(LATE * total)
    rate = min(count, MANY) / every_nth * max(1, count / MANY) ** GROWTH
    assert all(math.floor(rate) <= len(run) <= math.ceil(rate) for run in runs[1:late])
    assert sum(map(len, runs[1:late])) == math.ceil(rate * (late - 1) - 1e-6)
    for place in range(count):
        ran = [index for index, run in enumerate(runs[:late]) if place in run]
        assert all(
            later - earlier <= math.ceil(count / rate) + 1 for earlier, later in itertools.pairwise(ran)
        )
    for first in range(late, total - 1):
        assert {*runs[first], *runs[first + 1]} == {*range(count)}
    # The base is run at every evaluation; of unconditional rows only the base's, at every n-th.
    for index, asked in enumerate(model.asked):
        apart = min(every_nth, UNCOND_APART)
        is_run = index < FIRST or index >= late or index % apart == 0
        assert [row.mix for row in asked if not row.cond] == [engine.participants.base] * is_run
        assert engine.participants.base in {row.mix for row in asked if row.cond}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("every_nth", [2, 3])
def test_a_loras_unconditional_rows_are_run_with_the_bases_once_for_two_of_its_runs(
    count: int, every_nth: int
) -> None:
    total = 60
    engine, model = Engine(paper(reuse=every_nth), bank(count)), Model((4, 4, 4))
    for index in range(total):
        model.begin(index)
        engine.step(Step(index, total, latents(1, (4, 4, 4)), 1, denoised=False), model)
    for place in range(count):
        runs = [index for index in range(total) if place in model.run_at(index, engine.participants)]
        unconds = [
            index for index in range(total) if place in model.run_at(index, engine.participants, cond=False)
        ]
        assert unconds[0] == 0
        assert all(model.base_uncond_was_run_at(index, engine.participants) for index in unconds)
        between = [
            sum(earlier < run <= later for run in runs) for earlier, later in itertools.pairwise(unconds)
        ]
        # The first time every second LoRA's come sooner, and some wait for the base's.
        assert between[0] in (UNCOND - 1 + place % 2, UNCOND + place % 2)
        assert set(between[1:]) <= {UNCOND, UNCOND + 1}


def test_what_is_kept_of_and_prompts_is_not_taken_to_follow() -> None:
    """With AND there are more conditional rows than unconditional ones, which then stay as they were."""
    uncond, cond = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 3, 3)
    kept = UncondResidual.of(uncond, cond)
    assert torch.equal(kept.now(torch.randn(2, 4, 3, 3)), uncond)


@pytest.mark.parametrize(("total", "every_nth"), [(SHORT, 4), (4, 2), (30, 1)])
def test_short_schedules_and_a_reuse_of_one_run_everything(total: int, every_nth: int) -> None:
    model = Model((4, 4, 4))
    engine, plain = Engine(paper(reuse=every_nth), bank(3)), Engine(paper(reuse=1), bank(3))
    for index in range(total):
        model.begin(index)
        step = Step(index, total, latents(1, (4, 4, 4)), 1, denoised=False)
        own = engine.step(step, model)
        assert model.run_at(index, engine.participants) == [0, 1, 2]
        assert torch.equal(own.cond, plain.step(step, model).cond)


def test_a_sampler_with_two_evaluations_a_step_takes_turns_by_evaluation() -> None:
    engine, model = Engine(paper(reuse=2, recentre=1.0), bank(2)), Model((4, 4, 4))
    for evaluation in range(20):
        model.begin(evaluation)
        engine.step(Step(evaluation // 2, 12, latents(1, (4, 4, 4)), 1), model)
    runs = [model.run_at(evaluation, engine.participants) for evaluation in range(20)]
    assert runs[0] == [0, 1]
    assert runs[1:] == [[0], [1]] * 9 + [[0]]


def test_a_sampler_that_goes_on_at_its_last_step_never_forgets_a_lora() -> None:
    """Adaptive samplers evaluate more often than they have steps: the step's number then stands still."""
    engine, model = Engine(paper(reuse=4, recentre=1.0), bank(3)), Model((4, 4, 4))
    for evaluation in range(30):
        model.begin(evaluation)
        engine.step(Step(min(evaluation, 11), 12, latents(1, (4, 4, 4)), 1), model)
    for first in range(15, 28):
        ran = model.run_at(first, engine.participants) + model.run_at(first + 1, engine.participants)
        assert sorted(ran) == [0, 1, 2]


def test_another_size_another_number_of_rows_and_rows_that_were_not_run_begin_anew() -> None:
    engine, model = Engine(paper(reuse=4, recentre=0.5), bank(3)), Model((4, 4, 4))

    def asked(evaluation: int, batch: int, side: int, uncond: bool) -> list[int]:
        model.shape = (4, side, side)
        model.begin(evaluation)
        step = Step(1 + evaluation, 40, latents(batch, model.shape), batch if uncond else 0)
        composed = engine.step(step, model)
        assert (composed.uncond is not None) == uncond
        return model.run_at(evaluation, engine.participants)

    everyone = [0, 1, 2]
    assert asked(0, 1, 4, True) == everyone
    assert asked(1, 1, 4, True) != everyone
    assert asked(2, 2, 4, True) == everyone  # two pictures
    assert asked(3, 2, 4, True) != everyone
    assert asked(4, 2, 6, True) == everyone  # larger ones
    assert asked(5, 2, 6, False) == everyone  # steps without guidance
    assert asked(6, 2, 6, False) != everyone
    assert asked(7, 2, 6, True) == everyone  # their unconditional rows were never run


def test_another_model_begins_anew() -> None:
    engine, model = Engine(paper(reuse=4), bank(3)), Model((4, 4, 4))
    for evaluation in range(3):
        model.begin(evaluation)
        engine.step(Step(evaluation, 40, latents(1, (4, 4, 4)), 1), model)
    engine.rebind(bank(3))
    model.begin(3)
    engine.step(Step(3, 40, latents(1, (4, 4, 4)), 1), model)
    assert [len(model.run_at(evaluation, engine.participants)) for evaluation in range(4)] == [3, 1, 1, 3]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_places", [True, False])
@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
def test_styles_places_and_shared_parts_are_composed_too(
    share: float, with_places: bool, recentre: float
) -> None:
    """Where each LoRA keeps its distance from the base, a picture with reuse is the one without."""

    class Steady(Model):
        def predicts(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            own = torch.randn(5, 2, *self.shape, generator=torch.Generator().manual_seed(3))
            noise = own[4, int(cond)] + 0.3 * sum(part * own[i, int(cond)] for i, part in enumerate(mix))
            return noise * 0.9**self.evaluation

    model = Steady((4, 4, 6))
    participants = Participants.of(4, styles=[3], places={0: LEFT} if with_places else {})
    knobs = paper(reuse=3, share=share, recentre=recentre)
    engine = Engine(knobs, bank(4), participants)
    plain = Engine(knobs.with_values({"reuse": 1}), bank(4), participants)
    for index in range(20):
        model.begin(index)
        step = Step(index, 20, latents(1, model.shape, index), 1, denoised=False)
        own = engine.step(step, model)
        rows = len(model.asked[-1])
        wanted = plain.step(step, model)
        torch.testing.assert_close(own.cond, wanted.cond, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.uncond, wanted.uncond, rtol=1e-3, atol=1e-4)
        if index and share < 1:
            assert rows < len(model.asked[-1]) - rows


@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
def test_one_lora_is_run_at_every_step(recentre: float) -> None:
    """Its unconditional rows at some, except where it is all that there is: then the picture is the host's own."""
    engine, model = Engine(paper(reuse=3, recentre=recentre), bank(1)), Model((4, 4, 4))
    asked = []
    for index in range(20):
        model.begin(index)
        engine.step(Step(index, 20, latents(1, (4, 4, 4)), 1), model)
        assert sum(row.cond for row in model.asked[-1]) == 1
        asked.append(len(model.asked[-1]))
    full = {0.0: 2, 0.5: 3, 1.0: 2}[recentre]
    uncond_runs = [
        index for index in range(20) if index < FIRST or index >= LATE * 20 or index % UNCOND_APART == 0
    ]
    assert asked == [full if recentre == 0 or index in uncond_runs else 1 for index in range(20)]


@pytest.mark.parametrize("total", [4, 16])
@pytest.mark.parametrize("reuse", [1, 3])
@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
def test_a_pool_of_one_is_that_lora(total: int, reuse: int, recentre: float) -> None:
    """Whatever the prompt calls of a pool: one candidate alone is run at every step, as one LoRA that is named."""
    shape = (4, 6, 6)
    knobs = paper(method="relative", reuse=reuse, recentre=recentre, pool_size=1)
    pooled = Participants.of(1, pooled=[0])
    (engine, model), (named, other) = (
        (Engine(knobs, bank(1), each), Model(shape)) for each in (pooled, Participants.of(1))
    )
    for index in range(total):
        model.begin(index)
        other.begin(index)
        step = Step(index, total, latents(2, shape, index), 2)
        found = engine.step(step, model)
        assert model.run_at(index, engine.participants) == [0]
        torch.testing.assert_close(found.cond, named.step(step, other).cond)


@pytest.mark.parametrize("total", [4, SHORT])
def test_short_schedules_run_unconditional_rows_at_every_other_evaluation(total: int) -> None:
    engine, model = Engine(paper(reuse=3, recentre=1.0), bank(3)), Model((4, 4, 4))
    for index in range(total):
        model.begin(index)
        engine.step(Step(index, total, latents(1, (4, 4, 4)), 1), model)
        assert model.run_at(index, engine.participants) == [0, 1, 2]
    ran = [model.base_uncond_was_run_at(index, engine.participants) for index in range(total)]
    assert ran == [index < FIRST or index >= LATE * total or index % 2 == 0 for index in range(total)]


def test_rows_that_are_run_again_have_their_unconditional_ones_from_then_on() -> None:
    """As guidance does that runs the model again: what it does to the unconditional prediction must act."""
    engine, model = Engine(paper(reuse=3), bank(3)), Model((4, 4, 4))
    for index in range(12):
        model.begin(index)
        step = Step(index, 40, latents(1, (4, 4, 4), index), 1, denoised=False)
        first = engine.step(step, model)
        assert model.base_uncond_was_run_at(index, engine.participants)
        unchanged = engine.again(model, cond=True, uncond=True)
        torch.testing.assert_close(unchanged.cond, first.cond)
        torch.testing.assert_close(unchanged.uncond, first.uncond)
        only_cond = engine.again(lambda rows: model(rows) + 1, cond=True, uncond=False)
        torch.testing.assert_close(only_cond.cond, first.cond + 1, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(only_cond.uncond, first.uncond)


def test_with_and_prompts_the_unconditional_prediction_is_carried_by_picture() -> None:
    """Two conditional rows of one picture: between its runs the unconditional one moves with their mean."""

    class Steady(Model):
        def predicts(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            own = torch.randn(3, *self.shape, generator=torch.Generator().manual_seed(5))
            noise = own[slot] if cond else own[:2].mean(dim=0) + own[2]
            return (noise + 0.1 * sum(mix) * own[2]) * 0.9**self.evaluation

    model = Steady((4, 4, 4))
    knobs = paper(reuse=3, recentre=1.0)
    engine, plain = Engine(knobs, bank(2)), Engine(knobs.with_values({"reuse": 1}), bank(2))
    for index in range(12):
        model.begin(index)
        step = Step(index, 40, latents(2, model.shape, index), 1, owners=(0, 0), denoised=False)
        found = engine.step(step, model)
        model.begin(index)
        wanted = plain.step(step, model)
        torch.testing.assert_close(found.uncond, wanted.uncond, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.cond, wanted.cond, rtol=1e-3, atol=1e-4)
