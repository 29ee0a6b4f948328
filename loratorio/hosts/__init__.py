"""Everything that knows a host. Only below here are a WebUI's modules or diffusers imported."""

from __future__ import annotations

import importlib
import importlib.util

from ..errors import LoratorioError
from .shared.host import WebUIHost

# The first whose landmark (a top-level module that only this WebUI has) can be found is the host.
_LANDMARKS = (("modules_forge", "forge"), ("modules", "a1111"))


def webui_host() -> WebUIHost:
    """The WebUI that this code runs inside. Raises LoratorioError when it is none that is known."""
    for landmark, name in _LANDMARKS:
        if importlib.util.find_spec(landmark) is not None:
            host: WebUIHost = importlib.import_module(f".{name}", __name__).HOST
            return host
    raise LoratorioError(
        "LoRAtorio does not know this WebUI: it works in AUTOMATIC1111's and in the Forge family."
    )
