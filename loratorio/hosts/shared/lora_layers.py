"""The layers in a LoRA file, by its tensors' names, whatever the kind of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = re.compile(
    r"\.(alpha|scale|dora_scale|(lora_)?magnitude|diff|diff_b|weight|bias|lora_\w+(\.[^.]+)?(\.weight|\.bias)?"
    r"|lora\.(up|down|mid)\.weight|(hada|lokr)_\w+(\.[^.]+)?|glora_\w+|[abc][12]\.weight|on_input|oft_\w+|rescale|w_norm|b_norm"
    r"|set_weight|reshape_weight|alphas)$"
)

_MAGNITUDE = re.compile(r"\.(lora_magnitude_vector(\.[^.]+)?(\.weight)?|magnitude)$")


def layers(names: Iterable[str]) -> set[str]:
    """The layers of a LoRA file's tensors, by the file's names, without bundled embeddings."""
    return {_PARTS.sub("", _PARTS.sub("", name)) for name in names if not name.startswith("bundle_emb.")}


def unread_magnitudes_note(lora: str, names: Iterable[str]) -> str:
    """A sentence about a DoRA whose magnitudes have names that the WebUIs ignore (they read ``dora_scale``), or nothing."""
    unread = next((name for name in names if _MAGNITUDE.search(name)), None)
    if unread is None:
        return ""
    return (
        f"LoRA {lora} is a DoRA, but this WebUI does not read its magnitudes ({unread[:120]}). It acts as a plain LoRA, with and without "
        "LoRAtorio. Get it with kohya's names (dora_scale)."
    )
