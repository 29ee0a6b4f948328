"""The options and strengths in the LoRA tags of a pass's prompt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ...prompt.tags import KINDS


class WrittenTag(NamedTuple):
    """What a LoRA's tag says.

    Attributes:
        options: its named arguments.
        strengths: in the text encoder and in the UNet; None where an extension has other ways to write them.
    """

    options: Mapping[str, str] = MappingProxyType({})
    strengths: tuple[float, float] | None = None


class WrittenTags:
    """The pass's LoRA tags (``<lora:name:0.8:role=style>``), of which WebUIs pass over the arguments that they do not know."""

    def __init__(self, p: Any) -> None:
        data = p.hr_extra_network_data if getattr(p, "is_hr_pass", False) else p.extra_network_data
        self._left: dict[str, list[WrittenTag]] = {}
        for kind in KINDS:
            for tag in (data or {}).get(kind, ()):
                self._left.setdefault(str(tag.positional[0]), []).append(
                    WrittenTag(_named(tag), _strengths(tag))
                )

    def take(self, name: str) -> WrittenTag:
        """The next tag that names this LoRA; an empty one where there is no further."""
        left = self._left.get(name)
        return left.pop(0) if left else WrittenTag()

    @property
    def left(self) -> dict[str, WrittenTag]:
        """By name, the tags of the LoRAs that were not taken."""
        return {name: tags[0] for name, tags in self._left.items() if tags}


def _named(tag: Any) -> Mapping[str, str]:
    """A tag's named arguments as they are written: an extension may have taken them out of what the WebUI made of it (loractl does)."""
    written = (str(item).partition("=") for item in getattr(tag, "items", None) or ())
    return {**tag.named, **{key: value for key, sign, value in written if sign and "=" not in value}}


def _strengths(tag: Any) -> tuple[float, float] | None:
    """As the WebUI reads them."""
    _, *numbers = tag.positional
    try:
        text = float(tag.named.get("te", numbers[0] if numbers else 1.0))
        return text, float(tag.named.get("unet", numbers[1] if len(numbers) > 1 else text))
    except ValueError:
        return None
