"""What a LoRA's passes read: own words before the prompt, and the words of LoRAs in other places left out of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio.compose.mixes import NO_WORDS, Words
from loratorio.prompt.own_words import reading, with_words
from loratorio.prompt.roles import TaggedLora, participants_of


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a man", "red dress, a man"),
        ("", "red dress"),
        ("a man AND a dog", "red dress, a man AND red dress, a dog"),
        ("a man :0.7 AND a dog: 1.2", "red dress, a man :0.7 AND red dress, a dog: 1.2"),
        ("AND a dog", "red dress AND red dress, a dog"),
        ("a man AND AND", "red dress, a man AND red dress AND red dress"),
        ("BRAND new", "red dress, BRAND new"),
        ("a [b:c:0.5] (d:1.2)", "red dress, a [b:c:0.5] (d:1.2)"),
    ],
)
def test_every_part_of_the_prompt_begins_with_own_words(prompt: str, expected: str) -> None:
    assert with_words(prompt, Words("red dress")) == expected
    assert with_words(prompt, NO_WORDS) == prompt


@given(
    st.lists(st.sampled_from(["AND", " ", "a", ":0.5", "(b)", "\n"]), max_size=9),
    st.sampled_from(["hat", "(hat:1.2)"]),
)
def test_own_words_leave_the_number_of_parts(pieces: list[str], words: str) -> None:
    prompt = "".join(pieces)
    parts = re.split(r"\bAND\b", with_words(prompt, Words(words)))
    assert len(parts) == len(re.split(r"\bAND\b", prompt))
    assert all(words in part for part in parts)


@pytest.mark.parametrize(
    ("prompt", "phrase", "expected"),
    [
        ("mimsy, glorp, sky", "glorp", "mimsy, , sky"),
        ("a Glorp, GLORP's hat", "glorp", "a ,  hat"),
        ("glorps, eglorp, glorp-like, glorp_2", "glorp", "glorps, eglorp, glorp-like, glorp_2"),
        ("a red  dragon\ngirl, a dragon", "red dragon girl", "a , a dragon"),
        ("a red_dragon_girl", "red dragon girl", "a "),
        ("red BREAK dragon girl AND red", "red dragon", "red BREAK dragon girl AND red"),
        ("a (red dragon girl:1.2), sky", "red dragon girl", "a (:1.2), sky"),
        ("a red ((dragon)) girl, sky", "red dragon girl", "a (()), sky"),
        ("[glorp], [a:glorp:0.5], [glorp|b], [glorp::5]", "glorp", "[], [a::0.5], [|b], [::5]"),
        ("(a:0.5), b :0.5 AND c:0.5", "0.5", "(a:0.5), b :0.5 AND c:0.5"),
        ("glorp BREAK a glorp AND glorp :0.6", "glorp", " BREAK a  AND  :0.6"),
        (r"saber \(fate\), sky", r"saber \(fate\)", ", sky"),
        (r"saber \(fate\), sky", "saber (fate)", ", sky"),
        ("saber (fate:1.1), saber", "(saber (fate):1.3)", "(:1.1), saber"),
        ("glorp", "glorp", "glorp"),
        ("(glorp:1.2), [], BREAK", "glorp", "(glorp:1.2), [], BREAK"),
        ("a c++, c+", "c++", "a , c+"),
        ("a, sky", "(:1.2)", "a, sky"),
        ("a, sky", r".*\(", "a, sky"),
    ],
)
def test_a_phrase_is_left_out_as_whole_words(prompt: str, phrase: str, expected: str) -> None:
    assert with_words(prompt, Words(without=(phrase,))) == expected


def test_the_longest_phrase_has_its_words() -> None:
    prompt = "red dragon girl and a dragon"
    assert (
        with_words(prompt, Words(without=("dragon",), but=("red dragon girl",))) == "red dragon girl and a "
    )
    assert with_words(prompt, Words(without=("red dragon girl",), but=("dragon",))) == " and a dragon"
    assert (
        with_words(prompt, Words(without=("(dragon:1.35000000)",), but=("red dragon girl",)))
        == "red dragon girl and a "
    )
    assert with_words(prompt, Words("hat", ("dragon",))) == "hat, red  girl and a "


PIECES = [
    "glorp",
    "mimsy",
    "red dragon",
    "hat",
    "(",
    ")",
    "[",
    "]",
    ":1.2)",
    ":0.5]",
    ", ",
    " ",
    "|",
    "BREAK",
    "AND",
    r"\(",
    r"\)",
    ":0.7",
]
MARK = re.compile(r"\\.|BREAK|AND|[()\[\]|,:]|\d\.\d")


@given(
    st.lists(st.sampled_from(PIECES), max_size=20), st.sets(st.sampled_from(["glorp", "red dragon", "hat"]))
)
def test_only_words_of_the_phrases_go(pieces: list[str], phrases: set[str]) -> None:
    prompt = " ".join(pieces)
    left = with_words(prompt, Words(without=tuple(phrases)))
    words = re.findall("[a-z]+", prompt)
    wanted = []
    while words:
        phrase = next((each for each in phrases if words[: len(each.split())] == each.split()), None)
        if phrase is None:
            wanted.append(words.pop(0))
        else:
            del words[: len(phrase.split())]
    if wanted:
        assert re.findall("[a-z]+", left) == wanted
        assert MARK.findall(left) == MARK.findall(prompt)
    else:
        assert left == prompt


@given(st.text(), st.text(), st.text())
def test_any_text_can_be_read(prompt: str, phrase: str, other: str) -> None:
    left = with_words(prompt, Words(without=(phrase,), but=(other,)))
    assert left == prompt or len(left) < len(prompt)
    assert with_words(prompt, Words(without=(phrase,), but=(phrase,))) == prompt


# -- whose words ------------------------------------------------------------------------------------------------------


def lora(name: str, phrase: str = "", **options: str) -> TaggedLora:
    return TaggedLora(name, options, {"modelspec.trigger_phrase": phrase} if phrase else {})


def read(loras: list[TaggedLora], *prompts: str) -> list[str]:
    """The first prompt as each LoRA's passes read it."""
    words = participants_of(reading(loras, prompts)).words
    return [with_words(prompts[0], words[number]) for number in range(len(loras))]


CAT, ALIEN = lora("cat", "mimsy", at="left"), lora("alien", "glorp", at="right")


def test_loras_in_other_places_keep_their_words() -> None:
    prompt = "mimsy, glorp, lunara sky"
    night = lora("night", "lunara")
    assert read([CAT, ALIEN, night], prompt) == ["mimsy, , lunara sky", ", glorp, lunara sky", prompt]
    # Without a place of its own, or without another, all of the prompt is common.
    for loras in ([CAT, lora("alien", "glorp")], [CAT, lora("alien", "glorp", at="0,0,1,1")], [CAT, night]):
        assert read(loras, prompt) == [prompt] * 2
    # What its tag says is what it reads, before all of the prompt.
    assert read([lora("cat", "mimsy", at="left", words="hat"), ALIEN], prompt) == [
        f"hat, {prompt}",
        ", glorp, lunara sky",
    ]
    # Nothing left out: the same text, made once.
    assert [lora.words for lora in reading([CAT, ALIEN], ["sky"])] == [NO_WORDS, NO_WORDS]
    assert read([CAT, ALIEN], "glorp") == ["glorp", "glorp"]


def test_shared_words_stay() -> None:
    cat, alien = lora("cat", "mimsy, girl, solo", at="left"), lora("alien", "glorp, Girl", at="right")
    assert read([cat, alien], "girl, mimsy, glorp, solo") == ["girl, mimsy, , solo", "girl, , glorp, "]
    # The background is where both are.
    assert read([CAT, ALIEN, lora("night", "glorp")], "mimsy, glorp") == [
        "mimsy, glorp",
        ", glorp",
        "mimsy, glorp",
    ]
    robot = lora("robot", "zorbo, girl", at="top")
    assert read([CAT, robot, lora("alien", "girl", at="bottom")], "mimsy, girl")[0] == "mimsy, girl"


def test_places_inside_each_other_share_their_words() -> None:
    prompt = "mimsy, glorp, shrumi"
    hat = lora("hat", "shrumi", at="top-left")
    assert read([CAT, ALIEN, hat], prompt) == ["mimsy, , shrumi", ", glorp, ", "mimsy, , shrumi"]
    twice = lora("cat2", "mimsy", at="left~0")
    assert read([CAT, ALIEN, twice], "mimsy, glorp") == ["mimsy, ", ", glorp", "mimsy, "]
    corner = lora("hat", "shrumi", at="0.4,0,0.6,0.3")
    assert read([CAT, ALIEN, corner], prompt) == ["mimsy, , ", ", glorp, ", ", , shrumi"]


def test_every_picture_of_a_batch_has_its_own_prompt() -> None:
    (cat, alien) = participants_of(reading([CAT, ALIEN], ["sky", "mimsy and glorp"])).words.values()
    assert [with_words(prompt, cat) for prompt in ("sky", "mimsy and glorp")] == ["sky", "mimsy and "]
    assert with_words("mimsy and glorp", alien) == " and glorp"


def test_only_tags_of_nearly_all_captions_are_kept_from_others(tmp_path: Path) -> None:
    table = {"10_x": {"glorp": 20, "green skin": 19, "white wall": 15}}
    folders = {"10_x": {"n_repeats": 10, "img_count": 20}}
    prompt = "mimsy, glorp, green skin, white wall"

    def of_cat(alien: TaggedLora) -> str:
        return read([CAT, alien], prompt)[0]

    at = {"at": "right"}
    for metadata in (
        {"ss_tag_frequency": json.dumps(table), "ss_dataset_dirs": json.dumps(folders)},
        {"ss_tag_frequency": table, "ss_dataset_dirs": folders},  # as WebUIs have read them
    ):
        assert of_cat(TaggedLora("alien", at, metadata)) == "mimsy, , , white wall"
    # Of captions that are sentences none is in nearly all.
    rare = {"ss_tag_frequency": {"10_x": {"glorp": 1, "white wall": 1}}, "ss_dataset_dirs": folders}
    assert of_cat(TaggedLora("alien", at, rare)) == prompt
    # What somebody wrote counts more.
    (tmp_path / "x.json").write_text('{"activation text": "(glorp:1.1), <lora:x:1>"}')
    file = tmp_path / "x.safetensors"
    assert of_cat(TaggedLora("alien", at, {"modelspec.trigger_phrase": "green skin"}, file=file)) == (
        "mimsy, , green skin, white wall"
    )
