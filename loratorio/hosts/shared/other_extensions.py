"""Other extensions that change the sampling itself, recognised in every WebUI.

From the sources of LoRA Block Weight (June 2025), NegPiP (November 2025) and loractl.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ...prompt.tags import BLOCK_WEIGHT, LORACTL

if TYPE_CHECKING:  # a WebUI's start-up need not wait for torch
    from torch import nn

    from ...prompt.roles import TaggedLora

_WEBUI_OPTIONS = ("te", "unet", "dyn")
_OPTIONS_OF = {
    BLOCK_WEIGHT: ("lbw", "lbwe", "w", "x", "start", "stop", "step"),
    LORACTL: ("hr", "hrunet", "hrte"),
}
"""By a word in the path of an extension's script, the arguments of a LoRA tag that it reads."""

_BY_STEP = ("start", "stop", "step")
_ATTENTION = ("attention", "streamblock")


def merged_because(why: str) -> str:
    """The note about a pass that is left to the WebUI."""
    return f"LoRAtorio did not compose the LoRAs, and the WebUI merged them: {why}."


def known_options(p: Any, idle: Collection[str] = ()) -> list[str]:
    """Named arguments of LoRA tags that the WebUI or an installed extension reads.

    idle: words in the paths of extensions that do nothing in this WebUI.
    """
    known = list(_WEBUI_OPTIONS)
    for word, options in _OPTIONS_OF.items():
        if word not in idle and _has_script(p, word):
            known += options
    return known


def strengths_by_step(p: Any, loras: Sequence[TaggedLora]) -> str | None:
    """The reason not to compose if LoRA Block Weight changes a LoRA's strength while sampling."""
    asked = any(option in lora.options for lora in loras for option in _BY_STEP)
    if asked and _has_script(p, BLOCK_WEIGHT):
        return merged_because(
            "the extension LoRA Block Weight changes a LoRA's strength from step to step (start=, stop= or step= in its tag), "
            "which LoRAtorio cannot follow in this WebUI"
        )
    return None


SAMPLE_PARTS = ("sd upscale", "outpainting mk2", "poor man's outpainting")
"""Scripts of the WebUIs, in small letters, that sample parts of a picture as if they were pictures. (Ultimate SD upscale inpaints parts of
the whole.) The WebUIs write their titles with different capitals."""


SAMPLE_TILES = ("ultimate sd upscale",)
"""Scripts, in small letters, that sample a picture tile by tile, and say which part of it a tile is."""


def chosen_script(p: Any) -> str:
    """The title of the script that is chosen in the WebUI's list, or nothing."""
    scripts = getattr(getattr(p, "scripts", None), "selectable_scripts", None) or ()
    number = next(iter(getattr(p, "script_args", None) or ()), 0)
    return str(scripts[number - 1].title()) if isinstance(number, int) and 0 < number <= len(scripts) else ""


def hides_errors(p: Any) -> bool:
    """Whether the chosen script leaves a picture that stops with an error empty and continues: then nobody sees the error's sentence."""
    return chosen_script(p).lower() == "x/y/z plot"


def takes_maps(script: str) -> bool:
    """Whether weight maps may be among a script's images. Some take every image for a picture of their own."""
    return script.lower() not in (*SAMPLE_PARTS, "prompt matrix")


def replaced_attention(unet: nn.Module) -> str | None:
    """The reason not to compose if an extension has replaced the function of an attention layer.

    Such a function (NegPiP's is one) tells conditional from unconditional rows by their position in the WebUI's own batch.
    """
    for module in unet.modules():
        forward = vars(module).get("forward")
        if forward is None or not any(word in type(module).__name__.lower() for word in _ATTENTION):
            continue
        extension = _extension_of(forward)
        if extension:
            return merged_because(
                f"the extension {extension} replaces the model's attention and depends on the WebUI's own rows"
            )
    return None


def _has_script(p: Any, word: str) -> bool:
    return any(word in PurePath(name).as_posix().lower() for name in _scripts(p))


def _scripts(p: Any) -> Iterator[str]:
    runner = getattr(p, "scripts", None)
    for script in getattr(runner, "alwayson_scripts", None) or ():
        yield str(getattr(script, "filename", "") or "")


def _extension_of(function: Any) -> str:
    """Name of the extension whose file a function stands in, or nothing."""
    while isinstance(function, partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    parts = PurePath(code.co_filename).parts if code is not None else ()
    if "extensions" not in parts[:-1]:
        return ""
    return parts[parts.index("extensions") + 1]
