"""The doorway: the WebUI's events come in here and go on into `loratorio`. No logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import gradio as gr
from modules import scripts

ROOT = str(Path(scripts.basedir()))
if ROOT not in sys.path:
    sys.path.append(ROOT)

from loratorio.errors import LoratorioError  # noqa: E402
from loratorio.hosts import webui_host  # noqa: E402
from loratorio.hosts.base import Job, refuse  # noqa: E402
from loratorio.settings import KNOBS, Settings  # noqa: E402


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
        with gr.Accordion("LoRAtorio", open=False):
            components = []
            for knob in KNOBS:
                if knob.kind == "bool":
                    components.append(gr.Checkbox(value=knob.default, label=knob.label))
                elif knob.kind == "choice":
                    components.append(gr.Dropdown(choices=[name for name, _ in knob.choices], value=knob.default, label=knob.label))
                else:
                    components.append(gr.Slider(minimum=knob.minimum, maximum=knob.maximum, step=knob.step, value=knob.default, label=knob.label))
        self.infotext_fields = [(component, knob.infotext_key) for component, knob in zip(components, KNOBS)]
        return components

    def before_process(self, p, *args):
        self.job = None

    def process(self, p, *args):
        self.job = None
        try:
            values = args[0] if args and isinstance(args[0], dict) else {knob.name: value for knob, value in zip(KNOBS, args)}
            settings = Settings.from_mapping(values)
            if settings.enabled:
                self.job = Job(p, settings, tell=lambda sentence: self.tell(p, sentence))
        except LoratorioError as problem:
            refuse(p, problem)

    def tell(self, p, sentence):
        p.comment(sentence)
        p.extra_generation_params["LoRAtorio note"] = " ".join(self.job.notes)
        gr.Warning(sentence)

    def process_batch(self, p, *args, **kwargs):
        if self.job is not None:
            webui_host().process_batch(self.job)

    def process_before_every_sampling(self, p, *args, **kwargs):
        if self.job is not None:
            webui_host().before_sampling(self.job)

    def postprocess_batch(self, p, *args, **kwargs):
        if self.job is not None and self.job.passes:
            done = self.job.passes[-1]
            for knob in KNOBS:
                p.extra_generation_params[knob.infotext_key] = getattr(self.job.settings, knob.name)
            p.extra_generation_params["LoRAtorio LoRAs"] = ", ".join(f"{name} {strength:g}" for name, strength in zip(done.loras, done.strengths))
