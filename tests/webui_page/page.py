"""A page like a WebUI's, small, on a real Gradio: two tabs with a prompt, the panel, Generate, paste and "send to img2img".

Run by the tests in a virtual environment of Gradio 3.41.2 or 4.40: `python -m tests.webui_page.page PORT`. It imitates, in few
lines, what AUTOMATIC1111 1.10.1 and Forge do with a script's components: how pasting fills the fields
(modules/infotext_utils.py), how the JavaScript files come into the page and are called back (script.js).
What it does not imitate: `InputAccordion`, tooltips, ui-config.json.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gradio as gr
import gradio.routes

from loratorio.check import FAIL, PASS, Finding, Report
from loratorio.errors import LoratorioError
from loratorio.pictures.infotext import params
from loratorio.settings import KNOB_BY_NAME
from loratorio.webui import api, docs, gradio_compat, panel, self_check
from loratorio.webui import infotext_fields as infotext
from loratorio.webui import lookup as found

from .host_infotext import read, written

ROOT = Path(__file__).resolve().parents[2]

CALLBACKS = """
const opts = {enable_prompt_comments: true};
const loaded = [], updated = [];
let waiting = null, started = false;
function gradioApp() { return document; }
// The WebUI's, which finds only tags without options.
function tryToRemoveExtraNetworkFromPrompt(textarea, text, isNeg) {
    const wanted = text.match(/<([^:^>]+:[^:]+):[\\d.]+>/)[1];
    const left = textarea.value.replaceAll(/<([^:^>]+:[^:]+):[\\d.]+>/g, (found, net) => net === wanted ? "" : found);
    const removed = left !== textarea.value;
    textarea.value = left;
    return removed;
}
// The WebUI's, for the gallery's button that puts a picture through hires fix: what it sends.
function submit_txt2img_upscale(...given) { return given; }
function onUiLoaded(callback) { loaded.push(callback); }
function onAfterUiUpdate(callback) { updated.push(callback); }
document.addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
    if (!started && document.querySelector("#txt2img_prompt")) { started = true; loaded.forEach(each => each()); }
    clearTimeout(waiting);
    waiting = setTimeout(() => { window.updates = (window.updates ?? 0) + 1; updated.forEach(each => each()); }, 200);
}).observe(document, {childList: true, subtree: true}));
"""


def pasted(component: Any, key: Any, fields: dict[str, str]) -> Any:
    """What pasting does to one component."""
    value = key(fields) if callable(key) else fields.get(key)
    if value is None:
        return gr.update()
    kind = type(component.value)
    value = False if kind is bool and value == "False" else float(value) if kind is int else kind(value)
    return gr.update(value=value)


def generate(prompt: str, *args: Any) -> tuple[str, str]:
    """Stands in for a generation: the knobs that would be used, and the infotext."""
    try:
        settings = api.settings_from_args(args)
    except LoratorioError as problem:
        return f"error: {problem}", written(prompt, {})
    found = re.findall(r"<lora:([^:>]+):([\d.]+)>", prompt)
    fields = params(settings, [(name, float(strength), "") for name, strength in found])
    return json.dumps({name: getattr(settings, name) for name in KNOB_BY_NAME}), written(prompt, fields)


def tab(name: str) -> dict[str, Any]:
    """One tab: prompt, panel, Generate, its result and its infotext, a box to paste from."""
    prompt = gr.Textbox("", label="Prompt", elem_id=f"{name}_prompt", lines=3)
    with gr.Row():
        width = gr.Slider(64, 2048, 512, step=8, label="Width", elem_id=f"{name}_width")
        height = gr.Slider(64, 2048, 512, step=8, label="Height", elem_id=f"{name}_height")
        switch = gr.Button("⇅", elem_id=f"{name}_switch")
    switch.click(lambda w, h: (h, w), [width, height], [width, height])
    components = panel.build(name == "img2img")
    button = gr.Button("Generate", elem_id=f"{name}_generate")
    result = gr.Textbox(label="Knobs", elem_id=f"{name}_result")
    text = gr.Textbox(label="Infotext", elem_id=f"{name}_infotext", lines=3)
    button.click(generate, [prompt, *components], [result, text])
    fields = [(prompt, "Prompt"), *infotext.paste_fields(components)]
    source = gr.Textbox(label="Paste from", elem_id=f"{name}_source", lines=3)
    paste = gr.Button("Paste", elem_id=f"{name}_paste")
    pastes, times = gr.Textbox("0", label="Pastes", elem_id=f"{name}_pastes"), itertools.count(1)
    paste.click(
        lambda text: [*(pasted(component, key, read(text)) for component, key in fields), str(next(times))],
        [source],
        [*(component for component, _ in fields), pastes],
    )
    return {"fields": fields}


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(css=(ROOT / "style.css").read_text(encoding="utf8"), analytics_enabled=False) as demo:
        with gr.Tabs():
            with gr.Tab("txt2img", elem_id="tab_txt2img"):
                txt2img = tab("txt2img")
                send = gr.Button("Send to img2img", elem_id="send")
            with gr.Tab("img2img", elem_id="tab_img2img"):
                img2img = tab("img2img")
        names = ["Prompt", *infotext.paste_field_names()]
        send.click(
            lambda *values: values,
            [component for component, name in txt2img["fields"] if name in names],
            [component for component, name in img2img["fields"] if name in names],
        )
        # A listener without Python, as the WebUIs have them.
        send.click(None, **gradio_compat.javascript("() => { window.sent = true; }"))
    return demo


def add_javascript() -> None:
    """Have the page load our file the way the WebUIs do: written into the served HTML."""
    files = sorted((ROOT / "javascript").glob("*.js"))
    scripts = CALLBACKS + "\n".join(file.read_text(encoding="utf8") for file in files)
    original = gradio.routes.templates.TemplateResponse

    def with_scripts(*args: Any, **kwargs: Any) -> Any:
        response = original(*args, **kwargs)
        response.body = response.body.replace(b"</head>", f"<script>{scripts}</script></head>".encode())
        response.init_headers()
        return response

    gradio.routes.templates.TemplateResponse = with_scripts


class Files(dict[str, Any]):
    """There is every LoRA but one."""

    def __contains__(self, name: object) -> bool:
        return name != "gone"


def add_networks() -> None:
    """The module where the WebUIs keep the LoRAs they know, with one that is recognised as a speed LoRA."""
    networks = ModuleType("networks")
    files = {
        "fox": {"modelspec.trigger_phrase": "vulpo"},
        "ink": {"modelspec.trigger_phrase": "inkash"},
        "fast": {"modelspec.title": "SDXL Lightning 4 steps"},
    }
    networks.__dict__["available_network_aliases"] = Files(
        {name: SimpleNamespace(metadata=metadata) for name, metadata in files.items()}
    )
    sys.modules["networks"] = networks


def count(pattern: str) -> int:
    """Stands in for the LoRAs of a pool."""
    if pattern == "none":
        raise LoratorioError("No LoRA matches 'none'.")
    return 12 if pattern == "*" else 1


def checked(asked: dict[str, Any]) -> Report:
    """Stands in for the self-check: its table has what it was asked with."""
    time.sleep(2)
    findings = (Finding("One", PASS, json.dumps(asked)), Finding("Two", FAIL, "<i>wrong</i> | bad"))
    return Report(findings, {"device": "none"})


if __name__ == "__main__":
    self_check.run = checked
    add_javascript()
    add_networks()
    demo = build().queue()
    app, _, _ = demo.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), prevent_thread_lock=True)
    found.pools.count, found.pools.is_new = count, lambda name: False
    found.add_route(demo, app)
    docs.add_route(demo, app)
    demo.block_thread()
