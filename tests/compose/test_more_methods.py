"""The methods beside LoRAtorio, Merge, Composite and Switch: rows, exact cases, what they remember, pools and styles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, LowRank
from loratorio.compose.importance import importance, without_words
from loratorio.compose.methods import METHODS, Composition, StepContext
from loratorio.compose.methods.cmlora import dominance, refresh_steps
from loratorio.compose.methods.frequency import join_bands, split_bands
from loratorio.compose.methods.klora import scores
from loratorio.compose.methods.reuse import TURN
from loratorio.compose.mixes import STYLE_SHARE as STYLE
from loratorio.compose.mixes import Mix, Participants
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper

SHAPE = (4, 6, 5)


class FakeModel:
    """Predicts, per mix and step, a fixed random tensor, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Row]] = []
        self.index = 0

    def predict(self, rows: Sequence[Row]) -> Tensor:
        self.asked.append(list(rows))
        return torch.stack([self.opinion(row.mix, row.cond, row.slot) for row in rows])

    def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
        seed = hash((tuple(mix), cond, slot, self.index)) % 2**31
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def bank(count: int) -> Bank:
    return Bank([Adapter(f"lora{i}", {}) for i in range(count)])


def run(
    engine: Engine, model: FakeModel, index: int = 0, total: int = 20, batch: int = 2, uncond: bool = True
) -> Composition:
    model.index = index
    latents = torch.zeros(batch, *SHAPE)
    return engine.step(Step(index, total, latents, batch if uncond else 0, denoised=False), model.predict)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("uncond", [True, False])
def test_every_method_composes_and_asks_for_each_row_once(method: str, count: int, uncond: bool) -> None:
    model = FakeModel()
    engine = Engine(paper(method=method), bank(count))
    for index in range(4):
        result = run(engine, model, index, uncond=uncond)
        assert result.cond.shape == (2, *SHAPE)
        assert result.cond.dtype == torch.float32
        assert (result.uncond is not None) == uncond
        assert len(set(model.asked[-1])) == len(model.asked[-1])


@pytest.mark.parametrize("method", ["cmlora", "frequency", "w_composite", "composite"])
def test_equal_opinions_stay_what_they_are(method: str) -> None:
    class OneMind(FakeModel):
        def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            return super().opinion((), cond, slot)

    model = OneMind()
    engine = Engine(paper(method=method, recentre=0.3), bank(3))
    for index in range(5):
        result = run(engine, model, index)
        model.index = index
        torch.testing.assert_close(result.cond[1], model.opinion((), True, 1), rtol=1e-4, atol=1e-5)
        assert result.uncond is not None
        torch.testing.assert_close(result.uncond[0], model.opinion((), False, 0), rtol=1e-4, atol=1e-5)


def test_cmlora_pays_for_all_loras_only_at_refreshes() -> None:
    model = FakeModel()
    engine = Engine(paper(method="cmlora"), bank(3))
    total = 16
    for index in range(total):
        run(engine, model, index, total, batch=1)
    rows = [len(asked) for asked in model.asked]
    assert rows == [6 if index in refresh_steps(total) else 2 for index in range(total)]
    assert refresh_steps(16) == {0, 2, 4, 6, 9, 12, 14}


def test_cmlora_lets_dominance_go_round_and_fall_to_an_equal_share() -> None:
    assert dominance(3, 0) == 2.5
    assert dominance(3, 1) == 2.0
    assert dominance(2, 9) == 1.0
    model = FakeModel()
    engine = Engine(paper(method="cmlora"), bank(3))
    alone = []
    for index in range(9):
        run(engine, model, index, 16, batch=1)
        if len(model.asked[-1]) == 2:
            alone.append(model.asked[-1][0].mix)
    assert len(set(alone[:3])) == 3


def test_a_generation_forgets_the_one_before() -> None:
    first, second = FakeModel(), FakeModel()
    for model in (first, second):
        engine = Engine(paper(method="cmlora"), bank(2))
        results = [run(engine, model, index).cond for index in range(4)]
        model.results = results  # type: ignore[attr-defined]
    for a, b in zip(first.results, second.results, strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), levels=st.integers(1, 3), seed=st.integers(0, 2**31)
)
def test_wavelet_bands_join_to_the_picture(height: int, width: int, levels: int, seed: int) -> None:
    picture = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    bands = split_bands(picture, levels)
    assert len(bands) == 3 * levels + 1
    torch.testing.assert_close(join_bands(bands, height, width), picture, rtol=1e-4, atol=1e-5)


def test_frequency_gives_each_band_to_the_lora_that_acts_there() -> None:
    base = torch.randn(1, 4, 8, 8)
    coarse, fine = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    fine[..., ::2] = -1

    def predict(rows: Sequence[Row]) -> Tensor:
        by_mix = {(0.0, 0.0): base, (1.0, 0.0): base + coarse, (0.0, 1.0): base + fine}
        return torch.cat([by_mix[row.mix] for row in rows])

    engine = Engine(paper(method="frequency"), bank(2))
    result = engine.step(Step(0, 1, torch.zeros(1, 4, 8, 8), 0, denoised=False), predict)
    torch.testing.assert_close(result.cond, base + coarse + fine, rtol=1e-4, atol=1e-5)


def test_w_composite_weighs_by_importance() -> None:
    participants = Participants.of(3, importance={0: 2.0, 1: 0.0, 2: 2.0})
    model = FakeModel()
    result = run(Engine(paper(method="w_composite"), bank(3), participants), model)
    wanted = (
        model.opinion(participants.mixes[0], True, 0) + model.opinion(participants.mixes[2], True, 0)
    ) / 2
    torch.testing.assert_close(result.cond[0], wanted)


def test_importance_is_the_distance_that_the_trigger_words_make() -> None:
    prompt = torch.randn(4, 8)
    assert importance(prompt, [prompt, prompt]) == [1.0, 1.0]
    first, second = importance(prompt, [prompt + 2 * torch.randn(4, 8), prompt + 0.1 * torch.randn(4, 8)])
    assert first > 1 > second
    assert first + second == pytest.approx(2)


def test_trigger_words_leave_the_prompt_tidy() -> None:
    assert without_words("a Zib star, red, zib", ["zib"]) == "a star, red"
    assert without_words("a star", ["", "  "]) == "a star"


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_recentring_changes_only_the_unconditional_prediction(method: str) -> None:
    model = FakeModel()
    own = run(Engine(paper(method=method, recentre=0), bank(2)), model)
    for strength in (0.0, 0.25, 1.0):
        result = run(Engine(paper(method=method, recentre=strength), bank(2)), model)
        torch.testing.assert_close(result.cond, own.cond)
        assert own.uncond is not None
        base = torch.stack([model.opinion((0.0, 0.0), False, slot) for slot in range(2)])
        assert result.uncond is not None
        torch.testing.assert_close(result.uncond, strength * base + (1 - strength) * own.uncond)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def low_rank(size: float, seed: int) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 6, generator=random) * size, torch.randn(6, 2, generator=random))


def two_loras() -> tuple[TwoLayers, Bank]:
    """The first LoRA is strong in `first`, the second in `second`."""
    model = TwoLayers().requires_grad_(False)
    loras = [
        Adapter("content", {"first": [low_rank(1.0, 1)], "second": [low_rank(0.1, 2)]}),
        Adapter("style", {"first": [low_rank(0.1, 3)], "second": [low_rank(1.0, 4)]}, strength=0.5),
    ]
    return model, Bank(loras)


def layers(model: TwoLayers) -> Mapping[str, nn.Module]:
    return {"first": model.first, "second": model.second}


def test_klora_takes_from_every_layer_the_lora_that_is_stronger_there() -> None:
    model, loras = two_loras()
    rows = torch.randn(2, 6)
    with loras.attached(layers(model)):
        engine = Engine(paper(method="klora"), loras)
        composed = engine.step(Step(0, 20, rows, 0, denoised=False), lambda asked: model(rows)).cond
    first, second = (
        layer.weight + delta.dense() * strength
        for layer, delta, strength in (
            (model.first, loras.adapters[0].deltas["first"][0], 1.0),
            (model.second, loras.adapters[1].deltas["second"][0], 0.5),
        )
    )
    hidden = nn.functional.linear(rows, first, model.first.bias)
    torch.testing.assert_close(composed, nn.functional.linear(hidden, second, model.second.bias))


def test_klora_turns_to_the_style_as_time_goes_on() -> None:
    """Two LoRAs of equal shape everywhere: content wins while the style's factor is under 1, style after."""
    model = TwoLayers()
    same = {name: [low_rank(1.0, 7)] for name in ("first", "second")}
    loras = Bank([Adapter("content", same), Adapter("style", same)])
    with loras.attached(layers(model)):
        content_first = Participants.of(2)
        chosen = [klora_mixes(loras, content_first, index)["first"].index(1.0) for index in (0, 6, 8, 19)]
        assert chosen == [0, 0, 1, 1]
        assert klora_mixes(loras, Participants.of(2, styles=[0]), 0)["first"].index(1.0) == 1


def test_klora_keeps_the_loras_that_always_act() -> None:
    model, loras = two_loras()
    loras = Bank([*loras.adapters, Adapter("lcm", {"first": [low_rank(3.0, 9)]})])
    participants = Participants.of(3, always=[2])
    with loras.attached(layers(model)):
        mixes = klora_mixes(loras, participants, 0)
        assert mixes["first"] == (1.0, 0.0, 1.0)
        assert "not touched" not in mixes
        fake = FakeModel()
        run(Engine(paper(method="klora"), loras, participants), fake, 0, uncond=False, batch=1)
        assert [row.mix for row in fake.asked[-1]] == [(1.0, 1.0, 1.0)]


def klora_mixes(loras: Bank, participants: Participants, index: int) -> Mapping[str, Mix]:
    """By layer, the mix of K-LoRA's step `index` of 20."""
    method = METHODS["klora"].begin(participants, loras)
    return method.layer_mixes(StepContext(participants, {}, index, 20, has_uncond=False))


def test_klora_scores_do_not_depend_on_a_loras_overall_size() -> None:
    class Fixed:
        def __init__(self, size: float) -> None:
            self.size = size

        def changes(self) -> Iterator[tuple[str, Mapping[int, tuple[Tensor, int]]]]:
            for layer in ("a", "b"):
                random = torch.Generator().manual_seed(ord(layer))
                yield layer, {0: (torch.randn(8, 8, generator=random) * self.size, 2)}

    small, large = scores(Fixed(1.0), (0,)), scores(Fixed(5.0), (0,))
    for layer in small:
        assert small[layer][0] == pytest.approx(large[layer][0])


def test_a_style_acts_in_the_rows_of_all_the_others() -> None:
    """With a style, it is LoRAtorio of the others on a model that has the style, but for the unconditional anchor."""
    model = FakeModel()
    engine = Engine(paper(recentre=0), bank(3), Participants.of(3, styles=[1]))
    styled = run(engine, model)
    asked = {(row.mix, row.cond) for call in model.asked for row in call}
    contents = {(1.0, STYLE, 0.0), (0.0, STYLE, 1.0)}
    assert asked == {(mix, cond) for mix in contents for cond in (True, False)} | {((0.0, STYLE, 0.0), True)}
    always = Participants.of(3, always=[1])

    def scaled(mix: Mix) -> Mix:
        return tuple(STYLE if i == 1 else own for i, own in enumerate(mix))

    loras = tuple(replace(lora, mix=scaled(lora.mix)) for lora in always.loras)
    base = scaled(always.base)
    plain = run(Engine(paper(recentre=0), bank(3), Participants(base, loras, always.merged, base)), model)
    torch.testing.assert_close(styled.cond, plain.cond)
    assert styled.weights is not None
    assert plain.weights is not None
    torch.testing.assert_close(styled.weights[[0, 2]], plain.weights)
    assert bool((styled.weights[1] == 1).all())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_unconditional_anchor_is_the_base_with_its_styles(share: float) -> None:
    """Else guidance would exaggerate the style: it is in every conditional row."""
    model = FakeModel()
    result = run(Engine(paper(recentre=1, share=share), bank(3), Participants.of(3, styles=[1])), model)
    assert result.uncond is not None
    base = torch.stack([model.opinion((0.0, STYLE, 0.0), False, slot) for slot in range(2)])
    torch.testing.assert_close(result.uncond, base)


def test_styles_alone_make_one_mix() -> None:
    model = FakeModel()
    result = run(Engine(paper(), bank(2), Participants.of(2, styles=[0, 1])), model)
    mixes = {row.mix for call in model.asked for row in call}
    assert mixes == {(1.0, 1.0), (0.0, 0.0)}
    assert result.weights is not None
    assert bool((result.weights == 1).all())
    assert result.weights.shape == (2, 2, *SHAPE[1:])


@pytest.mark.parametrize("always", [(), (3,)])
def test_a_shared_part_of_the_others_is_in_every_row_but_the_anchors(always: tuple[int, ...]) -> None:
    """It is LoRAtorio on a model that has that part of all LoRAs, but for the unconditional anchor."""
    model, count = FakeModel(), 3 + len(always)
    participants = Participants.of(count, always=always)

    class Sharing(FakeModel):
        def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            if mix == participants.base and not cond:
                return super().opinion(mix, cond, slot)
            return super().opinion(tuple(max(part, 0.25) for part in mix), cond, slot)

    shared = run(Engine(paper(share=0.25), bank(count), participants), model)
    plain = run(Engine(paper(), bank(count), participants), Sharing())
    torch.testing.assert_close(shared.cond, plain.cond)
    torch.testing.assert_close(shared.uncond, plain.uncond)
    torch.testing.assert_close(shared.weights, plain.weights)
    assert sum(map(len, model.asked)) == 2 * 2 * 4


def test_sharing_everything_is_merging_recentred() -> None:
    for uncond in (True, False):
        model = FakeModel()
        shared = run(Engine(paper(share=1), bank(3)), model, uncond=uncond)
        merged = run(Engine(paper(method="merge", recentre=0.5), bank(3)), FakeModel(), uncond=uncond)
        torch.testing.assert_close(shared.cond, merged.cond)
        torch.testing.assert_close(shared.uncond, merged.uncond)
        assert {row.mix for row in model.asked[0] if row.cond} == {(1.0, 1.0, 1.0)}


def test_one_lora_has_nothing_to_share_and_candidates_share_nothing() -> None:
    one = FakeModel()
    run(Engine(paper(share=0.5), bank(1)), one)
    assert {row.mix for row in one.asked[0]} == {(0.0,), (1.0,)}
    pool = FakeModel()
    run(Engine(paper(share=0.5, pool_interval=1), bank(4), Participants.of(4, pooled=[2, 3])), pool)
    conditional = {row.mix for call in pool.asked for row in call if row.cond}
    assert conditional == {
        (0.5, 0.5, 0.0, 0.0),
        (1.0, 0.5, 0.0, 0.0),
        (0.5, 1.0, 0.0, 0.0),
        (0.5, 0.5, 1.0, 0.0),
        (0.5, 0.5, 0.0, 1.0),
    }
    styled = Participants.of(3, styles=[0]).with_shared_parts(0.25)
    assert styled.mixes == [(STYLE, 1.0, 0.25), (STYLE, 0.25, 1.0)]
    assert styled.reference == (STYLE, 0.25, 0.25)
    assert styled.base == (STYLE, 0.0, 0.0)


def test_a_pool_runs_only_those_whose_word_matters() -> None:
    model = FakeModel()
    participants = Participants.of(12, pooled=range(1, 12))
    knobs = paper(pool_size=3, pool_interval=5, temperature=10)
    engine = Engine(knobs, bank(12), participants)
    last_run: dict[Mix, int] = {}
    for index in range(10):
        before = len(model.asked)
        run(engine, model, index, batch=1)
        asked = [row for call in model.asked[before:] for row in call]
        assert max(len(call) for call in model.asked[before:]) <= 8
        conds = [row.mix for row in asked if row.cond]
        assert participants.mixes[0] in conds  # named in the prompt
        assert len(set(conds)) == len(conds)
        # The base and the one that is named are run with both of their rows, candidates at some of their runs.
        unconds = [row.mix for row in asked if not row.cond]
        assert {participants.base, participants.mixes[0]} <= set(unconds) <= set(conds)
        if index in (0, 5):
            assert len(conds) == len(unconds) == 13
        else:
            # The base, the one that is named and the three that waited longest: all have like shares.
            assert len(conds) == 5
            waited = {mix: index - last_run[mix] for mix in participants.mixes[1:]}
            longest = sorted(waited.values())[-3:]
            assert sorted(waited[mix] for mix in conds if mix in waited) == longest
        last_run.update(dict.fromkeys(conds, index))


@pytest.mark.parametrize("denoised", [True, False])
def test_a_pool_loses_nothing_where_the_loras_keep_their_distance(denoised: bool) -> None:
    """Each LoRA differs from the base by a constant in the unit of `reuse`: then what it said once holds for ever, at any σ."""

    class Constant(FakeModel):
        sigma = 8.0

        def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            random = torch.Generator().manual_seed(5)
            own = torch.randn(3, *SHAPE, generator=random)
            # The engine reads σ off z − D, whose root mean square it is where the noise's is 1.
            seen = self.sigma * float(own[0].square().mean().sqrt()) if denoised else self.sigma
            distance = 0.2 / math.sqrt(1 + seen**2 / TURN**2)
            noise = own[0] + distance * sum((i - 1.5) * part * own[1 + cond] for i, part in enumerate(mix))
            return -self.sigma * noise if denoised else noise

    knobs = paper(pool_size=1, pool_interval=100, temperature=0.1, recentre=0.25)
    model = Constant()
    pooled, plain = Engine(knobs, bank(4), Participants.of(4, pooled=range(1, 4))), Engine(knobs, bank(4))
    for index in range(12):
        model.sigma = 8 * 0.7**index
        step = Step(index, 20, torch.zeros(2, *SHAPE), 2, denoised=denoised, sigma=model.sigma)
        own, wanted = pooled.step(step, model.predict), plain.step(step, model.predict)
        torch.testing.assert_close(own.cond, wanted.cond, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.weights, wanted.weights, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.uncond, wanted.uncond, rtol=1e-4, atol=1e-5)


def test_a_pool_that_scores_and_keeps_everything_is_plain_loratorio() -> None:
    knobs = paper(pool_size=100, pool_interval=1, temperature=10)
    model = FakeModel()
    plain = run(Engine(knobs, bank(4)), model, 3)
    pooled = run(Engine(knobs, bank(4), Participants.of(4, pooled=range(4))), model, 3)
    torch.testing.assert_close(pooled.cond, plain.cond)
    assert pooled.uncond is not None
    assert plain.uncond is not None
    torch.testing.assert_close(pooled.uncond, plain.uncond)


def test_candidates_with_hardly_any_share_are_not_run() -> None:
    class OneKnows(FakeModel):
        def opinion(self, mix: Mix, cond: bool, slot: int) -> Tensor:
            return super().opinion((), cond, slot) * (-1 if mix[2] else 1)

    engine = Engine(paper(pool_size=3), bank(5), Participants.of(5, pooled=range(5)))
    model = OneKnows()
    for index in range(3):
        run(engine, model, index)
    assert {row.mix for row in model.asked[-1]} == {(0.0,) * 5, (0.0, 0.0, 1.0, 0.0, 0.0)}


def test_a_style_beside_a_pool_acts_in_its_candidates_rows() -> None:
    model = FakeModel()
    participants = Participants.of(4, styles=[0], pooled=[1, 2, 3])
    engine = Engine(paper(temperature=10, weight_maps=True), bank(4), participants)
    run(engine, model)
    asked = {(row.mix, row.cond) for call in model.asked for row in call}
    assert ((STYLE, 0.0, 0.0, 0.0), True) in asked
    assert ((STYLE, 0.0, 0.0, 0.0), False) in asked
    assert all(mix[0] == STYLE for mix, _ in asked)
    (weights,) = engine.history.weights
    torch.testing.assert_close(
        weights.sum(dim=0).float(), torch.full((2, *SHAPE[1:]), 2.0), rtol=0, atol=2e-3
    )


def test_steps_that_are_not_composed_leave_the_pool_out() -> None:
    model = FakeModel()
    run(Engine(paper(start=0.5), bank(4), Participants.of(4, pooled=[1, 2, 3])), model)
    assert {row.mix for row in model.asked[-1]} == {(1.0, 0.0, 0.0, 0.0)}


def test_only_the_loras_in_use_stay_on_the_device() -> None:
    delta = LowRank(torch.ones(1, 2), torch.ones(3, 1))
    loras = Bank([Adapter(f"lora{i}", {"layer": [delta]}) for i in range(100)])
    Engine(paper(), loras, Participants.of(100, pooled=range(100)))
    assert loras.numbers == 32 * 5
