"""A step of LoRAs with places, from rows to the composed prediction."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.compose.mixes import NO_WORDS, STYLE_SHARE, Mix, Participants, Words
from loratorio.compose.regions import Box, Place
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Composition, Engine
from loratorio.sampling.step import Step
from tests.published import paper

SHAPE = (4, 6, 9)
LEFT, RIGHT = Place((Box(0, 0, 4 / 9, 1),)), Place((Box(4 / 9, 0, 1, 1),))
NEARLY, THIN = Place((Box(0.2, 0, 4 / 9, 1),)), Place((Box(0.2, 0, 0.38, 1),))
"""With RIGHT they leave 20 and 26 % of the picture."""
EVERYWHERE = Place((Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)), 0.1)
IN_LEFT, IN_RIGHT = slice(0, 4), slice(4, 9)


class FakeModel:
    """Predicts a fixed random tensor for each kind of row; what one LoRA predicts can be changed in a part of the picture."""

    def __init__(self, changed: int | None = None, part: slice = slice(0, 0)) -> None:
        self.asked: list[Row] = []
        self._changed, self._part = changed, part

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        self.asked += rows
        return torch.stack([self.predicted(row.mix, row.cond, row.slot, row.words) for row in rows])

    def predicted(self, mix: Mix, cond: bool, slot: int = 0, words: Words = NO_WORDS) -> Tensor:
        seed = hash((mix, cond, slot, words)) % 2**31
        made = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        if self._changed is not None and mix[self._changed] > 0:
            made[..., self._part] += 7.0
        return made


def step(
    participants: Participants,
    model: FakeModel | None = None,
    batch: int = 1,
    uncond: bool = True,
    **knobs: object,
) -> Composition:
    count = len(participants.base)
    engine = Engine(paper(**knobs), Bank([Adapter(str(i), {}) for i in range(count)]), participants)  # type: ignore[arg-type]
    latents = torch.zeros(batch, *SHAPE)
    return engine.step(Step(0, 20, latents, batch if uncond else 0, denoised=False), model or FakeModel())


KNOBS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["loratorio", "loratorio", "composite", "w_composite"]),
        "recentre": st.sampled_from([0.0, 0.5, 1.0]),
        "share": st.sampled_from([0.0, 0.2, 1.0]),
        "blend": st.sampled_from(["hard", "interpolated", "overlapping"]),
        "patch_size": st.integers(1, 4),
        "temperature": st.sampled_from([0.001, 0.1]),
        "top_k": st.integers(0, 2),
    }
)


@given(KNOBS, st.integers(1, 3), st.booleans())
@settings(max_examples=40)
def test_places_that_are_everywhere_are_no_places(knobs: dict[str, object], batch: int, uncond: bool) -> None:
    # A placed LoRA is in no other's rows, so that a shared part is another picture.
    knobs = {**knobs, "share": 0.0}
    placed = step(Participants.of(3, places={0: EVERYWHERE, 2: EVERYWHERE}), None, batch, uncond, **knobs)
    plain = step(Participants.of(3), None, batch, uncond, **knobs)
    assert torch.equal(placed.cond, plain.cond)
    if uncond:
        assert placed.uncond is not None
        assert plain.uncond is not None
        assert torch.equal(placed.uncond, plain.uncond)


@given(KNOBS, st.booleans(), st.sampled_from(["content", "style", "always", "pooled"]))
@settings(max_examples=60)
def test_a_lora_has_no_say_outside_its_place(knobs: dict[str, object], uncond: bool, kind: str) -> None:
    """Whatever it predicts there, and whatever is shared: the others' places stay the same in every bit."""
    participants = Participants.of(
        3,
        places={0: LEFT, 1: RIGHT},
        styles=[0] if kind == "style" else (),
        always=[0] if kind == "always" else (),
        pooled=[0, 2] if kind == "pooled" else (),
    )
    plain = step(participants, FakeModel(), uncond=uncond, **knobs)
    changed = step(participants, FakeModel(changed=0, part=slice(0, 9)), uncond=uncond, **knobs)
    assert torch.equal(plain.cond[..., IN_RIGHT], changed.cond[..., IN_RIGHT])
    assert not torch.equal(plain.cond[..., IN_LEFT], changed.cond[..., IN_LEFT])
    if uncond:
        assert plain.uncond is not None
        assert changed.uncond is not None
        assert torch.equal(plain.uncond[..., IN_RIGHT], changed.uncond[..., IN_RIGHT])


@pytest.mark.parametrize("method", ["loratorio", "composite"])
@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
def test_where_none_acts_the_base_speaks(method: str, recentre: float) -> None:
    model = FakeModel()
    participants = Participants.of(1, places={0: LEFT})
    result = step(participants, model, method=method, recentre=recentre)
    own, base = participants.mixes[0], participants.base
    torch.testing.assert_close(result.cond[0, ..., IN_LEFT], model.predicted(own, True)[..., IN_LEFT])
    torch.testing.assert_close(result.cond[0, ..., IN_RIGHT], model.predicted(base, True)[..., IN_RIGHT])
    assert result.uncond is not None
    torch.testing.assert_close(result.uncond[0, ..., IN_RIGHT], model.predicted(base, False)[..., IN_RIGHT])
    expected = torch.lerp(model.predicted(own, False), model.predicted(base, False), recentre)
    torch.testing.assert_close(result.uncond[0, ..., IN_LEFT], expected[..., IN_LEFT])


def test_between_them_it_is_continuous() -> None:
    model, place = FakeModel(), Place((Box(0, 0, 4 / 9, 1),), 0.5)
    participants = Participants.of(1, places={0: place})
    result = step(participants, model, recentre=1.0)
    mask = place.mask(*SHAPE[1:])
    own, base = (model.predicted(mix, True) for mix in (participants.mixes[0], participants.base))
    torch.testing.assert_close(result.cond[0], mask * own + (1 - mask) * base)
    assert len(set(mask[0].tolist())) > 3


@pytest.mark.parametrize("recentre", [0.0, 0.5, 1.0])
def test_a_style_with_a_place_is_added_there(recentre: float) -> None:
    model = FakeModel()
    participants = Participants.of(2, styles=[1], places={1: RIGHT})
    result = step(participants, model, recentre=recentre)
    single, base, styled = (1.0, 0.0), (0.0, 0.0), (0.0, STYLE_SHARE)
    difference = model.predicted(styled, True) - model.predicted(base, True)
    expected = model.predicted(single, True) + RIGHT.mask(*SHAPE[1:]) * difference
    torch.testing.assert_close(result.cond[0], expected)
    assert result.weights is not None
    assert torch.equal(result.weights[1, 0], RIGHT.mask(*SHAPE[1:]))
    difference = model.predicted(styled, False) - model.predicted(base, False)
    uncond = torch.lerp(model.predicted(single, False), model.predicted(base, False), recentre)
    assert result.uncond is not None
    torch.testing.assert_close(result.uncond[0], uncond + RIGHT.mask(*SHAPE[1:]) * difference)


def test_what_always_acts_in_a_place_acts_in_both_predictions() -> None:
    model = FakeModel()
    result = step(Participants.of(2, always=[1], places={1: RIGHT}), model, recentre=1.0)
    mask = RIGHT.mask(*SHAPE[1:])
    for composed, cond in ((result.cond, True), (result.uncond, False)):
        assert composed is not None
        first = model.predicted((1.0, 0.0) if cond else (0.0, 0.0), cond)
        difference = model.predicted((0.0, 1.0), cond) - model.predicted((0.0, 0.0), cond)
        torch.testing.assert_close(composed[0], first + mask * difference)


def test_own_words_are_in_the_loras_own_conditional_rows_alone() -> None:
    model = FakeModel()
    participants = Participants.of(3, places={0: LEFT}, words={0: Words("red dress"), 1: Words("hat")})
    step(participants, model, share=0.3, batch=2)
    for row in model.asked:
        own = [number for number in (0, 1) if row.mix[number] == 1.0]
        assert row.words == ((Words("red dress"), Words("hat"))[own[0]] if own and row.cond else NO_WORDS)
        assert sum(part > 0 for part in row.mix[:2]) <= 1  # private: in no other's rows
    assert {row.words for row in model.asked} == {NO_WORDS, Words("red dress"), Words("hat")}


@pytest.mark.parametrize(
    ("places", "words", "base", "free"),
    [
        ({0: LEFT, 1: RIGHT}, {0: "red dress", 1: "hat"}, "red dress, hat", "red dress, hat"),
        ({0: LEFT, 1: RIGHT}, {0: "red dress"}, "red dress", "red dress"),
        ({0: LEFT, 1: RIGHT}, {0: "red dress", 2: "hills"}, "", "hills"),
        ({0: LEFT, 1: RIGHT}, {0: "hat", 1: "hat"}, "hat", "hat"),
        ({0: NEARLY, 1: RIGHT}, {0: "red dress", 1: "hat"}, "red dress, hat", "red dress, hat"),
        ({0: THIN, 1: RIGHT}, {0: "red dress", 1: "hat"}, "", ""),
        # Beside the place it is seen alone: another's words have no business there.
        ({0: LEFT}, {0: "red dress"}, "", ""),
        ({0: LEFT, 1: LEFT}, {0: "red dress", 1: "hat"}, "", ""),
    ],
)
def test_where_places_leave_no_room_all_own_words_are_read(
    places: dict[int, Place], words: dict[int, str], base: str, free: str
) -> None:
    model = FakeModel()
    participants = Participants.of(3, places=places, words={i: Words(own) for i, own in words.items()})
    step(participants, model, share=0.0, recentre=0.5)
    read = {row.mix: row.words.own for row in model.asked if row.cond}
    assert read[0.0, 0.0, 0.0] == base
    assert read[0.0, 0.0, 1.0] == free
    assert read[1.0, 0.0, 0.0] == words[0]
    assert all(row.words == NO_WORDS for row in model.asked if not row.cond)


def test_without_a_lora_over_all_places_the_base_reads_the_common_prompt() -> None:
    model = FakeModel()
    step(Participants.of(2, places={0: LEFT, 1: RIGHT}, words={0: Words("hat")}), model)
    assert {row.words for row in model.asked if not any(row.mix)} == {NO_WORDS}


def test_a_style_with_a_place_and_its_reference_read_the_same() -> None:
    """Else the words' effect would be added with the style's."""
    model = FakeModel()
    places = {0: LEFT, 1: RIGHT, 3: RIGHT}
    step(Participants.of(4, styles=[3], places=places, words={0: Words("hat")}), model)
    read = {row.mix: row.words.own for row in model.asked if row.cond}
    assert read[0.0, 0.0, 0.0, 0.9] == read[0.0, 0.0, 0.0, 0.0] == "hat"


def test_a_batch_with_and_and_five_dimensions() -> None:
    """Every conditional row and every frame has the same places."""
    engine = Engine(
        paper(), Bank([Adapter("a", {}), Adapter("b", {})]), Participants.of(2, places={0: LEFT, 1: RIGHT})
    )
    latents = torch.zeros(3, 4, 2, 6, 9)

    def predict(rows: Sequence[Row]) -> Tensor:
        value = torch.tensor([row.mix[0] + 10 * row.mix[1] for row in rows])
        return value.view(-1, 1, 1, 1, 1).expand(len(rows), 4, 2, 6, 9) + torch.rand(4, 2, 6, 9) * 1e-3

    result = engine.step(Step(0, 20, latents, 2, owners=(0, 0, 1), denoised=False), predict)
    assert result.cond.shape == latents.shape
    assert (result.cond[..., IN_LEFT] - 1).abs().max() < 0.01
    assert (result.cond[..., IN_RIGHT] - 10).abs().max() < 0.01
    assert result.uncond is not None
    assert result.uncond.shape == (2, 4, 2, 6, 9)
