"""A picture's infotext, as the WebUIs write it and their PNG Info tab reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping


def infotext(prompt: str, negative: str, fields: Mapping[str, object]) -> str:
    """Prompt, negative prompt and one line of ``name: value`` fields; fields that are None are left out."""
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    return "\n".join(
        part for part in (prompt, f"Negative prompt: {negative}" if negative else "", line) if part
    )


def _quoted(value: object) -> str:
    """As it stands unless it has a comma, colon or line break, which divide fields; then as JSON."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",:\n") else text
