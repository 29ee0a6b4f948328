"""Everything that is specific to a host. A WebUI's modules are imported only in this package."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from ..errors import LoratorioError
from .shared.host import WebUIHost

# The host is the first whose landmark, a top-level module that only this WebUI has, is found.
_LANDMARKS = (("modules_forge", "forge"), ("modules", "a1111"))


def webui_host() -> WebUIHost:
    """The WebUI that this code runs inside. Raises LoratorioError for an unknown one."""
    for landmark, name in _LANDMARKS:
        if importlib.util.find_spec(landmark) is not None:
            host: WebUIHost = importlib.import_module(f".{name}", __name__).HOST
            return host
    raise LoratorioError(
        "LoRAtorio does not support this WebUI. It works in AUTOMATIC1111's WebUI and in the Forge family."
    )


def forget() -> None:
    """Free what is kept for the next job: LoRA files, and text conditioning. Imports nothing."""
    files, text = (sys.modules.get(f"{__name__}.{name}") for name in ("forge.files", "shared.text"))
    if files is not None:
        files.FILES.forget()
    if text is not None:
        text.TEXTS.forget()


def sum_of_tags() -> str:
    """What the WebUI makes of several tags of one LoRA: it adds up "each" strength, only "different" ones, or the "last" one each time.

    For the page, before the hosts' modules are needed: what `SamplingPass.added` does.
    """
    if importlib.util.find_spec("modules_forge") is None:
        return "last"
    newer = ("ldm_patched", "modules_forge.packages")  # reForge's, Forge Neo's
    return "each" if any(map(importlib.util.find_spec, newer)) else "different"
