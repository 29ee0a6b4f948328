"""The toybox's own small CLIP tokenizer: every byte, and merges that make a whole token of each word the world uses."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from loratorio_lab.toybox.models import TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of OpenAI's CLIP vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def merges_for(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the commonest pair first, until each word is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while any(len(word) > 1 for word in split):
        pairs = Counter(pair for word in split for pair in itertools.pairwise(word))
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(folder: Path, words: list[str]) -> tuple[int, int, int]:
    """Write the files a CLIPTokenizer is loaded from, with a token for each of the words. Returns vocabulary size, start id, end id."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = merges_for(words)
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(vocabulary), vocabulary[START], vocabulary[END]
