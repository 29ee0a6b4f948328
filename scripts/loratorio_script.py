"""The doorway: the WebUI's events come in here and go on into `loratorio`. No logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import gradio as gr
from modules import scripts

ROOT = str(Path(scripts.basedir()))
if ROOT not in sys.path:
    sys.path.append(ROOT)

from loratorio.hosts import webui_host  # noqa: E402
from loratorio.hosts.base import Job, refuse  # noqa: E402
from loratorio.webui import api, gallery, infotext, options, panel, pools, xyz  # noqa: E402

options.register()
xyz.register()


class LoratorioScript(scripts.Script):
    """An AlwaysOn script in txt2img and img2img."""

    def __init__(self) -> None:
        super().__init__()
        self.job = None

    def title(self):
        return "LoRAtorio"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        components = panel.build(is_img2img)
        self.infotext_fields = infotext.paste_fields(components)
        self.paste_field_names = infotext.paste_field_names()
        return components

    def before_process(self, p, *args):
        self.job = None

    def process(self, p, *args):
        self.job = None
        try:
            settings = api.settings_from_args(args, p)
            if settings.enabled:
                self.job = Job(p, settings, tell=lambda sentence: self.tell(p, sentence))
        except (
            Exception
        ) as problem:  # printed and forgotten by the WebUI, it would give another picture than asked for
            refuse(p, problem)

    def tell(self, p, sentence):
        p.comment(sentence)
        p.extra_generation_params["LoRAtorio note"] = " ".join(self.job.notes)
        gr.Warning(sentence)

    def before_process_batch(self, p, *args, prompts=(), **kwargs):
        if self.job is not None:
            try:
                pools.expand(self.job, prompts)
            except Exception as problem:
                refuse(p, problem)

    def process_batch(self, p, *args, **kwargs):
        if self.job is not None:
            pools.restore(self.job)
        self.on_host("process_batch", p)

    def process_before_every_sampling(self, p, *args, **kwargs):
        self.on_host("before_sampling", p)

    def on_host(self, event, p):
        try:
            if self.job is not None:
                getattr(webui_host(), event)(self.job)
        except Exception as problem:
            refuse(p, problem)

    def postprocess_batch(self, p, *args, **kwargs):
        if self.job is not None and self.job.passes:
            p.extra_generation_params.update(infotext.of_passes(self.job.settings, self.job.passes))

    def postprocess(self, p, processed, *args):
        if self.job is not None and self.job.settings.weight_maps:
            gallery.add_maps(self.job, processed)
