"""The layers in a LoRA file, by its tensors' names, whatever the kind of LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = re.compile(
    r"\.(alpha|scale|dora_scale|diff|diff_b|weight|bias|lora_\w+(\.default)?(\.weight|\.bias)?|lora_(A|B|up|down|mid)\.\w+\.weight"
    r"|lora\.(up|down|mid)\.weight|hada_\w+|lokr_\w+|glora_\w+|[abc][12]\.weight|on_input|oft_\w+|rescale|w_norm|b_norm"
    r"|set_weight|reshape_weight|alphas)$"
)


def layers(names: Iterable[str]) -> set[str]:
    """The layers that a LoRA file's tensors are for, as the file names them; what else it holds (bundled embeddings) is left out."""
    return {_PARTS.sub("", _PARTS.sub("", name)) for name in names if not name.startswith("bundle_emb.")}
