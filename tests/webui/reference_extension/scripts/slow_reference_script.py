"""The slow reference, as an extension of its own, for AUTOMATIC1111's WebUI and the Forge family.

Its one argument is `{"patch_size": …, "temperature": …, "top_k": …, "recentre": …}`; without it it does nothing.
"""

import importlib.util

import gradio as gr
from modules import scripts

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


host.install()
