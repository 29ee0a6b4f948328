"""Where a tag says that a LoRA may act, and what is said where it cannot be read."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import NO_WORDS, Participants, Words
from loratorio.compose.regions import WHOLE, Box, Place
from loratorio.errors import LoratorioError
from loratorio.prompt.places import EDGE, NAMED, read_place, written
from loratorio.prompt.roles import TaggedLora, participants_of
from loratorio.sampling.engine import check_places
from tests.published import paper


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("left", Place((Box(0, 0, 0.5, 1),), EDGE)),
        (" Right ", Place((Box(0.5, 0, 1, 1),), EDGE)),
        ("center~0", Place((Box(0.25, 0.25, 0.75, 0.75),), 0.0)),
        ("topleft+bottom-right~0.25", Place((Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)), 0.25)),
        ("0,.1, 0.3,1.0~0.05", Place((Box(0, 0.1, 0.3, 1),), 0.05)),
        ("auto", Place((WHOLE,), EDGE, sought=True)),
        (" Auto~0.05", Place((WHOLE,), 0.05, sought=True)),
        ("0,0,1,1", None),
        ("left+0,0,1,1~0.2", None),
        ("left+right", None),
        ("bottom+top~0.3", None),
        ("top-left+0,0.5,1,1+0.4,0,1,0.6", None),
    ],
)
def test_how_a_place_is_written(value: str, place: Place | None) -> None:
    assert read_place(value, "alice") == place


@pytest.mark.parametrize("value", ["0,0,0.517,1", "0.25,0,1,0.333+0,0.5,1,1~0.05"])
def test_a_place_is_written_as_it_is_read(value: str) -> None:
    place = read_place(value, "alice")
    assert place is not None
    assert written(place) == value


_SIDES = list(combinations((0.0, 0.25, 0.5, 0.75, 1.0), 2))


@given(
    st.lists(
        st.builds(
            lambda across, down: (across[0], down[0], across[1], down[1]),
            st.sampled_from(_SIDES),
            st.sampled_from(_SIDES),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_place_is_none_where_its_boxes_leave_nothing_of_the_picture(boxes: list[tuple[float, ...]]) -> None:
    place = read_place("+".join(",".join(map(str, box)) for box in boxes) + "~0", "alice")
    drawn = Place(tuple(Box(*box) for box in boxes), 0.0)
    whole = bool((drawn.mask(4, 4) == 1).all())
    assert place == (None if whole else drawn)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("lefft", "did you mean left"),
        ("", "is not one of left, right"),
        ("left+", "is not one of"),
        ("auto+left", "is not one of"),
        ("autp", "did you mean auto"),
        ("left~", "the edge after ~ must be"),
        ("left~0.6", "0 to 0.5"),
        ("left~-1", "the edge after ~ must be"),
        ("left~nan", "the edge after ~ must be"),
        ("0,0,1", "is not one of"),
        ("0,0,2,1", "from 0 to 1"),
        ("0,0,nan,1", "from 0 to 1"),
        ("0.5,0,0.5,1", "is empty: x1 must be greater than x0"),
        ("0,1,1,0", "is empty: x1 must be greater than x0"),
    ],
)
def test_a_bad_place_is_a_sentence_that_shows_a_right_one(value: str, why: str) -> None:
    with pytest.raises(LoratorioError, match="LoRA alice") as said:
        read_place(value, "alice")
    assert why in str(said.value)
    assert "at=left" in str(said.value)
    with pytest.raises(LoratorioError, match="cannot be read"):
        participants_of([TaggedLora("alice", {"at": value})])


@given(st.text(max_size=30))
def test_anything_is_a_place_or_a_sentence(value: str) -> None:
    try:
        place = read_place(value, "alice")
    except LoratorioError:
        return
    assert place is None or all(0 <= each <= 1 for box in place.boxes for each in box)


def test_the_sentences_examples_can_be_read() -> None:
    with pytest.raises(LoratorioError) as said:
        read_place("?", "alice")
    examples = [part.rstrip(".,") for part in str(said.value).split() if part.startswith("at=")][1:]
    assert len(examples) == 4
    for example in examples:
        assert read_place(example.removeprefix("at="), "alice") is not None
    assert all(read_place(name, "alice") for name in NAMED)


def test_participants_know_places_and_words() -> None:
    loras = [
        TaggedLora("alice", {"at": "left", "words": " red dress, long hair "}),
        TaggedLora("night"),
        TaggedLora("lcm", {"role": "always", "at": "top"}),
        TaggedLora("ink", {"role": "style", "at": "right~0"}),
    ]
    participants = participants_of(loras)
    assert [lora.place for lora in participants.loras] == [
        read_place("left", ""),
        None,
        read_place("right~0", ""),
    ]
    assert [lora.words for lora in participants.loras] == [Words("red dress, long hair"), NO_WORDS, NO_WORDS]
    assert participants.base == (0.0, 0.0, 0.0, 0.0)  # what always acts, but in a place, is in no mix
    assert [each.number for each in participants.additions] == [2]
    shared = participants.with_shared_parts(0.5)
    assert shared.numbers == [0, 1]
    # Of those that are left only night is shared: the others are private.
    assert shared.mixes == [(1.0, 0.5, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)]
    assert shared.reference == (0.0, 0.5, 0.0, 0.0)
    assert [(each.number, each.mix) for each in shared.additions] == [
        (2, (0.0, 0.5, 1.0, 0.0)),
        (3, (0.0, 0.5, 0.0, 0.9)),
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("option", ["at=left", "words=red", "at=0,0,1,1"])
def test_places_need_a_method_with_rows_for_each_lora(method: str, option: str) -> None:
    name, _, value = option.partition("=")
    participants = participants_of([TaggedLora("alice", {name: value}), TaggedLora("bob")])
    settings = paper(method=method)
    if METHODS[method].takes_places or option == "at=0,0,1,1":
        check_places(settings, participants)
    else:
        with pytest.raises(
            LoratorioError,
            match=r"do not work with .*LoRAtorio, LoRAtorio by divergence, Composite or W-Composite, or remove them",
        ):
            check_places(settings, participants)


def test_places_hold_in_every_step() -> None:
    placed = participants_of([TaggedLora("alice", {"at": "left"})])
    with pytest.raises(LoratorioError, match="start"):
        check_places(paper(start=0.2), placed)
    check_places(paper(start=0.2), Participants.of(2))
