"""The WebUI's prompt language."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratorio.adapters.bank import Bank
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.prompt import PromptLora, emphasised, plain_text_notes, split_loras
from loratorio.standalone.text import TextConditioner, _chunks
from tests import tiny


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:rose>", PromptLora("rose")),
        ("<lora:rose:0.8>", PromptLora("rose", 0.8, 0.8)),
        ("<lora:rose:0.5:-1>", PromptLora("rose", 0.5, -1.0)),
        ("<lora:a b-c_(1):.5>", PromptLora("a b-c_(1)", 0.5, 0.5)),
        ("<lora:rose:te=0.2:unet=0.9>", PromptLora("rose", 0.2, 0.9)),
        ("<lora:rose:0.8:role=style>", PromptLora("rose", 0.8, 0.8, {"role": "style"})),
        ("<LORA:rose: 1 >", PromptLora("rose")),
        (
            "<lora:rose:words=(red:1.2), [a:b]:0.5>",
            PromptLora("rose", 0.5, 0.5, {"words": "(red:1.2), [a:b]"}),
        ),
        ("<lyco:rose:0>", PromptLora("rose", 0.0, 0.0)),
    ],
)
def test_tags(tag: str, expected: PromptLora) -> None:
    assert split_loras(f"a red {tag} circle") == ("a red circle", [expected])


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("<lora:rose:much>", "<lora:rose:much> cannot be read: much is not a number: write <lora:rose:1>"),
        ("<lora:rose:1_0>", "1_0 is not a number: write <lora:rose:1>"),
        ("<lora:rose:1:1:1>", "has more than two numbers"),
        ("<lora:rose:nan>", "is not a number"),
        ("<lora:rose:1:inf>", "is not a number"),
        ("<lora:>", "names no LoRA"),
        ("<lora:rose:0,8>", "0,8 is not a number: write <lora:rose:0.8>"),
        ("<lora:rose:1.0:5-15>", "5-15 is not a number: write <lora:rose:1.0>"),
        ("<lora:rose:at=left:>", "nothing is not a number: write <lora:rose:at=left:1>"),
        ("<lora:rose:unet=x>", "unet=x is not a number"),
        ("<lora:rose:at=left=right>", "at=left=right contains more than one ="),
        ("<lora:rose:words=a: b>", r"a colon in words= must be inside brackets, as in words=\(red:1.2\)"),
        ("<lora:rose:words=(red:1.2:1>", "a bracket of words= is not closed"),
        ("<hypernet:a:1>", "is an unknown tag"),
        ("a <lora:b> <lora:cactus", r"<lora:cactus is not a complete tag: write it like <lora:name:0\.8>"),
        ("a <lora:b> < lora:cactus:1>", "< lora:cactus:1> is not a complete tag"),
        ("a <lora:b> <lora cactus>", "<lora cactus> is not a complete tag"),
        ("a <lora:b> <Lora", "<Lora is not a complete tag"),
        ("<lora:cactus <lora:b>", "<lora:cactus is not a complete tag"),
        ("lora:cactus:1>", "lora:cactus:1> is not a complete tag"),
        ("(lora:cactus:1)", r"lora:cactus:1\) is not a complete tag"),
        ("\uff1clora\uff1acactus\uff1e", "is not a complete tag"),
        ("<pool animals>", "<pool animals> is not a complete tag"),
    ],
)
def test_tags_that_cannot_be_read(prompt: str, says: str) -> None:
    with pytest.raises(LoratorioError, match=says):
        split_loras(prompt)


def test_words_that_are_no_tags() -> None:
    for prompt in ("a lora, a pool: blue", "3 < 4, swimming pool", "Lora: a girl, lorateeth <3"):
        assert split_loras(prompt) == (prompt, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a [red:blue:0.5] circle", "[red:blue:0.5] is plain text here"),
        ("a [red:10]", "[red:10] is plain text here"),
        ("a [red|blue] circle", "[red|blue] is plain text here"),
        ("a [red] (circle:1.2), 16:9", ""),
    ],
)
def test_prompt_editing_is_said_to_be_text(text: str, says: str) -> None:
    for notes in (plain_text_notes(text, ""), plain_text_notes("", text)):
        assert len(notes) == bool(says)
        assert all(note.startswith(says) for note in notes)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", [("a red circle", 1.0)]),
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("a ((red)) circle", [("a ", 1.0), ("red", 1.21), (" circle", 1.0)]),
        ("a (red:1.5) circle", [("a ", 1.0), ("red", 1.5), (" circle", 1.0)]),
        ("(a (red:1.5) circle:0.5)", [("a ", 0.5), ("red", 0.75), (" circle", 0.5)]),
        ("[red] Bob", [("red", 1 / 1.1), (" Bob", 1.0)]),
        (r"a \(red\) circle", [("a (red) circle", 1.0)]),
        ("a (red", [("a ", 1.0), ("red", 1.1)]),
        ("a: red) b]", [("a: red) b]", 1.0)]),
        ("BREAKFAST at 9:30)", [("BREAKFAST at 9:30)", 1.0)]),
        ("(ratio 16:9, red:1.2)", [("ratio 16:9, red", 1.2)]),
    ],
)
def test_emphasis(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = [(piece.text, piece.weight) for piece in emphasised(prompt)]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_break() -> None:
    assert [piece.text or piece.chunk_break for piece in emphasised("a BREAK (b)")] == ["a ", True, " ", "b"]


@given(st.text(alphabet="ab ()[]:.1\\BREAK", max_size=40))
def test_any_text_is_read(prompt: str) -> None:
    pieces = emphasised(prompt)
    assert all(piece.weight == piece.weight for piece in pieces)
    assert not any(
        a.weight == b.weight and not a.chunk_break and not b.chunk_break for a, b in pairwise(pieces)
    )


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    save = {"sd": tiny.save_sd, "sdxl": tiny.save_sdxl}[request.param]
    return load_checkpoint(save(tmp_path_factory.mktemp("model") / request.param))


def conditioner(model: Checkpoint, *texts: str) -> TextConditioner:
    return TextConditioner(model, [Bank([]) for _ in model.text_encoders], texts)


def test_chunks_of_75_tokens() -> None:
    words = tiny.tokenizer()
    chunks = _chunks(words, "a " * 80 + "BREAK b")
    assert [len(chunk.tokens) for chunk in chunks] == [77, 77, 77]
    a, b = words.convert_tokens_to_ids(["a</w>", "b</w>"])
    assert [(chunk.tokens.count(a), chunk.tokens.count(b)) for chunk in chunks] == [(75, 0), (5, 0), (0, 1)]
    assert all(chunk.tokens[0] == words.bos_token_id for chunk in chunks)
    assert len(_chunks(words, "")) == 1


def test_plain_text_is_what_the_encoder_says(model: Checkpoint) -> None:
    text = "a red circle"
    (told,) = conditioner(model, text).of([(text, ())])
    hidden, pooled = [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2] if model.is_sdxl else output.last_hidden_state)
        pooled = getattr(output, "text_embeds", None)
    assert torch.allclose(told.tokens, torch.cat(hidden, dim=-1)[0], atol=1e-5)
    assert (told.pooled is None) == (pooled is None)
    if pooled is not None and told.pooled is not None:
        assert torch.allclose(told.pooled, pooled[0], atol=1e-5)


def test_emphasis_keeps_the_mean_and_changes_the_word(model: Checkpoint) -> None:
    told = conditioner(model, "a red circle", "a (red:1.5) circle")
    plain, strong = told.of([("a red circle", ()), ("a (red:1.5) circle", ())])
    assert not torch.allclose(plain.tokens, strong.tokens)
    if not model.is_sdxl:
        assert torch.allclose(plain.tokens.mean(), strong.tokens.mean(), atol=1e-4)


def test_texts_of_a_request_are_of_one_length(model: Checkpoint) -> None:
    long = "a red circle " * 10
    told = conditioner(model, long, "bad")
    own, bad = told.of([(long, ()), ("bad", ())])
    assert own.tokens.shape == bad.tokens.shape
    assert len(bad.tokens) == 2 * 77


def test_sdxl_takes_an_empty_negative_prompt_as_zeros(model: Checkpoint) -> None:
    (empty,) = conditioner(model, "").of([("", ())])
    assert bool((empty.tokens == 0).all()) == model.is_sdxl
