"""What the LoRA tags of a pass's prompt say beside name and strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("lora", "lyco")


class TagOptions:
    """The named arguments of the pass's LoRA tags (``<lora:name:0.8:role=style>``), which WebUIs parse and pass over."""

    def __init__(self, p: Any) -> None:
        data = p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data
        self._left: dict[str, list[Mapping[str, str]]] = {}
        for kind in KINDS:
            for tag in (data or {}).get(kind, ()):
                self._left.setdefault(tag.positional[0], []).append(tag.named)

    def take(self, name: str) -> Mapping[str, str]:
        """Those of the next tag that names this LoRA; none where there is no further one."""
        left = self._left.get(name)
        return left.pop(0) if left else {}
