"""Embeddings that are bundled with a LoRA file: textual inversion in ``bundle_emb``, as OneTrainer and others write it.

Letters in shapes: V vectors (token places) that a word takes, E width of a text encoder's token embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OF_ENCODER = (("clip_l", "emb_params", "string_to_param.*"), ("clip_g",))
"""What the first and the second text encoder's vectors are called."""

LONGEST = 75
"""Vectors at most: a word cannot be cut between two chunks."""


@dataclass(frozen=True)
class Embedding:
    """A word, and what stands for it in the prompt, per text encoder: (V, E) float32 each, of one V."""

    word: str
    vectors: tuple[Tensor, ...]

    @property
    def places(self) -> int:
        return len(self.vectors[0])


def read_embeddings(
    name: str, bundled: Mapping[str, Mapping[str, Tensor]], encoders: Sequence[nn.Module]
) -> tuple[tuple[Embedding, ...], list[str]]:
    """The LoRA's embeddings that fit these text encoders, and sentences about those that do not."""
    fitting: list[Embedding] = []
    notes: list[str] = []
    for word, tensors in bundled.items():
        vectors = [_of_encoder(tensors, number) for number in range(len(encoders))]
        problem = _problem(vectors, [_token_embedding(encoder) for encoder in encoders])
        if problem:
            notes.append(f"The embedding {word[:40]!r} inside LoRA {name} was not used: {problem}.")
        else:
            fitting.append(
                Embedding(word, tuple(each.to(torch.float32) for each in vectors if each is not None))
            )
    return tuple(fitting), notes


def _of_encoder(tensors: Mapping[str, Tensor], number: int) -> Tensor | None:
    known = [tensors[key] for key in _OF_ENCODER[number] if key in tensors]
    if known:
        return known[0]
    # One tensor under any other name can only be the one of a model with one text encoder.
    only = next(iter(tensors)) if len(tensors) == 1 else ""
    return tensors[only] if number == 0 and only and only not in _OF_ENCODER[1] else None


def _problem(vectors: Sequence[Tensor | None], tables: Sequence[Tensor]) -> str:
    for each, table in zip(vectors, tables, strict=True):
        if each is None:
            return "it has no vectors for one of this model's text encoders"
        if each.ndim != 2 or each.shape[1] != table.shape[1] or not 1 <= len(each) <= LONGEST:
            shape = "×".join(map(str, each.shape))
            return f"its vectors are {shape}, but this model takes at most {LONGEST} vectors of {table.shape[1]} numbers"
        if not bool(torch.isfinite(each).all()):
            return "it contains NaN or infinite numbers"
    if len({len(each) for each in vectors if each is not None}) > 1:
        return "its numbers of vectors for this model's text encoders differ"
    return ""


def cut_by_words(text: str, embeddings: Sequence[Embedding]) -> Iterator[str | Embedding]:
    """The text in pieces: words that are embeddings, and what is between them. Capitals do not matter; the first of two counts."""
    known: dict[str, Embedding] = {}
    for each in embeddings:
        known.setdefault(each.word.casefold(), each)
    if not known:
        yield text
        return
    longest_first = sorted(known, key=len, reverse=True)
    words = "|".join(re.escape(word) for word in longest_first)
    place = 0
    for found in re.finditer(rf"(?<!\w)({words})(?!\w)", text, re.IGNORECASE):
        own = known.get(found[1].casefold())
        if own is not None:
            yield text[place : found.start()]
            yield own
            place = found.end()
    yield text[place:]


@contextmanager
def vectors_put_in(encoder: nn.Module, places: Sequence[tuple[int, int, Tensor]]) -> Iterator[None]:
    """While inside, the text encoder reads these vectors: (row, first token place, vectors (V, E)) each."""
    if not places:
        yield
        return

    def put_in(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for row, first, vectors in places:
            embedded[row, first : first + len(vectors)] = vectors.to(embedded)
        return embedded

    handle = _table_module(encoder).register_forward_hook(put_in)
    try:
        yield
    finally:
        handle.remove()


def _table_module(encoder: Any) -> nn.Module:
    table: nn.Module = encoder.get_input_embeddings()
    return table


def _token_embedding(encoder: nn.Module) -> Tensor:
    weight: Tensor = _table_module(encoder).weight  # type: ignore[assignment]
    return weight
