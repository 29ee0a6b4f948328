"""Which LoRAs of a prompt take part, whatever the host: reading is a function here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from loratorio.errors import LoratorioError
from loratorio.prompt.admission import ActiveLora, Admitted, LeftOut, UnreadableLora, admit, each_once
from loratorio.prompt.roles import TaggedLora


@dataclass(frozen=True)
class Read:
    name: str
    changes_nothing: bool = False
    notes: tuple[str, ...] = ()


def lora(
    name: str, words: str = "", pooled: bool = False, strength: float = 1.0, **options: str
) -> ActiveLora:
    metadata = {"modelspec.trigger_phrase": words} if words else {}
    return ActiveLora(TaggedLora(name, options, metadata, pooled), strength, strength)


def admitted(
    *loras: ActiveLora, prompt: str = "", read: Mapping[str, Any] | None = None, **others: Any
) -> Admitted[Read]:
    """read: by name, what is read, or what is raised; else something that acts."""

    def reading(each: ActiveLora) -> Read:
        found = (read or {}).get(each.tagged.name, Read(each.tagged.name))
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    return admit(loras, prompt, reading, (8, 8), **others)


def names(found: Admitted[Read]) -> list[str]:
    return [each.name for each in found.loras]


def test_of_a_pool_those_that_the_prompt_calls() -> None:
    pool = [lora("cat", "mimsy", pooled=True), lora("ink", "inkash", pooled=True), lora("x", pooled=True)]
    found = admitted(lora("dog"), *pool, prompt="a mimsy")
    assert names(found) == ["dog", "cat", "x"]
    assert [each.tagged.name for each in found.left_out] == ["ink"]
    assert [each.pooled for each in found.participants.loras] == [False, False, True]
    assert found.notes == (
        "Chosen from the pool by their trigger words: cat (mimsy). 1 with other trigger words was not used.",
    )


def test_what_cannot_be_read_stops_a_named_lora_and_leaves_out_a_pools() -> None:
    bad = {"bad": LoratorioError("LoRA bad does not fit.")}
    with pytest.raises(LoratorioError, match="bad does not fit"):
        admitted(lora("cat"), lora("bad"), read=bad)
    skipped = "Not used from the pool, because they cannot be read or do not fit: bad."
    for words in ("", "mimsy"):  # called by the prompt or not
        found = admitted(lora("cat"), lora("bad", words, pooled=True), prompt="mimsy", read=bad)
        assert names(found) == ["cat"]
        assert found.notes[-1] == skipped
    with pytest.raises(LoratorioError, match="No LoRA of the pool matches"):
        admitted(lora("bad", pooled=True), read=bad)


def test_a_lora_may_be_left_out_with_a_note() -> None:
    found = admitted(lora("a"), lora("b"), lora("c"), read={"a": UnreadableLora("?"), "b": LeftOut("Not b.")})
    assert names(found) == ["c"]
    assert [each.tagged.name for each in found.left_out] == ["a", "b"]
    assert found.notes[0] == "Not b."
    assert "LoRA a was not used" in found.notes[1]


def test_a_speed_lora_is_never_picked_from_a_pool() -> None:
    pool = [lora("lcm-lora", pooled=True), lora("cat", pooled=True)]
    found = admitted(*pool)
    assert names(found) == ["cat"]
    assert "lcm-lora" in found.notes[0]
    told = admitted(replace(pool[0], tagged=replace(pool[0].tagged, options={"role": "content"})), pool[1])
    assert names(told) == ["lcm-lora", "cat"]
    named = admitted(lora("lcm-lora"), lora("cat"))
    assert named.participants.numbers == [1]
    assert "looks like a speed LoRA" in named.notes[0]


def test_what_changes_nothing_takes_no_part() -> None:
    found = admitted(lora("a"), lora("b"), read={"a": Read("a", changes_nothing=True)})
    assert names(found) == ["b"]
    assert "LoRA a has no effect" in found.notes[0]


def test_a_strength_must_be_a_number() -> None:
    with pytest.raises(LoratorioError, match="strength of LoRA a must be a number, not nan"):
        admitted(lora("a", strength=float("nan")))


def test_trigger_words_are_weighed_where_asked() -> None:
    def encode(texts: list[str]) -> list[torch.Tensor]:
        return [torch.eye(3)[:1] if "mimsy" in text else torch.eye(3)[1:2] for text in texts]

    loras = [lora("cat", "mimsy"), lora("ink", "inkash")]
    found = admitted(*loras, prompt="mimsy, inkash", encode=encode)
    assert [each.importance for each in found.participants.loras] == [2.0, 0.0]
    assert admitted(*loras, prompt="mimsy, inkash").participants != found.participants


def test_tags_of_one_lora_are_one_in_each_place() -> None:
    def added(tags: Any) -> ActiveLora:
        return replace(tags[0], strength=sum(tag.strength for tag in tags))

    tags = [lora("a"), lora("b"), lora("a", strength=0.5), lora("a", at="left")]
    assert [(each.tagged.name, each.strength) for each in each_once(tags, added)] == [
        ("a", 1.5),
        ("b", 1.0),
        ("a", 1.0),
    ]
    changing = [replace(tags[0], may_change=True), tags[2]]
    assert each_once(changing, added) == changing
