"""What the LoRA tags of a pass's prompt say beside name and strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...tags import KINDS


class TagOptions:
    """The named arguments of the pass's LoRA tags (``<lora:name:0.8:role=style>``), which WebUIs parse and pass over."""

    def __init__(self, p: Any) -> None:
        data = p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data
        self._left: dict[str, list[Mapping[str, str]]] = {}
        for kind in KINDS:
            for tag in (data or {}).get(kind, ()):
                self._left.setdefault(str(tag.positional[0]), []).append(_named(tag))

    def take(self, name: str) -> Mapping[str, str]:
        """Those of the next tag that names this LoRA; none where there is no further one."""
        left = self._left.get(name)
        return left.pop(0) if left else {}

    @property
    def left(self) -> dict[str, Mapping[str, str]]:
        """By name, those of the LoRAs whose tags were not taken."""
        return {name: options[0] for name, options in self._left.items() if options}


def _named(tag: Any) -> Mapping[str, str]:
    """A tag's named arguments as they are written: an extension may have taken them out of what the WebUI made of it (loractl does)."""
    written = (str(item).partition("=") for item in getattr(tag, "items", None) or ())
    return {**tag.named, **{key: value for key, sign, value in written if sign and "=" not in value}}
