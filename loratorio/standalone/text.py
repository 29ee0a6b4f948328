"""Text conditioning, for each mix of LoRAs its own.

Letters in shapes: R texts, K chunks of 77 tokens, W width of the conditioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.bank import Bank
from ..compose.mixes import Mix
from .checkpoint import Checkpoint
from .embeddings import Embedding, cut_by_words, vectors_put_in
from .prompt import emphasised

_ROOM = 75  # tokens of a chunk, beside its begin and end marks

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of one text: `tokens` (77·K, W), and SDXL's `pooled` (W′) or None."""

    tokens: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """77 tokens and their weights; `words`: embeddings, by the place of their first token."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    words: tuple[tuple[int, Embedding], ...] = ()


class TextConditioner:
    """Conditioning of a generation's texts under every mix, computed once; all rows of a request in one batch.

    Mixes that differ only in LoRAs without a text-encoder part share their conditioning.

    Args:
        banks: for each text encoder the LoRAs' deltas, in the order of the generation's LoRAs.
        texts: they decide how many chunks every text has at least; others may be longer.
        words: for each LoRA the embeddings of the words that its file brings along; they are known where the LoRA is in the mix.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        banks: Sequence[Bank],
        texts: Sequence[str],
        words: Sequence[Sequence[Embedding]] = (),
    ) -> None:
        self._checkpoint = checkpoint
        self._banks = tuple(banks)
        count = len(banks[0].adapters)
        self._words = tuple(words) or ((),) * count
        touched = [
            any(bank.adapters[i].deltas for bank in self._banks) or bool(self._words[i]) for i in range(count)
        ]
        self._touched = tuple(touched)
        every = [word for own in self._words for word in own]
        known_words = [(), every] if every else [()]
        self._least = [
            max(len(_chunks(tokenizer, text, known)) for text in texts for known in known_words)
            for tokenizer in checkpoint.tokenizers
        ]
        self._cut: dict[tuple[int, str, tuple[int, ...]], list[_Chunk]] = {}
        self._known: dict[tuple[str, Mix], Conditioning] = {}

    def of(self, wanted: Sequence[tuple[str, Mix]]) -> list[Conditioning]:
        """The conditioning of each text under its mix."""
        keys = [(text, self._effective(mix)) for text, mix in wanted]
        missing = [each for each in dict.fromkeys(keys) if each not in self._known]
        lengths = [len(self._chunks(0, text, mix)) for text, mix in missing]
        for length in dict.fromkeys(lengths):
            alike = [each for each, own in zip(missing, lengths, strict=True) if own == length]
            for start in range(0, len(alike), _TEXTS_AT_ONCE):  # a pool has many
                self._prepare(alike[start : start + _TEXTS_AT_ONCE])
        return [self._known[key] for key in keys]

    def _prepare(self, missing: Sequence[tuple[str, Mix]]) -> None:
        """Compute the conditioning of these texts, all of one length, under their mixes."""
        encoded = [self._encode(number, missing) for number in range(len(self._banks))]
        for i, key in enumerate(missing):
            tokens = torch.cat([tokens[i] for tokens, _ in encoded], dim=-1)
            pooled = encoded[-1][1]
            self._known[key] = Conditioning(tokens, None if pooled is None else pooled[i])

    def _effective(self, mix: Mix) -> Mix:
        return tuple(part if touched else 0.0 for part, touched in zip(mix, self._touched, strict=True))

    def _chunks(self, number: int, text: str, mix: Mix) -> list[_Chunk]:
        """The text as an encoder reads it under a mix, whose LoRAs' words it knows."""
        active = tuple(i for i, part in enumerate(mix) if part and self._words[i])
        key = (number, text, active)
        if key not in self._cut:
            tokenizer = self._checkpoint.tokenizers[number]
            own = _chunks(tokenizer, text, [word for i in active for word in self._words[i]])
            self._cut[key] = own + [_chunk(tokenizer, [])] * (self._least[number] - len(own))
        return self._cut[key]

    def _encode(self, number: int, wanted: Sequence[tuple[str, Mix]]) -> tuple[Tensor, Tensor | None]:
        """Tokens (R, 77·K, W) and, of SDXL's second encoder, pooled (R, W′)."""
        encoder, device = self._checkpoint.text_encoders[number], self._checkpoint.device
        chunks = [self._chunks(number, text, mix) for text, mix in wanted]
        rows = [chunk for own in chunks for chunk in own]
        mixes = [mix for own, (_, mix) in zip(chunks, wanted, strict=True) for _ in own]
        ids = torch.tensor([chunk.tokens for chunk in rows], device=device)
        bank = self._banks[number]
        words = [
            (row, place, word.vectors[number])
            for row, chunk in enumerate(rows)
            for place, word in chunk.words
        ]
        with ExitStack() as stack:
            stack.enter_context(vectors_put_in(encoder, words))
            stack.enter_context(bank.attached(dict(encoder.named_modules())))
            stack.enter_context(bank.routed(mixes))
            output = encoder(ids, output_hidden_states=True)
        hidden = output.hidden_states[-2] if self._checkpoint.is_sdxl else output.last_hidden_state
        weights = torch.tensor([chunk.weights for chunk in rows], device=device)
        hidden = _weighted(hidden, weights).reshape(len(wanted), -1, hidden.shape[-1])
        # A long text is pooled as its first chunk is.
        per_text = len(rows) // len(wanted)
        pooled = output.text_embeds[::per_text] if hasattr(output, "text_embeds") else None
        hidden, pooled = self._without_empty_negative(hidden, pooled, wanted)
        return hidden, pooled

    def _without_empty_negative(
        self, hidden: Tensor, pooled: Tensor | None, wanted: Sequence[tuple[str, Mix]]
    ) -> tuple[Tensor, Tensor | None]:
        if self._checkpoint.zero_empty_negative:
            given = torch.tensor([bool(text) for text, _ in wanted], device=hidden.device)
            hidden = hidden * given.view(-1, 1, 1)
            pooled = None if pooled is None else pooled * given.view(-1, 1)
        return hidden, pooled


def _weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """Emphasis as in the WebUI: tokens (R, 77, W) times weights (R, 77), with every chunk's mean kept as it was."""
    if bool((weights == 1).all()):
        return hidden
    before = hidden.to(torch.float32)
    after = before * weights.unsqueeze(-1)
    ratio = before.mean(dim=(-2, -1), keepdim=True) / after.mean(dim=(-2, -1), keepdim=True)
    # A chunk whose mean the emphasis brought to nothing cannot be scaled back.
    ratio = torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))
    return (after * ratio).to(hidden.dtype)


def _chunks(tokenizer: Any, text: str, embeddings: Sequence[Embedding] = ()) -> list[_Chunk]:
    """The text cut into chunks of 75 tokens with begin and end marks; at least one."""
    done: list[_Chunk] = []
    tokens: list[_Token] = []

    def add(new: Sequence[_Token]) -> None:
        if len(tokens) + len(new) > _ROOM:
            close()
        tokens.extend(new)

    def close() -> None:
        done.append(_chunk(tokenizer, tokens))
        tokens.clear()

    for fragment in emphasised(text):
        if fragment.chunk_break:
            close()
            continue
        for piece in cut_by_words(fragment.text, embeddings):
            if isinstance(piece, Embedding):
                places = [_Token(_PLACEHOLDER, fragment.weight) for _ in range(piece.places)]
                add([_Token(_PLACEHOLDER, fragment.weight, piece), *places[1:]])
                continue
            for token in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids:
                add([_Token(token, fragment.weight)])
    if tokens or not done:
        close()
    return done


class _Token(NamedTuple):
    """A token with its emphasis; `word`: the embedding that begins here."""

    number: int
    weight: float
    word: Embedding | None = None


_PLACEHOLDER = 0
"""A token where vectors are put in; not one that a text encoder takes for the end."""


def _chunk(tokenizer: Any, tokens: Sequence[_Token]) -> _Chunk:
    """Begin mark, tokens, end mark, padding: 77 in all."""
    padding = _ROOM - len(tokens)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    numbers = (token.number for token in tokens)
    return _Chunk(
        (tokenizer.bos_token_id, *numbers, tokenizer.eos_token_id, *[pad] * padding),
        (1.0, *(token.weight for token in tokens), 1.0, *[1.0] * padding),
        tuple((place + 1, token.word) for place, token in enumerate(tokens) if token.word is not None),
    )
