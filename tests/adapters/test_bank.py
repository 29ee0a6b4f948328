"""The bank against weights merged in float64: every kind of layer, change, mix, strength and order of rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratorio.adapters.bank import PLANS, Bank, Regrouped
from loratorio.adapters.delta import Adapter, Dense, LowRank
from loratorio.compose.mixes import Mix
from loratorio.errors import LoratorioError

from .layers import (
    KINDS,
    LAYERS,
    Products,
    deltas_for,
    dense,
    held,
    low_rank,
    merged,
    relative_error,
    rows_for,
)


def routed(bank: Bank, layer: nn.Module, mixes: Sequence[Mix], rows: Tensor) -> Tensor:
    with torch.no_grad(), bank.attached({"layer": layer}), bank.routed(mixes):
        result: Tensor = layer(rows)
    return result


def row_by_row(layer: nn.Module, adapters: Sequence[Adapter], mixes: Sequence[Mix], rows: Tensor) -> Tensor:
    """Every row through a layer that its mix is merged into, in float64."""
    with torch.no_grad():
        parts = rows.double().chunk(len(mixes))
        return torch.cat([merged(layer, adapters, mix)(part) for mix, part in zip(mixes, parts, strict=True)])


SOLOS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
MIXES = st.sampled_from([(0.0, 0.0, 0.0), *SOLOS, (1.0, 1.0, 1.0), (0.5, 0.0, -2.0)])


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(LAYERS)),
    st.tuples(*[st.sampled_from([*KINDS, "absent"])] * 3),
    st.tuples(*[st.sampled_from([1.0, 0.8, 0.0, -0.5])] * 3),
    st.lists(MIXES, min_size=1, max_size=7),
    st.booleans(),
    st.integers(0, 1000),
)
def test_rows_equal_merged_weights(
    layer_name: str,
    kinds: tuple[str, ...],
    strengths: tuple[float, ...],
    mixes: list[Mix],
    channels_last: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    layer = LAYERS[layer_name]()
    adapters = [
        Adapter(f"lora{i}", {"layer": deltas_for(layer, kind, random)} if kind != "absent" else {}, strength)
        for i, (kind, strength) in enumerate(zip(kinds, strengths, strict=True))
    ]
    rows = rows_for(layer, len(mixes), random)
    if channels_last and rows.ndim == 4:
        rows = rows.contiguous(memory_format=torch.channels_last)
    expected = row_by_row(layer, adapters, mixes, rows)
    found = routed(Bank(adapters), layer, mixes, rows)
    assert relative_error(found, expected) < 1e-5
    for number, mix in enumerate(mixes):
        if not any(mix):  # the base's rows are not merely near: they are the base's
            assert torch.equal(found[number], layer(rows)[number])


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)])
def test_half_precision_layers_with_float32_loras(layer_name: str, dtype: torch.dtype, limit: float) -> None:
    random = torch.Generator().manual_seed(0)
    layer = LAYERS[layer_name]().to(dtype)
    adapters = [Adapter(str(i), {"layer": deltas_for(layer, kind, random)}) for i, kind in enumerate(KINDS)]
    mixes = [tuple(float(i == j) for j in range(len(KINDS))) for i in range(len(KINDS))]
    rows = rows_for(layer, len(mixes), random).to(dtype)
    found = routed(Bank(adapters), layer, mixes, rows)
    assert found.dtype == dtype
    assert relative_error(found, row_by_row(layer, adapters, mixes, rows)) < limit


def test_a_small_alpha_keeps_its_precision_in_float16() -> None:
    layer = nn.Linear(64, 64, bias=False).half()
    nn.init.zeros_(layer.weight)
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(32, 64, generator=random) * 0.1, torch.randn(64, 32, generator=random) * 0.001
    adapter = Adapter("a", {"layer": [LowRank(down, up, scale=1 / 128)]})
    rows = torch.randn(1, 8, 64, generator=random).half()
    expected = row_by_row(layer, [adapter], [(1.0,)], rows)
    assert relative_error(routed(Bank([adapter]), layer, [(1.0,)], rows), expected) < 5e-3


def test_float64_weights_wide_up_and_flat_matrices_fit() -> None:
    """Convolutions whose kernel sits in `up`, linear layers stored as 1×1 convolutions and the other way round."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    cases: list[tuple[nn.Module, LowRank]] = [
        (nn.Conv2d(6, 10, 3, padding=1), LowRank(normal(2, 6, 1, 1), normal(10, 2, 3, 3))),
        (nn.Linear(6, 10), LowRank(normal(2, 6, 1, 1), normal(10, 2, 1, 1))),
        (nn.Conv2d(6, 10, 1), LowRank(normal(2, 6), normal(10, 2))),
        (nn.Conv2d(6, 10, 3, padding=1), LowRank(normal(2, 54), normal(10, 2))),
    ]
    for layer, delta in cases:
        adapter = Adapter("a", {"layer": [delta]})
        rows = rows_for(layer, 2, random.manual_seed(1))
        wide = delta.up.ndim == 4 and delta.up.shape[-1] == 3
        change = torch.einsum("orkl,ri->oikl", delta.up, delta.down.flatten(1)) if wide else delta.dense()
        own = copy.deepcopy(layer).double()
        with torch.no_grad():
            own.weight += change.reshape(own.weight.shape)  # type: ignore[operator,union-attr]
            expected = own(rows.double())
        assert relative_error(routed(Bank([adapter]), layer, [(1.0,), (1.0,)], rows), expected) < 1e-5


def test_tiling_that_is_switched_while_attached() -> None:
    layer = LAYERS["conv 3x3"]()
    random = torch.Generator().manual_seed(0)
    adapters = [Adapter(kind, {"layer": deltas_for(layer, kind, random)}) for kind in ("rank 3", "dense")]
    mixes = [(1.0, 0.0), (0.0, 1.0)]
    rows = rows_for(layer, 2, random)
    bank = Bank(adapters)
    with torch.no_grad(), bank.attached({"layer": layer}):
        for mode in ("zeros", "circular", "zeros"):
            layer.padding_mode = mode  # type: ignore[assignment]
            with bank.routed(mixes):
                found = layer(rows)
            assert relative_error(found, row_by_row(layer, adapters, mixes, rows)) < 1e-5


def test_input_given_by_name_and_outputs_that_are_views() -> None:
    class Transposed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).transpose(0, 1).contiguous().transpose(0, 1)

    layer = Transposed(6, 10)
    random = torch.Generator().manual_seed(0)
    adapter = Adapter("a", {"layer": [low_rank(layer, 2, random)]})
    rows = rows_for(layer, 2, random)
    bank = Bank([adapter])
    with torch.no_grad(), bank.attached({"layer": layer}), bank.routed([(1.0,), (0.0,)]):
        found = layer(input=rows)
    expected = row_by_row(layer, [adapter], [(1.0,), (0.0,)], rows)
    assert relative_error(found, expected) < 1e-5


def test_two_dimensional_input() -> None:
    layer = nn.Linear(6, 10)
    adapter = Adapter("a", {"layer": [low_rank(layer, 2, torch.Generator().manual_seed(0))]})
    rows = torch.randn(3, 6)
    mixes = [(1.0,), (0.0,), (-1.0,)]
    found = routed(Bank([adapter]), layer, mixes, rows)
    assert relative_error(found, row_by_row(layer, [adapter], mixes, rows)) < 1e-5


def test_a_mix_that_differs_between_layers_and_steps() -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})
    random = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(name, {key: [low_rank(layer, 2, random)] for key, layer in model.items()}) for name in "ab"
    ]
    rows = torch.randn(2, 3, 6)
    bank = Bank(adapters)
    both = (1.0, 1.0)
    with torch.no_grad(), bank.attached(dict(model.items())):
        for chosen in ({"one": (1.0, 0.0)}, {"one": (0.0, 1.0), "two": (0.0, 0.0)}, {}):
            with bank.routed([both] * 2, chosen):
                for name, layer in model.items():
                    expected = merged(layer, adapters, chosen.get(name, both), name)(rows.double())
                    assert relative_error(layer(rows), expected) < 1e-5


# What is left behind


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, rows: Tensor) -> Tensor:
        pictures: Tensor = self.norm(self.conv(rows))
        tokens: Tensor = self.linear(pictures.movedim(1, -1))
        return tokens.movedim(-1, 1)


def model_and_bank() -> tuple[Model, dict[str, nn.Module], Bank]:
    torch.manual_seed(0)
    model = Model()
    layers = dict(model.named_children())
    random = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(kind, {name: deltas_for(layer, kind, random) for name, layer in layers.items()})
        for kind in ("rank 3", "dense")
    ]
    return model, layers, Bank(adapters)


def hook_count(model: nn.Module) -> int:
    return sum(
        len(getattr(module, registry))
        for module in model.modules()
        for registry in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_backward_hooks",
        )
    )


class Trace:
    """What a model's state is, to compare it later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {
            name: (id(weight), weight.clone()) for name, weight in model.state_dict(keep_vars=True).items()
        }
        self.attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def check(self) -> None:
        assert hook_count(self.model) == 0
        assert {name: set(vars(module)) for name, module in self.model.named_modules()} == self.attributes
        for name, weight in self.model.state_dict(keep_vars=True).items():
            assert id(weight) == self.weights[name][0]
            assert torch.equal(weight, self.weights[name][1])


def test_detaching_leaves_no_trace() -> None:
    model, layers, bank = model_and_bank()
    rows = torch.randn(2, 6, 4, 4)
    trace, before = Trace(model), model(rows)
    with bank.attached(layers):
        assert hook_count(model) > 0
        with bank.routed([(1.0, 0.0), (0.0, 1.0)]):
            assert not torch.equal(model(rows), before)
        assert torch.equal(model(rows), before)  # outside of `routed` the hooks do nothing
        with bank.routed([(0.0, 0.0)] * 2):
            assert torch.equal(model(rows), before)
    trace.check()
    assert torch.equal(model(rows), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, LoratorioError])
def test_an_exception_leaves_no_trace(error: type[BaseException]) -> None:
    model, layers, bank = model_and_bank()
    trace, rows = Trace(model), torch.randn(2, 6, 4, 4)
    before = model(rows)

    def sample() -> None:
        with bank.attached(layers), bank.routed([(1.0, 0.0), (0.0, 1.0)]):
            model(rows)
            raise error("in the middle of sampling")

    with pytest.raises(error):
        sample()
    trace.check()
    with bank.attached(layers):  # and the bank is as good as new
        assert torch.equal(model(rows), before)
        with bank.routed([(1.0, 0.0), (0.0, 1.0)]):
            assert not torch.equal(model(rows), before)
    trace.check()


def test_a_lora_that_does_not_fit_leaves_no_trace() -> None:
    model, layers, _ = model_and_bank()
    trace = Trace(model)
    good = Adapter("good", {"linear": [LowRank(torch.zeros(1, 6), torch.zeros(6, 1))]})
    for bad, words in (
        ({"nowhere": []}, "LoRA bad changes the layer nowhere, which this model does not have"),
        (
            {"linear": [LowRank(torch.zeros(1, 7), torch.zeros(6, 1))]},
            "does not fit the layer linear.*6×1.*1×7.*6×6",
        ),
        ({"linear": [LowRank(torch.zeros(2, 6), torch.zeros(6, 1))]}, "does not fit the layer linear"),
        ({"norm": [LowRank(torch.zeros(1, 6), torch.zeros(6, 1))]}, "does not fit the layer norm.*low-rank"),
        ({"conv": [Dense(torch.zeros(6, 6, 1, 1))]}, "does not fit the layer conv.*6×6×1×1.*6×6×3×3"),
        ({"norm": [Dense(bias=torch.zeros(5))]}, "does not fit the layer norm.*5.*6"),
        ({"conv": [LowRank(torch.zeros(1, 6, 3, 3), torch.zeros(6, 1, 3, 3))]}, "do not match each other"),
        ({"": [Dense(torch.zeros(6))]}, "a layer of type Model cannot take a LoRA"),
    ):
        bank = Bank([good, Adapter("bad", bad)])  # type: ignore[arg-type]
        with pytest.raises(LoratorioError, match=words), bank.attached({**layers, "": model}):
            pytest.fail("attached")
        trace.check()


def test_wrong_mixes_are_refused() -> None:
    _, layers, bank = model_and_bank()
    with bank.attached(layers), pytest.raises(ValueError, match="2 coefficients"), bank.routed([(1.0,)]):
        pytest.fail("routed")


@pytest.mark.parametrize("entries", [1, 3, 4])
def test_other_entries_than_rows_are_noticed(entries: int) -> None:
    model, layers, bank = model_and_bank()
    with (
        bank.attached(layers),
        bank.routed([(1.0, 0.0), (0.0, 1.0)]),
        pytest.raises(Regrouped, match=f"conv: {entries} entries for 2 rows"),
    ):
        model(torch.randn(entries, 6, 4, 4))


@given(
    st.sampled_from(sorted(LAYERS)),
    st.tuples(*[st.sampled_from([*KINDS, "absent"])] * 3),
    MIXES,
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_under_one_mix_a_layer_may_be_given_any_entries(
    layer_name: str, kinds: tuple[str, ...], mix: Mix, rows: int, entries: int
) -> None:
    random = torch.Generator().manual_seed(0)
    layer = LAYERS[layer_name]()
    adapters = [
        Adapter(f"lora{i}", {"layer": deltas_for(layer, kind, random)} if kind != "absent" else {})
        for i, kind in enumerate(kinds)
    ]
    given_to_it = rows_for(layer, entries, random)
    found = routed(Bank(adapters), layer, [mix] * rows, given_to_it)
    assert relative_error(found, row_by_row(layer, adapters, [mix], given_to_it)) < 1e-5


def test_the_source_tensors_stay_as_they_were() -> None:
    model, layers, bank = model_and_bank()
    before = copy.deepcopy(bank.adapters)
    with torch.no_grad(), bank.attached(layers), bank.routed([(1.0, 0.5), (0.5, -1.0)]):
        model(torch.randn(2, 6, 4, 4))
    for old, new in zip(before, bank.adapters, strict=True):
        for name, deltas in new.deltas.items():
            for mine, theirs in zip(deltas, old.deltas[name], strict=True):
                for attribute, tensor in vars(mine).items():
                    if isinstance(tensor, Tensor):
                        assert torch.equal(tensor, vars(theirs)[attribute])


# Ways in which torch runs a model


def reference_and_rows() -> tuple[Model, dict[str, nn.Module], Bank, list[Mix], Tensor, Tensor]:
    model, layers, bank = model_and_bank()
    mixes: list[Mix] = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    rows = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = []
    for mix, row in zip(mixes, rows, strict=True):
        own = Model().double()
        for name, layer in layers.items():
            setattr(own, name, merged(layer, bank.adapters, mix, name))
        expected.append(own(row[None].double()))
    return model, layers, bank, mixes, rows, torch.cat(expected).detach()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode: Any) -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    with mode(), bank.attached(layers), bank.routed(mixes):
        found = model(rows)
    assert relative_error(found, expected) < 1e-5


def test_from_inference_mode_to_gradients_while_attached() -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    with bank.attached(layers), bank.routed(mixes):
        with torch.inference_mode():
            assert relative_error(model(rows), expected) < 1e-5
        given = rows.clone().requires_grad_()
        found = model(given)
        found.square().sum().backward()
    assert relative_error(found.detach(), expected) < 1e-5
    assert given.grad is not None
    # The gradient is the merged model's, too.
    own = Model().double()
    for name, layer in layers.items():
        setattr(own, name, merged(layer, bank.adapters, mixes[3], name))
    last = rows[3:].double().requires_grad_()
    own(last).square().sum().backward()
    assert last.grad is not None
    assert relative_error(given.grad[3:], last.grad) < 1e-5


def test_loras_with_gradients_of_their_own() -> None:
    layer = nn.Linear(6, 6)
    down = nn.Parameter(torch.randn(2, 6))
    adapter = Adapter("a", {"layer": [LowRank(down, torch.randn(6, 2))]})
    bank = Bank([adapter])
    with bank.attached({"layer": layer}), bank.routed([(1.0,)]):
        layer(torch.randn(1, 6)).sum().backward()
    assert down.grad is None  # nothing is trained here


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16),
        bank.attached(layers),
        bank.routed(mixes),
    ):
        found = model(rows)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.detach(), expected) < 2e-2


def test_bfloat16_model() -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    model.bfloat16()
    with torch.no_grad(), bank.attached(layers), bank.routed(mixes):
        found = model(rows.bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 2e-2


def test_compiled_models_see_the_loras_and_are_compiled_again_afterwards() -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(rows)
        made = graphs
        assert made > 0
        for _ in range(2):
            with bank.attached(layers), bank.routed(mixes):
                found = compiled(rows)
            assert relative_error(found, expected) < 1e-5
            assert torch.equal(compiled(rows), before)
    assert graphs == made  # the compiled code was kept


def test_compiled_models_before_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, bank, mixes, rows, expected = reference_and_rows()
    monkeypatch.delattr(torch.compiler, "set_stance")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(rows)
        with bank.attached(layers):
            for order in ([0, 1, 2, 3], [3, 2, 1, 0]):  # code that is made with the hooks follows the routing
                with bank.routed([mixes[number] for number in order]):
                    found = compiled(rows[order])
                assert relative_error(found, expected[order]) < 1e-5
            assert torch.equal(compiled(rows), before)
        assert torch.equal(compiled(rows), before)


# What stays on the device


def test_parts_of_a_step_share_the_stack_of_the_whole() -> None:
    layer = nn.Linear(6, 6)
    random = torch.Generator().manual_seed(0)
    adapters = [Adapter(name, {"layer": [low_rank(layer, 2, random)]}) for name in "abc"]
    bank, solos = Bank(adapters), [tuple(float(i == j) for j in range(3)) for i in range(3)]
    with bank.attached({"layer": layer}):
        for mixes in (solos, solos[1:], solos[:1]):
            with bank.routed(mixes):
                layer(torch.randn(len(mixes), 6))
            assert sum(held(bank).values()) == bank.numbers


def test_one_loras_dense_change_is_not_copied() -> None:
    layer = nn.Linear(6, 6)
    weight = torch.randn(6, 6)
    bank = Bank([Adapter("a", {"layer": [Dense(weight)]}, strength=0.7)])
    rows = torch.randn(2, 6)
    with torch.no_grad(), bank.attached({"layer": layer}):
        plain = layer(rows)
        for factor in (1.0, 0.5):
            with bank.routed([(factor,)] * 2):
                torch.testing.assert_close(layer(rows), plain + 0.7 * factor * rows @ weight.T)
            assert not held(bank)


@pytest.mark.parametrize("kind", ["rank 3", "dense"])
def test_many_mixes_do_not_fill_the_memory(kind: str) -> None:
    layer = nn.Linear(6, 6)
    random = torch.Generator().manual_seed(0)
    bank = Bank([Adapter(name, {"layer": deltas_for(layer, kind, random)}) for name in "ab"])
    most = (
        layer.weight.numel() + 6
    )  # of what is made for one mix: a sum of the dense changes, or a factor for each rank
    rows = torch.randn(1, 6)
    with torch.no_grad(), bank.attached({"layer": layer}):
        for number in range(2 * PLANS + 3):
            mix = (1 + number / 1000, 0.5)
            with bank.routed([mix]):
                assert relative_error(layer(rows), row_by_row(layer, bank.adapters, [mix], rows)) < 1e-5
            assert sum(held(bank).values()) <= 2 * bank.numbers + PLANS * most
    assert not held(bank)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_no_loras_tensors_are_copied_into_mixes(share: float) -> None:
    """Four images, three LoRAs with a shared part, three rows a call: however rows are routed, each LoRA is on the device once."""
    layer = nn.Linear(6, 6)
    random = torch.Generator().manual_seed(0)
    bank = Bank(
        [
            Adapter(name, {"layer": [low_rank(layer, rank, random)]})
            for name, rank in zip("abc", (2, 2, 3), strict=True)
        ]
    )
    mixes = [(0.0,) * 3] * 4 + [
        tuple(max(share, float(i == j)) for j in range(3)) for i in range(3) for _ in range(8)
    ]
    with torch.no_grad(), bank.attached({"layer": layer}):
        for start in range(0, len(mixes), 3):
            part = mixes[start : start + 3]
            with bank.routed(part):
                rows = torch.randn(len(part), 6)
                assert relative_error(layer(rows), row_by_row(layer, bank.adapters, part, rows)) < 1e-5
        large = [
            numbers for numbers in held(bank).values() if numbers > 3 * 7
        ]  # than the factors of three rows
        assert sum(large) == bank.numbers == 2 * 6 * 7


def test_what_rows_share_is_added_once() -> None:
    """What rows have in common is one product for all of them: with each LoRA's rest in it where all rows have all LoRAs, else with one
    more product for the rests."""
    layer = nn.Linear(6, 6)
    random = torch.Generator().manual_seed(0)
    bank = Bank([Adapter(name, {"layer": [low_rank(layer, 2, random)]}) for name in "abc"])
    mixes = [(0.25,) * 3, *(tuple(1.0 if i == j else 0.25 for j in range(3)) for i in range(3))]
    with torch.no_grad(), bank.attached({"layer": layer}), bank.routed(mixes), Products() as everything:
        layer(torch.randn(4, 6))
    mixes = [tuple(1.0 if j in (0, i) else 0.0 for j in range(3)) for i in range(3)]
    with torch.no_grad(), bank.attached({"layer": layer}), bank.routed(mixes), Products() as common_and_rest:
        layer(torch.randn(3, 6))
    # One is the layer's own, and each of ours is down and up.
    assert (everything.count, common_and_rest.count) == (1 + 2, 1 + 2 * 2)


ATTENTION = ("to_q", "to_k", "to_v")


def attention(dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Module], Bank]:
    """Queries, keys and values, and three LoRAs of other ranks for them, of which one has no keys."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: nn.Linear(6, 40, dtype=dtype) for name in ATTENTION}
    random = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            lora,
            {
                name: [low_rank(layers[name], rank, random)]
                for name in ATTENTION
                if (lora, name) != ("c", "to_k")
            },
        )
        for lora, rank in (("a", 2), ("b", 3), ("c", 1))
    ]
    return layers, Bank(adapters)


SHARED_PARTS: list[Mix] = [(0.25, 0.25, 0.25), (1.0, 0.25, 0.25), (0.25, 1.0, 0.5), (0.0, 0.0, 0.0)]


def expected_of(layer: nn.Module, bank: Bank, name: str, rows: Tensor) -> Tensor:
    return torch.cat(
        [
            merged(layer, bank.adapters, mix, name)(rows[i : i + 1].double())
            for i, mix in enumerate(SHARED_PARTS)
        ]
    )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_with_the_same_input_share_a_product(mode: Any, dtype: torch.dtype, limit: float) -> None:
    layers, bank = attention(dtype)
    mixes = SHARED_PARTS[:2] + SHARED_PARTS[3:]
    counts = []
    with mode(), bank.attached(layers):
        for seed in range(3):
            rows = torch.randn(len(SHARED_PARTS), 4, 6, generator=torch.Generator().manual_seed(seed)).to(
                dtype
            )
            with bank.routed(SHARED_PARTS), Products() as products:
                found = {name: layers[name](rows) for name in ATTENTION}
            counts.append(products.count)
            for name in ATTENTION:
                assert relative_error(found[name], expected_of(layers[name], bank, name, rows)) < limit
        rows = rows[:3]
        with bank.routed(mixes):  # another routing uses the same matrices
            for name in ATTENTION:
                layers[name](rows)
        large = [numbers for numbers in held(bank).values() if numbers > 80]  # than the factors of the rows
    # In the first call each layer has its own, down and up; then one down serves all.
    assert counts == [3 + 3 * 2, 3 + 1 + 3, 3 + 1 + 3]
    assert sum(large) == bank.numbers


def test_layers_whose_input_is_not_the_same_any_more() -> None:
    layers, bank = attention()
    rows, other = torch.randn(2, len(SHARED_PARTS), 4, 6)
    with torch.no_grad(), bank.attached(layers):
        with bank.routed(SHARED_PARTS):
            for name in ATTENTION:
                layers[name](rows)
        for order in ((rows, other, rows), (rows, other, other), (other, rows.clone(), other.clone())):
            with bank.routed(SHARED_PARTS):
                for name, given_to_it in zip(ATTENTION, order, strict=True):
                    expected = expected_of(layers[name], bank, name, given_to_it)
                    assert relative_error(layers[name](given_to_it), expected) < 1e-6
        with bank.routed(SHARED_PARTS):
            for name in ATTENTION:  # the same tensor, with other numbers in it
                assert relative_error(layers[name](rows), expected_of(layers[name], bank, name, rows)) < 1e-6
                rows.mul_(1.5)


def test_a_call_that_fails_leaves_nothing_of_it_in_memory() -> None:
    layers, bank = attention()
    rows = torch.randn(len(SHARED_PARTS), 4, 6)
    with torch.no_grad(), bank.attached(layers):
        with bank.routed(SHARED_PARTS):
            for name in ATTENTION:
                layers[name](rows)
        before = sum(held(bank).values())
        with pytest.raises(Regrouped), bank.routed(SHARED_PARTS):
            layers["to_v"](layers["to_q"](rows)[:3, :, :6])
        assert sum(held(bank).values()) == before


def test_a_prepared_bank_makes_nothing_at_the_first_call() -> None:
    layer = nn.Linear(6, 6)
    bank = Bank(
        [Adapter(name, {"layer": [low_rank(layer, 2, torch.Generator().manual_seed(0))]}) for name in "ab"]
    )
    with torch.no_grad(), bank.attached({"layer": layer}):
        bank.prepare(layer.weight.device, layer.weight.dtype)
        before = held(bank)
        assert sum(before.values()) == bank.numbers
        with bank.routed([(1.0, 0.0), (0.0, 1.0)]):
            layer(torch.randn(2, 6))
        assert held(bank) == before


def test_candidates_that_are_not_used_leave_the_device() -> None:
    layer = nn.Linear(6, 6)
    random = torch.Generator().manual_seed(0)
    bank = Bank(
        [
            Adapter(str(number), {"layer": [low_rank(layer, 2, random), dense(layer, random)]})
            for number in range(9)
        ]
    )
    bank.keep_apart(range(1, 9), most=3)
    with torch.no_grad(), bank.attached({"layer": layer}):
        for number in [*range(1, 9), 6, 7]:
            mixes = [tuple(float(i in (0, number)) for i in range(9))]
            with bank.routed(mixes):
                rows = torch.randn(1, 6)
                assert relative_error(layer(rows), row_by_row(layer, bank.adapters, mixes, rows)) < 1e-5
            assert sum(held(bank).values()) <= bank.numbers == 4 * (2 * 2 * 6 + 6 * 6 + 6)
        before = held(bank)
        for number in (8, 6, 7):  # the last ones used are there
            with bank.routed([tuple(float(i in (0, number)) for i in range(9))]):
                layer(torch.randn(1, 6))
        assert held(bank) == before
        # More than may stay are used at once: they all are there for as long.
        everyone = [tuple(float(i == number) for i in range(9)) for number in range(9)]
        with bank.routed(everyone):
            rows = torch.randn(9, 6)
            assert relative_error(layer(rows), row_by_row(layer, bank.adapters, everyone, rows)) < 1e-5
