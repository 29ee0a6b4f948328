"""The slow reference, as an extension of its own, for AUTOMATIC1111's WebUI and the Forge family.

Its one argument is `{"patch_size": …, "temperature": …, "top_k": …, "recentre": …}`; without it it does nothing.
"""

import gc
import importlib.util

import gradio as gr
import torch
from fastapi import Body
from modules import script_callbacks, scripts

# A WebUI puts the extension's folder on the path while it loads its scripts.
from slow_reference import run

if importlib.util.find_spec("modules_forge"):
    from slow_reference import forge as host
else:
    from slow_reference import a1111 as host


class SlowReference(scripts.Script):
    sorting_priority = 99

    def title(self):
        return "LoRAtorio slow reference"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.JSON(value=None, visible=False)]

    def process(self, p, knobs=None, *args):
        run.clear()
        if knobs:
            run.update(p=p, knobs=knobs)

    def process_before_every_sampling(self, p, knobs=None, *args, **kwargs):
        if run:
            host.begin_pass(p)

    def postprocess(self, p, processed, *args):
        run.clear()


def layers():
    """Names in the original code and shapes of the UNet's weights."""
    return {name: list(weight.shape) for name, weight in host.weights().items()}


def change(lora: str = Body(...), layer: str = Body(...)):
    """A layer's weight, and what the WebUI itself adds to it for a LoRA at strength 1, both as flat lists."""
    before = host.weights()[layer].detach().float().cpu()
    with torch.no_grad():
        added = host.change(lora, layer, before.clone())
    return {"before": before.flatten().tolist(), "change": added.float().cpu().flatten().tolist()}


def held():
    """How many LoRAs LoRAtorio has in memory. Those that only wait for Python to look for rings count, too."""
    return sum(
        type(each).__name__ == "Adapter" and type(each).__module__.startswith("loratorio.")
        for each in gc.get_objects()
    )


def shift_rows(on: bool = Body(..., embed=True)):
    """From now on every row gets the LoRAs of the next one, or again its own: what the self-check must see."""
    from loratorio.adapters.bank import Bank

    own = getattr(Bank.routed, "own", Bank.routed)

    def shifted(self, mixes, *args):
        return own(self, [*mixes[1:], mixes[0]], *args)

    shifted.own = own
    Bank.routed = shifted if on else own


def add_routes(demo, app):
    app.add_api_route("/sdapi/v1/slow-reference-shift-rows", shift_rows, methods=["POST"])
    app.add_api_route("/sdapi/v1/slow-reference-held", held, methods=["GET"])
    app.add_api_route("/sdapi/v1/slow-reference-layers", layers, methods=["GET"])
    app.add_api_route("/sdapi/v1/slow-reference-change", change, methods=["POST"])


script_callbacks.on_app_started(add_routes)
host.install()
