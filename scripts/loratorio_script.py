"""The extension's script: it passes the WebUI's events on to `loratorio` and has no logic of its own."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gradio as gr
from modules import script_callbacks, scripts

ROOT = str(Path(scripts.basedir()))
if ROOT not in sys.path:
    sys.path.append(ROOT)

from loratorio.hosts import forget, sum_of_tags, webui_host  # noqa: E402
from loratorio.hosts.shared.host import refuse  # noqa: E402
from loratorio.job import Job  # noqa: E402
from loratorio.webui import api, docs, infotext_fields, lookup, options, panel, pools, self_check, xyz  # noqa: E402

options.register()
script_callbacks.on_app_started(lookup.add_route)
script_callbacks.on_app_started(docs.add_route)
script_callbacks.on_app_started(self_check.add_route)


class LoratorioScript(scripts.Script):
    """An AlwaysOn script in txt2img and img2img. Its current job is an attribute of the WebUI's processing object."""

    def title(self):
        return "LoRAtorio"

    def show(self, is_img2img):
        xyz.add_axes()  # now all scripts are loaded, and none has built its part of the page
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        components = panel.build(is_img2img, repeats=sum_of_tags())
        self.infotext_fields = infotext_fields.paste_fields(components)
        self.paste_field_names = infotext_fields.paste_field_names()
        return components

    def before_process(self, p, *args):
        p.loratorio_job = None

    def process(self, p, *args):
        with stopping(p):
            settings = api.settings_from_args(args, p)
            infotext_fields.write(p.extra_generation_params, settings, None)
            if settings.enabled:
                standing = api.standing(settings, args, p)
                p.loratorio_job = Job(p, settings, standing, gr.Warning, partial(write_infotext, p))
                p.loratorio_comments = infotext_fields.Comments(p.comments)
                return
            forget()
            if api.is_off_by_mistake(settings, args):
                p.extra_generation_params[infotext_fields.NOTE_KEY] = api.OFF
                p.comment(api.OFF)

    def before_process_batch(self, p, *args, prompts=(), **kwargs):
        with stopping(p):
            if job_of(p):
                write_infotext(p)
                pools.expand(job_of(p), prompts)

    def process_batch(self, p, *args, **kwargs):
        with stopping(p):
            if job_of(p):
                pools.restore(job_of(p))

    def process_before_every_sampling(self, p, *args, **kwargs):
        with stopping(p):
            if job_of(p):
                webui_host().before_sampling(job_of(p))

    def postprocess_batch(self, p, *args, **kwargs):
        if job_of(p):
            job_of(p).end_batch()
            write_infotext(p)
            p.loratorio_comments.update(job_of(p))

    def postprocess(self, p, processed, *args):
        if job_of(p):
            job_of(p).release()
            if job_of(p).settings.weight_maps:
                from loratorio.hosts.shared.other_extensions import chosen_script, takes_maps
                from loratorio.webui import gallery

                if takes_maps(chosen_script(p)):
                    gallery.add_maps(job_of(p), processed)


def job_of(p):
    return getattr(p, "loratorio_job", None)


@contextmanager
def stopping(p):
    """An error stops the job. The WebUI itself would print it and make a different picture than the requested one."""
    try:
        yield
    except Exception as problem:
        refuse(p, problem, gr.Warning)


def write_infotext(p):
    infotext_fields.write(p.extra_generation_params, job_of(p).settings, job_of(p))
