"""The differences between Gradio 3.41 (A1111, reForge) and 4.40 (Forge, Forge Neo), and between a WebUI's page and a bare one.

Every check of a version is here.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import gradio as gr

MAJOR = int(gr.__version__.split(".")[0])


def in_webui() -> bool:
    """Whether this page is a WebUI's, whose patched components know `tooltip=` and whose page has the JavaScript for it."""
    return "modules.ui_components" in sys.modules


def javascript(function: str) -> dict[str, str]:
    """The argument of an event listener that runs `function` in the page."""
    return {"js": function} if MAJOR >= 4 else {"_js": function}


def usable(is_usable: bool) -> dict[str, Any]:
    """What a function in the page sends a component (with ``__type__: "update"``) to grey it, or to make it usable again."""
    return {"interactive": is_usable} if MAJOR >= 4 else {"mode": "dynamic" if is_usable else "static"}


def tooltip(text: str) -> dict[str, str]:
    """The argument of a component that explains it: a tooltip in a WebUI, a line under the label in a bare page."""
    return {"tooltip": text} if in_webui() else {"info": text}


def ticked_accordion(
    ticked: bool, label: str, elem_id: str
) -> tuple[gr.Checkbox, AbstractContextManager[Any]]:
    """A tick box and the foldable part of the page that belongs to it: the WebUI's own `InputAccordion` where there is one."""
    if in_webui():
        from modules import ui_components

        make = getattr(ui_components, "InputAccordion", None)
        if make is not None:
            box = make(ticked, label=label, elem_id=elem_id)
            return box, box
    accordion = gr.Accordion(label, open=ticked, elem_id=elem_id)
    with accordion:
        box = gr.Checkbox(ticked, label=label, elem_id=f"{elem_id}-checkbox")
    return box, accordion
