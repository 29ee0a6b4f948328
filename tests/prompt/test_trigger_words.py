"""The words that call a LoRA, and what a pool takes by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio.prompt.roles import TaggedLora, chosen_from_pool
from loratorio.prompt.trigger_words import called, callers, words_of

PHRASE_KEY = "modelspec.trigger_phrase"
PHRASE = {"modelspec.trigger_phrase": "zorb, a red cap"}
TAGS = {
    "ss_tag_frequency": json.dumps({"10_zorb": {"zorb": 20, "solo": 11, "hat": 3}, "5_more": {"zorb ": 4}})
}


def beside(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"x{'.civitai.info' if name == 'civitai' else '.json'}").write_text(text, encoding="utf-8")
    return folder / "x.safetensors"


def test_where_the_words_come_from(tmp_path: Path) -> None:
    assert words_of({**PHRASE, **TAGS}) == ["zorb", "a red cap"]
    assert words_of(TAGS) == ["zorb"]
    assert words_of({}) == []
    file = beside(tmp_path, civitai={"trainedWords": ["glorp, <lora:x:1>", "green man"]})
    assert words_of(TAGS, file) == ["glorp", "green man"]
    beside(tmp_path, json={"activation text": "kakto, <lora:x:0.8>", "preferred weight": 1})
    assert words_of(TAGS, file) == ["kakto"]
    # What somebody has written counts more than what came with the file.
    assert words_of({**PHRASE, **TAGS}, file) == ["kakto"]
    # A WebUI writes the file also where nobody typed an activation text.
    beside(tmp_path, json={"activation text": ""})
    assert words_of(TAGS, file) == ["glorp", "green man"]
    assert words_of(PHRASE, file) == ["zorb", "a red cap"]
    # WebUIs have read the table already.
    assert words_of({"ss_tag_frequency": json.loads(TAGS["ss_tag_frequency"])}) == ["zorb"]


def test_descriptions_are_no_trigger_words() -> None:
    long, many = "a" * 101, ",".join(f"x{i}" for i in range(200))
    assert words_of({"modelspec.trigger_phrase": f"zorb, {long}"}) == ["zorb"]
    assert len(words_of({"modelspec.trigger_phrase": many})) == 100
    assert words_of({"ss_tag_frequency": json.dumps({"a": {"b" * 1_000_001: 1}})}) == []


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", "null", '{"activation text": 3}', '{"trainedWords": {"a": 1}}', "[" * 100_000]
)
def test_files_beside_that_cannot_be_read_are_passed_over(tmp_path: Path, content: str) -> None:
    file = beside(tmp_path, json=content, civitai=content)
    assert words_of(TAGS, file) == ["zorb"]
    if "trainedWords" not in content:
        assert words_of({"ss_tag_frequency": content}, file) == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    ),
    st.sampled_from([PHRASE_KEY, "ss_tag_frequency", "ss_dataset_dirs"]),
)
def test_any_metadata_is_some_words_or_none(value: Any, key: str) -> None:
    """Also as a WebUI has read it, where any value may be any JSON."""
    for stored in (value, json.dumps(value)):
        words = words_of({**TAGS, key: stored})
        assert all(isinstance(word, str) and word for word in words)


def test_words_are_called_whole_and_in_any_case() -> None:
    assert called(["zorb", "a red cap", "c++"], "A ZORB, a red cap") == ["zorb", "a red cap"]
    assert called(["orb", "cap"], "a zorb in a cape") == []
    assert called(["c++"], "in c++, code") == ["c++"]
    assert called(["red cap", "cap"], "a red_cap, cap-like") == ["red cap"]


def test_a_word_of_most_of_the_pool_calls_nobody() -> None:
    words = [["zorb", "solo"], ["glorp", "Solo"], ["kakto", "solo"], []]
    assert callers(words, "zorb, solo") == [["zorb"], [], [], []]
    assert callers([["zorb"]], "zorb") == [["zorb"]]


def pool(*loras: tuple[str, str], **options: str) -> list[TaggedLora]:
    return [
        TaggedLora(name, {"pool": "1", **options}, {"modelspec.trigger_phrase": phrase} if phrase else {})
        for name, phrase in loras
    ]


def test_the_prompt_chooses_from_a_pool() -> None:
    named = TaggedLora("ink")
    loras = [
        named,
        *pool(("cat", "mimsy"), ("alien", "glorp"), ("night", "lunara"), ("plain", ""), role="style"),
    ]
    taken, note = chosen_from_pool(loras, "mimsy, lunara background")
    assert list(taken) == [0, 1, 3, 4]
    assert [lora.is_candidate for lora in taken.values()] == [False, False, False, True]
    assert taken[1].options == {"role": "style"}
    assert (
        note
        == "Chosen from the pool by their trigger words: cat (mimsy), night (lunara). 1 with other trigger words was not used."
    )
    # Where it calls none, divergence decides on all, as where no words are known.
    assert chosen_from_pool(loras, "a house") == (dict(enumerate(loras)), "")
    assert chosen_from_pool([named], "mimsy") == ({0: named}, "")
    unknown = pool(("a", ""), ("b", ""))
    assert chosen_from_pool(unknown, "a b") == (dict(enumerate(unknown)), "")
