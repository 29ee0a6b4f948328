"""One denoising step: which rows are run, in how many calls, and what is made of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratorio.adapters.bank import Bank, Regrouped
from loratorio.adapters.delta import Adapter, LowRank
from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import Branch, Mix, Participants
from loratorio.errors import LoratorioError
from loratorio.sampling.calls import Row, is_out_of_memory
from loratorio.sampling.engine import Engine, Predict
from loratorio.sampling.step import Step
from loratorio.settings import Settings
from tests import reference
from tests.published import paper


def loras(count: int) -> Bank:
    """LoRAs that change nothing: the fake models here answer by the row's mix."""
    return Bank([Adapter(f"lora{i}", {}) for i in range(count)])


def answer(row: Row, latents: Tensor) -> Tensor:
    """What the fake model says of a row: another thing for each mix, prompt and slot; (C, …)."""
    seed = hash((tuple(row.mix), row.cond, row.slot)) % 2**31
    return torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) + 1


def fake(latents: Tensor, calls: list[list[Row]] | None = None, most: int = 10**9) -> Predict:
    """A model that answers `answer`, writes down its calls, and runs out of memory above `most` rows."""

    def predict(rows: Sequence[Row]) -> Tensor:
        if calls is not None:
            calls.append(list(rows))
        if len(rows) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.stack([answer(row, latents) for row in rows])

    return predict


def step_of(latents: Tensor, uncond_count: int | None = None, index: int = 0, **changes: Any) -> Step:
    return Step(index, 20, latents, len(latents) if uncond_count is None else uncond_count, **changes)


ROWS = [
    # method, LoRAs, λ, uncond, rows of a step with one image
    ("loratorio", 3, 0.5, True, 8),
    ("loratorio", 3, 0.0, True, 7),
    ("loratorio", 3, 1.0, True, 5),
    ("loratorio", 3, 0.5, False, 4),
    ("loratorio", 1, 0.5, True, 3),
    ("loratorio", 1, 0.0, True, 2),
    ("loratorio", 1, 1.0, True, 2),
    ("loratorio", 1, 0.5, False, 1),
    ("merge", 3, 0.0, True, 2),
    ("merge", 3, 0.5, True, 3),
    ("merge", 3, 1.0, True, 2),
    ("merge", 3, 0.5, False, 1),
    ("switch", 3, 0.5, True, 2),
    ("composite", 3, 0.0, True, 6),
    ("composite", 3, 0.5, True, 7),
    ("composite", 3, 0.5, False, 3),
]


@pytest.mark.parametrize(("method", "count", "strength", "uncond", "expected"), ROWS)
def test_only_the_needed_rows_are_run(
    method: str, count: int, strength: float, uncond: bool, expected: int
) -> None:
    calls: list[list[Row]] = []
    latents = torch.randn(1, 4, 4, 4)
    engine = Engine(paper(method=method, recentre=strength), loras(count))
    result = engine.step(step_of(latents, int(uncond)), fake(latents, calls))
    (rows,) = calls
    assert len(rows) == len(set(rows)) == expected
    assert (result.uncond is not None) == uncond


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("uncond", [True, False])
@pytest.mark.parametrize(("strength", "start"), [(0.5, 0.0), (1.0, 0.3)])
def test_the_branches_of_a_sampling_are_known_before_it(
    method: str, uncond: bool, strength: float, start: float
) -> None:
    calls: list[list[Row]] = []
    latents = torch.randn(1, 4, 4, 4)
    chosen = paper(method=method, recentre=strength, share=0.2, reuse=3, start=start)
    assert not chosen.find_styles
    engine = Engine(chosen, loras(3))
    ahead = engine.branches_ahead(20, uncond)
    for index in range(20):
        engine.step(step_of(latents, int(uncond), index), fake(latents, calls))
    assert {Branch(row.mix, row.cond) for rows in calls for row in rows} == set(ahead)


def test_rows_of_one_mix_stand_together_and_have_slots() -> None:
    calls: list[list[Row]] = []
    latents = torch.randn(2, 4, 4, 4)
    Engine(paper(), loras(2)).step(step_of(latents), fake(latents, calls))
    base, first, second = (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)
    assert calls == [[Row(mix, cond, slot) for mix in (first, second, base) for cond in (True, False) for slot in (0, 1)]]  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> tuple[Settings, int, Step]:
    """A step of any shape: several images, AND, frames, denoised or noise."""
    images, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    owners = sorted([*range(images), *draw(st.lists(st.integers(0, images - 1), max_size=2))])
    frames = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (len(owners), 4, *frames, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    chosen = paper(
        patch_size=draw(st.integers(1, 6)),
        temperature=draw(st.sampled_from([0.02, 0.5])),
        recentre=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
    uncond_count = draw(st.sampled_from([0, images]))
    given_owners = () if len(owners) == images else tuple(owners)
    return chosen, count, step_of(latents, uncond_count, owners=given_owners, denoised=draw(st.booleans()))


@settings(max_examples=60)
@given(steps(), st.integers(0, 4))
def test_a_step_equals_the_formulas(case: tuple[Settings, int, Step], row_limit: int) -> None:
    chosen, count, step = case
    result = Engine(chosen, loras(count), row_limit=row_limit).step(step, fake(step.latents))
    solos = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    base = (0.0,) * count

    def answers(mix: Mix, cond: bool) -> Tensor:
        slots = len(step.latents) if cond else step.uncond_count
        return folded(torch.stack([answer(Row(mix, cond, slot), step.latents) for slot in range(slots)]))

    def noise(prediction: Tensor) -> Tensor:
        return folded(step.latents) - prediction if step.denoised else prediction

    conds = torch.stack([answers(mix, True) for mix in solos])
    weights = reference.spatial_weights(
        noise(answers(base, True)),
        torch.stack([noise(each) for each in conds]),
        chosen.patch_size,
        chosen.temperature,
    )
    np.testing.assert_allclose(folded(result.cond).numpy(), reference.compose(conds, weights), atol=1e-4)
    assert result.cond.shape == step.latents.shape
    assert result.weights is not None
    np.testing.assert_allclose(result.weights.numpy(), weights, atol=1e-4)
    if not step.uncond_count:
        assert result.uncond is None
        return
    assert result.uncond is not None
    frames = step.latents.shape[2] if step.latents.ndim == 5 else 1
    owners = step.owners or range(step.uncond_count)
    per_image = np.stack(
        [
            weights[:, [row * frames + frame for row, owner in enumerate(owners) if owner == image]].mean(1)
            for image in range(step.uncond_count)
            for frame in range(frames)
        ],
        axis=1,
    )
    unconds = torch.stack([answers(mix, False) for mix in solos])
    expected = reference.recentre(answers(base, False), unconds, per_image, chosen.recentre)
    np.testing.assert_allclose(folded(result.uncond).numpy(), expected, atol=1e-4)
    assert result.uncond.shape == (step.uncond_count, *step.latents.shape[1:])


def folded(latents: Tensor) -> Tensor:
    """Frames into the batch."""
    return latents.transpose(1, 2).flatten(0, 1) if latents.ndim == 5 else latents


def test_and_with_as_many_rows_as_images_follows_its_owners() -> None:
    """Two rows, two images, but in the other order: each image's weights are its own row's."""
    latents = torch.randn(2, 4, 4, 4)
    straight = Engine(paper(recentre=0.0), loras(2)).step(step_of(latents), fake(latents))
    crossed = Engine(paper(recentre=0.0), loras(2)).step(step_of(latents, owners=(1, 0)), fake(latents))
    assert straight.uncond is not None
    assert crossed.uncond is not None
    assert torch.equal(straight.cond, crossed.cond)
    assert not torch.equal(straight.uncond, crossed.uncond)


def test_denoised_and_noise_predictions_give_the_same_picture() -> None:
    latents, sigma = torch.randn(2, 4, 6, 6) * 5, 3.0

    def denoised(rows: Sequence[Row]) -> Tensor:
        slots = torch.stack([latents[row.slot] for row in rows])
        return slots - sigma * fake(latents)(rows)

    engine = Engine(paper(), loras(3))
    as_noise = engine.step(step_of(latents, denoised=False), fake(latents))
    as_denoised = engine.step(step_of(latents), denoised)
    torch.testing.assert_close(latents - sigma * as_noise.cond, as_denoised.cond, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(as_noise.weights, as_denoised.weights, atol=1e-4, rtol=1e-4)


def test_outside_of_its_part_of_the_steps_the_loras_are_merged() -> None:
    calls: list[list[Row]] = []
    latents = torch.randn(1, 4, 4, 4)
    engine = Engine(paper(start=0.25, end=0.5), loras(2))
    for index in range(20):
        engine.step(step_of(latents, index=index), fake(latents, calls))
    merged = [{row.mix for row in rows} == {(1.0, 1.0)} for rows in calls]
    assert [not each for each in merged] == [5 <= index < 10 for index in range(20)]


def test_loras_that_always_act_are_in_every_row() -> None:
    calls: list[list[Row]] = []
    latents = torch.randn(1, 4, 4, 4)
    Engine(paper(), loras(3), Participants.of(3, always=[1])).step(step_of(latents), fake(latents, calls))
    assert {row.mix for row in calls[0]} == {(0.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0)}


def test_without_a_lora_there_is_nothing_to_compose() -> None:
    with pytest.raises(LoratorioError, match="add at least one to the prompt"):
        Engine(paper(), loras(0))


@pytest.mark.parametrize("most", [7, 4, 3, 2, 1])
def test_too_many_rows_for_the_memory_are_halved(most: int) -> None:
    latents = torch.randn(1, 4, 4, 4)
    expected = Engine(paper(), loras(3)).step(step_of(latents), fake(latents))
    calls: list[list[Row]] = []
    engine = Engine(paper(), loras(3))
    for _ in range(2):
        found = engine.step(step_of(latents), fake(latents, calls, most))
        assert torch.equal(found.cond, expected.cond)
        assert found.uncond is not None
        assert expected.uncond is not None
        assert torch.equal(found.uncond, expected.uncond)
    sizes = [len(rows) for rows in calls]
    assert engine.calls.limit <= most
    assert sum(size for size in sizes if size <= most) == 2 * 8  # every row once a step
    assert all(size <= most for size in sizes[sizes.index(engine.calls.limit) :])  # and it does not try again


def mixes_by_call(calls: list[list[Row]]) -> list[set[tuple[float, ...]]]:
    return [{row.mix for row in rows} for rows in calls]


def test_where_a_layer_gets_other_entries_each_call_has_one_mix() -> None:
    """From then on, so that one call is lost and no more."""
    latents = torch.randn(2, 4, 4, 4)
    expected = Engine(paper(), loras(3)).step(step_of(latents), fake(latents))
    calls: list[list[Row]] = []
    run = fake(latents, calls)

    def regrouped(rows: Sequence[Row]) -> Tensor:
        predicted = run(rows)
        if len({row.mix for row in rows}) > 1:
            raise Regrouped
        return predicted

    engine = Engine(paper(), loras(3))
    for first in (True, False):
        calls.clear()
        found = engine.step(step_of(latents), regrouped)
        assert torch.equal(found.cond, expected.cond)
        of_calls = mixes_by_call(calls[1:] if first else calls)
        assert [len(each) for each in of_calls] == [1] * 4
        assert len(set().union(*of_calls)) == 4


@pytest.mark.parametrize(("most", "sizes"), [(3, [2] * 8), (2, [2] * 8), (8, [4] * 4)])
def test_one_mix_per_call_keeps_all_pictures_together(most: int, sizes: list[int]) -> None:
    """Others may join them, so they are cut between conditional and unconditional rows only."""
    latents = torch.randn(2, 4, 4, 4)
    calls: list[list[Row]] = []
    engine = Engine(paper(), loras(3))
    engine.calls.one_mix = True
    engine.step(step_of(latents), fake(latents, calls, most))
    assert [len(rows) for rows in calls if len(rows) <= most] == sizes
    with pytest.raises(LoratorioError, match="as few rows per call as possible"):
        engine.step(step_of(latents), fake(latents, most=1))


@pytest.mark.parametrize(("most", "one_mix"), [(99, False), (3, False), (99, True)])
def test_all_calls_of_a_step_draw_the_same(most: int, one_mix: bool) -> None:
    """And afterwards the generator is where one call leaves it."""
    latents = torch.randn(1, 4, 4, 4)
    drawn: list[float] = []
    run = fake(latents, most=most)

    def drawing(rows: Sequence[Row]) -> Tensor:
        drawn.append(torch.rand(1).item())
        return run(rows)

    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    engine = Engine(paper(), loras(3))
    engine.one_mix_per_call = one_mix
    engine.step(step_of(latents), drawing)
    assert len(drawn) == 1 or most == 3 or one_mix
    assert set(drawn) == {expected[0]}
    assert torch.rand(1).item() == expected[1]


def test_one_row_too_many_is_said_in_a_sentence() -> None:
    latents = torch.randn(1, 4, 4, 4)
    with pytest.raises(LoratorioError, match="as few rows per call as possible"):
        Engine(paper(), loras(2)).step(step_of(latents), fake(latents, most=0))


def test_what_failed_is_freed_before_the_next_try() -> None:
    class Activation:
        """Stands for what a failed call leaves in memory."""

    left: list[weakref.ref[Activation]] = []
    latents = torch.randn(1, 4, 4, 4)

    def predict(rows: Sequence[Row]) -> Tensor:
        assert all(each() is None for each in left)
        activation = Activation()
        left.append(weakref.ref(activation))
        return fake(latents, most=2)(rows)

    gc.disable()  # freed at once, not some time
    try:
        Engine(paper(), loras(2)).step(step_of(latents), predict)
    finally:
        gc.enable()
    assert len(left) > 3


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (
            RuntimeError(
                "Could not allocate tensor with 4194304 bytes. There is not enough GPU video memory"
            ),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_ways_to_say_that_memory_ran_out(problem: BaseException, expected: bool) -> None:
    assert is_out_of_memory(problem) == expected


@pytest.mark.parametrize("problem", [RuntimeError("shapes"), KeyboardInterrupt(), LoratorioError("stopped")])
def test_other_errors_go_through(problem: BaseException) -> None:
    latents = torch.randn(1, 4, 4, 4)
    engine = Engine(paper(), loras(2))

    def predict(rows: Sequence[Row]) -> Tensor:
        raise problem

    with pytest.raises(type(problem)):
        engine.step(step_of(latents), predict)
    assert engine.calls.limit == 0


def test_a_host_that_loses_rows_is_told() -> None:
    latents = torch.randn(1, 4, 4, 4)
    with pytest.raises(ValueError, match="predicted 7 rows where 8"):
        Engine(paper(), loras(3)).step(step_of(latents), lambda rows: fake(latents)(rows)[1:])


def test_weight_maps_are_kept_only_when_asked_for() -> None:
    latents = torch.randn(2, 4, 4, 6)
    for weight_maps in (False, True):
        engine = Engine(paper(weight_maps=weight_maps), loras(3))
        for index in (0, 1, 1, 2):  # step 1 is evaluated twice
            engine.step(step_of(latents * (index + 1), index=index), fake(latents))
        assert engine.history.steps == ([0, 1, 2] if weight_maps else [])
        for weights in engine.history.weights:
            assert weights.shape == (3, 2, 4, 6)
            assert weights.dtype == torch.float16
            torch.testing.assert_close(weights.float().sum(0), torch.ones(2, 4, 6), atol=2e-3, rtol=0)


# With a model that really has LoRAs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        prediction: Tensor = self.second(torch.tanh(self.first(latents)))
        return prediction


def model_with(strengths: Sequence[float]) -> tuple[Model, Bank, Callable[[Sequence[Row]], Tensor], Tensor]:
    torch.manual_seed(0)
    model, latents = Model().requires_grad_(False), torch.randn(1, 4, 8, 8)
    random = torch.Generator().manual_seed(0)

    def delta(layer: nn.Conv2d) -> LowRank:
        down = torch.randn(2, *layer.weight.shape[1:], generator=random)
        return LowRank(down * 0.2, torch.randn(layer.out_channels, 2, generator=random))

    adapters = [
        Adapter(str(i), {"first": [delta(model.first)], "second": [delta(model.second)]}, strength)
        for i, strength in enumerate(strengths)
    ]

    def predict(rows: Sequence[Row]) -> Tensor:
        # The prompt is a brightness here.
        return model(torch.cat([latents + (0.5 if row.cond else 0.0) for row in rows]))

    return model, Bank(adapters), predict, latents


def test_one_lora_without_recentring_is_that_lora_exactly() -> None:
    model, bank, predict, latents = model_with([0.8])
    with bank.attached(dict(model.named_children())):
        result = Engine(paper(recentre=0.0), bank).step(step_of(latents), predict)
        with bank.routed([(1.0,)] * 2):
            cond, uncond = predict([Row((1.0,), True, 0), Row((1.0,), False, 0)]).split(1)
    assert torch.equal(result.cond, cond)
    assert result.uncond is not None
    assert torch.equal(result.uncond, uncond)


def test_one_lora_fully_recentred_is_guided_away_from_the_base() -> None:
    model, bank, predict, latents = model_with([0.8])
    base_uncond = predict([Row((0.0,), False, 0)])
    with bank.attached(dict(model.named_children())):
        result = Engine(paper(recentre=1.0), bank).step(step_of(latents), predict)
    assert result.uncond is not None
    torch.testing.assert_close(result.uncond, base_uncond)


@pytest.mark.parametrize("row_limit", [0, 1, 3])
def test_a_lora_of_strength_zero_never_outweighs(row_limit: int) -> None:
    model, bank, predict, latents = model_with([0.9, 0.0, -0.4])
    with bank.attached(dict(model.named_children())):
        engine = Engine(paper(), bank, row_limit=row_limit)
        result = engine.step(step_of(latents, denoised=False), predict)
    assert result.weights is not None
    assert bool((result.weights[1] <= result.weights).all())


def test_one_batch_equals_row_by_row() -> None:
    model, bank, predict, latents = model_with([0.9, 0.3, -0.4])
    with bank.attached(dict(model.named_children())):
        results = [
            Engine(paper(temperature=0.1), bank, row_limit=limit).step(step_of(latents), predict)
            for limit in (0, 1, 2, 3, 5)
        ]
    for result in results[1:]:
        torch.testing.assert_close(result.cond, results[0].cond, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.uncond, results[0].uncond, atol=1e-5, rtol=1e-5)


# -- another model in the middle of a sampling ------------------------------------------------------------------------


def test_a_rebound_engine_keeps_its_limits_and_begins_methods_anew() -> None:
    """Nothing that CMLoRA remembers of one model's predictions is added to another's."""
    shape = (4, 4, 4)
    latents = torch.zeros(1, *shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3

    def engine_of(values: tuple[float, float]) -> tuple[Engine, Predict]:
        def predict(rows: Sequence[Row]) -> Tensor:
            made = [sum(v * part for v, part in zip(values, row.mix, strict=True)) + row.slot for row in rows]
            return torch.tensor(made).view(-1, 1, 1, 1).expand(-1, *shape) + noise

        return Engine(paper(method="cmlora"), loras(2), row_limit=3), predict

    engine, first = engine_of((5.0, 7.0))
    fresh, second = engine_of((1.0, 3.0))
    for index in range(2):
        engine.step(Step(index, 20, latents, 1, denoised=False), first)
    bank = loras(2)
    engine.rebind(bank)
    assert engine.bank is bank
    assert engine.calls.limit == 3
    rebound = engine.step(Step(2, 20, latents, 1, denoised=False), second)
    wanted = fresh.step(Step(2, 20, latents, 1, denoised=False), second)
    assert torch.equal(rebound.cond, wanted.cond)
    with pytest.raises(ValueError, match="2 LoRAs"):
        engine.rebind(loras(3))


def test_a_pools_limits_hold_on_the_next_model() -> None:
    from loratorio.compose.mixes import Participants
    from loratorio.sampling.engine import POOL_RESIDENT

    def many() -> Bank:
        delta = LowRank(torch.ones(1, 2), torch.ones(3, 1))
        return Bank([Adapter(f"lora{i}", {"layer": [delta]}) for i in range(100)])

    engine = Engine(paper(), many(), Participants.of(100, pooled=range(1, 100)))
    assert engine.calls.scores_pool
    bank = many()
    assert bank.numbers == 100 * 5
    engine.rebind(bank)
    assert bank.numbers == (1 + POOL_RESIDENT) * 5
    assert engine.calls.scores_pool


def test_guidance_rescale_looks_at_a_clip_as_a_whole() -> None:
    """Not frame by frame: a clip whose contrast changes in time keeps that."""
    torch.manual_seed(0)
    settings = paper(enabled=True, method="merge", rescale=0.7)
    clips = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64) * torch.tensor([0.2, 1.0, 3.0]).view(
        1, 1, 3, 1, 1
    )
    noise = torch.stack([clips, torch.randn_like(clips)])  # conditional, unconditional
    engine = Engine(settings, Bank([Adapter("a", {})]))
    made = engine.step(
        Step(0, 4, torch.zeros_like(clips), 2, denoised=False, guidance=5.0),
        lambda rows: torch.stack([noise[0 if row.cond else 1][row.slot] for row in rows]),
    )
    assert made.uncond is not None
    for cond, uncond, rescaled in zip(noise[0], noise[1], made.cond.double(), strict=True):
        guided = uncond + 5 * (cond - uncond)
        wanted = guided * (0.7 * cond.std() / guided.std() + 0.3)
        found = uncond + 5 * (rescaled - uncond)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


EVERY_WAY = [*METHODS, "relative, reused", "a pool"]


def last_step(way: str, changes: Callable[[Row], Tensor | float]) -> tuple[Any, Any, Any]:
    """The last of three steps, and the same run once more with every row changed by `changes`: conditional rows, and unconditional."""
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    name, _, rest = way.partition(", ")
    knobs: dict[str, Any] = {"method": name if name in METHODS else "relative", "rescale": 0.5}
    if rest:
        knobs["reuse"] = 2
    pooled = range(4) if way == "a pool" else ()
    engine = Engine(paper(**knobs), loras(4), Participants.of(4, pooled=pooled))
    for index in range(3):
        step = Step(index, 30, latents, 2, guidance=4.0)
        composed = engine.step(step, fake(latents))

    def changed(rows: Sequence[Row]) -> Tensor:
        return torch.stack([answer(row, latents) + changes(row) for row in rows])

    return composed, engine.again(changed, True, False), engine.again(changed, False, True)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_rows_run_once_more_are_composed_as_they_were(way: str) -> None:
    composed, *same = last_step(way, lambda row: 0)
    for each in same:
        torch.testing.assert_close(each.cond, composed.cond)
        torch.testing.assert_close(each.uncond, composed.uncond)
    # Whatever the weights are, they sum to 1.
    composed, cond, uncond = last_step(way, lambda row: 0.25)
    torch.testing.assert_close(cond.cond, composed.cond + 0.25)
    torch.testing.assert_close(cond.uncond, composed.uncond)
    torch.testing.assert_close(uncond.uncond, composed.uncond + 0.25)
    torch.testing.assert_close(uncond.cond, composed.cond)


def test_rows_run_once_more_have_the_weights_of_the_step() -> None:
    change = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(5))

    def changes(row: Row) -> Tensor:
        numbers = [number for number, part in enumerate(row.mix) if part]
        return change[numbers[0]] if len(numbers) == 1 else torch.zeros(4, 6, 6)

    composed, cond, _ = last_step("loratorio", changes)
    expected = composed.cond + torch.einsum("nbhw,nchw->bchw", composed.weights, change)
    torch.testing.assert_close(cond.cond, expected)
