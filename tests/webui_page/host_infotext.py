"""How AUTOMATIC1111 1.10.1 and the Forge family write and read infotext, in few lines (their modules/infotext_utils.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"^(\d+)x(\d+)$")


def quote(value: Any) -> Any:
    return (
        json.dumps(value, ensure_ascii=False)
        if any(sign in str(value) for sign in (",", "\n", ":"))
        else value
    )


def unquote(value: str) -> str:
    return json.loads(value) if len(value) > 1 and value[0] == value[-1] == '"' else value


def written(prompt: str, fields: Mapping[str, Any]) -> str:
    """The infotext of a picture."""
    everything = {"Steps": 20, "Sampler": "Euler", "Seed": 1, "Size": "64x64", **fields}
    return prompt + "\n" + ", ".join(f"{key}: {quote(value)}" for key, value in everything.items())


def read(text: str) -> dict[str, str]:
    """Its fields."""
    *lines, last = text.strip().split("\n")
    if len(FIELD.findall(last)) < 3:
        lines, last = [*lines, last], ""
    fields: dict[str, str] = {}
    for key, value in FIELD.findall(last):
        value = unquote(value)
        size = SIZE.match(value)
        fields |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: value}
    return {**fields, "Prompt": "\n".join(lines)}
