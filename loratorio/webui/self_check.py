"""The self-check inside a WebUI: its own txt2img makes the pictures, with and without LoRAtorio, and nothing of them is kept."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..check import ABOUT_DB, Asked, Calls, Made, Report, Stopped, check
from ..errors import LoratorioError
from ..refusal import refusals
from ..settings import KNOBS, Settings

PATH = "/loratorio/check"
HOST = "the WebUI's own merging"

_TAG = re.compile(r"<(lora|lyco|pool):([^<>]*)>", re.IGNORECASE)
_OF_STRENGTH = ("te", "unet", "dyn")
"""The WebUI's own named arguments; all others (roles, places, own words, other extensions') are left out for the check."""

_STOPPED = ("interrupted", "skipped", "stopping_generation")
"""What the WebUI's state says when the user has ended a picture."""

SEED, LARGEST = 1, 2048


@dataclass(frozen=True)
class Wanted:
    """What the check runs with.

    Attributes:
        text: the prompt without its tags. loras: names of its LoRAs, and what their tags say of strength.
        width, height: in pixels, multiples of 64.
    """

    text: str
    negative: str
    loras: Mapping[str, str]
    width: int
    height: int
    cfg_scale: float

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Wanted:
        """From a page's or a caller's values: prompt, negative_prompt, width, height, cfg_scale; those left out have a default.

        Raises:
            LoratorioError: one of them cannot be used.
        """
        prompt, negative = (str(asked.get(name) or "") for name in ("prompt", "negative_prompt"))
        loras: dict[str, str] = {}
        for kind, content in _TAG.findall(prompt):
            name, *parts = content.split(":")
            if kind.lower() != "pool":
                kept = [part for part in parts if part.partition("=")[0] in _OF_STRENGTH or "=" not in part]
                loras.setdefault(name.strip(), ":".join(kept) or "1")
        width, height = (
            int(_number(asked, name, 512, 64, LARGEST)) // 64 * 64 for name in ("width", "height")
        )
        return cls(
            _TAG.sub("", prompt), negative, loras, width, height, _number(asked, "cfg_scale", 7, 1, 30)
        )

    def prompt(self, asked: Asked) -> str:
        """The prompt of one of the check's pictures."""
        tags = list(self.loras.items())
        places = asked.places or ("",) * len(asked.loras)
        text = self.text
        for number, place in zip(asked.loras, places, strict=True):
            name, strength = tags[number]
            # A LoRA that is recognised as a speed LoRA is weighed for once, too.
            own = [name, "role=content" * (asked.settings is not None), f"at={place}" * bool(place), strength]
            text += f"<lora:{':'.join(filter(None, own))}>"
        return text


def _number(asked: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = asked.get(name)
    try:
        number = float(default if value is None else value)
    except (TypeError, ValueError):
        number = math.nan
    if not least <= number <= most:
        raise LoratorioError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}.")
    return number


def run(asked: Mapping[str, Any]) -> Report:
    """Check with the checkpoint that is chosen and the LoRAs of a prompt; waits for its turn in the WebUI's queue.

    Raises:
        LoratorioError: the values cannot be used.
    """
    from modules import call_queue, shared

    wanted = Wanted.of(asked)
    with call_queue.queue_lock, _history_kept():
        shared.state.begin(job="LoRAtorio self-check")
        try:
            return check(list(wanted.loras), HOST, _Maker(wanted).made, lambda: _facts(wanted))
        finally:
            shared.state.end()
            shared.total_tqdm.clear()
            for name in _STOPPED:
                setattr(shared.state, name, False)


class _Maker:
    """Makes the check's pictures."""

    def __init__(self, wanted: Wanted) -> None:
        from modules import scripts

        self._wanted = wanted
        # Of all scripts only ours: what is checked is LoRAtorio and the WebUI.
        (own,) = (each for each in scripts.scripts_txt2img.alwayson_scripts if each.title() == "LoRAtorio")
        self._runner, script = scripts.ScriptRunner(), copy.copy(own)
        script.args_from, script.args_to = 0, 1
        self._runner.scripts, self._runner.alwayson_scripts = [script], [script]

    def made(self, asked: Asked) -> Made:
        """See `loratorio.check.Make`."""
        from modules import processing, shared

        wanted, calls, latents = self._wanted, Calls(), []
        settings = asked.settings or Settings()
        knobs = {knob.name: getattr(settings, knob.name) for knob in KNOBS}
        with closing(
            processing.StableDiffusionProcessingTxt2Img(
                sd_model=shared.sd_model,
                prompt=wanted.prompt(asked),
                negative_prompt=wanted.negative,
                seed=SEED,
                sampler_name="Euler",
                steps=asked.steps,
                cfg_scale=wanted.cfg_scale,
                width=wanted.width,
                height=wanted.height,
                restore_faces=False,
                tiling=False,
                do_not_save_samples=True,
                do_not_save_grid=True,
            )
        ) as p:
            # In this order: with both there, the WebUI sets its scripts up.
            p.scripts, p.script_args = self._runner, (knobs,)
            p.is_api, p.scheduler = True, "Automatic"
            sample = p.sample

            def watched(*args: Any, **kwargs: Any) -> Any:
                with calls.watched(_model()):
                    samples = sample(*args, **kwargs)
                latents.append(samples.detach().float().cpu().clone())
                return samples

            p.sample = watched
            try:
                processed = processing.process_images(p)
            finally:  # a picture that is stopped may end in an error: of that, this is what counts
                if any(getattr(shared.state, name, False) for name in _STOPPED):
                    raise Stopped
        job = getattr(p, "loratorio_job", None)
        composed = len(job.passes[0].uses) if job and job.passes else 0
        return Made(latents[0], processed.images[0].tobytes(), calls, composed, job.notes if job else ())


def _model() -> Any:
    """The torch module that the WebUI samples with."""
    from modules import shared

    objects = getattr(shared.sd_model, "forge_objects", None)  # the Forge family's
    return (shared.sd_model if objects is None else objects.unet).model.diffusion_model


@contextmanager
def _history_kept() -> Iterator[None]:
    """Put back what the WebUI remembers of the last generation, which is read when an empty prompt is pasted."""
    from modules import paths

    file = Path(paths.data_path) / "params.txt"
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    finally:
        if before is not None:
            file.write_bytes(before)
        else:
            file.unlink(missing_ok=True)


def _facts(wanted: Wanted) -> dict[str, str]:
    """Versions, device, checkpoint, picture and extensions."""
    import torch
    from modules import devices, extensions, shared

    device = str(devices.device)
    if torch.cuda.is_available() and device.startswith("cuda"):
        device += f" ({torch.cuda.get_device_name()})"
    others = [
        " ".join(filter(None, (each.name, each.version)))
        for each in extensions.active()
        if not each.is_builtin and Path(each.path).resolve() != Path(__file__).resolve().parents[2]
    ]
    return {
        "LoRAtorio": __version__,
        "WebUI": f"{'Forge family' if hasattr(shared.sd_model, 'forge_objects') else 'AUTOMATIC1111'} {_webui_version()}",
        "Python, torch, gradio": ", ".join((sys.version.split()[0], torch.__version__, _version("gradio"))),
        "device": device,
        "checkpoint": str(shared.sd_model.sd_checkpoint_info.name_for_extra),
        "picture": f"{wanted.width}×{wanted.height}, Euler, CFG {wanted.cfg_scale:g}, seed {SEED}",
        "other extensions": ", ".join(others) or "none",
    }


def _webui_version() -> str:
    found = ["", ""]
    with suppress(Exception):  # git may be missing, or the folder no checkout
        launch = importlib.import_module("modules.launch_utils")
        found[0] = str(launch.git_tag())
        found[1] = f"({launch.commit_hash()[:10]})"
    return " ".join(filter(None, found)) or "(version not known)"


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__version__", "?"))


# -- the page and the API -------------------------------------------------------------------------------------------------


def answer_page(asked: str) -> str:
    """For the panel's button: the table as HTML. asked: JSON of the page's values (javascript/loratorio_check.js)."""
    try:
        return _html(run(json.loads(asked)))
    except LoratorioError as problem:
        return f"<p>{escape(str(problem))}</p>"


def _html(report: Report) -> str:
    rows = "".join(
        f'<tr class="loratorio-{each.verdict.replace(" ", "-").lower()}">'
        f"<td>{escape(each.what)}</td><td>{escape(each.verdict)}</td><td>{escape(each.found)}</td></tr>"
        for each in report.findings
    )
    facts = "".join(f"<li>{escape(name)}: {escape(value)}</li>" for name, value in report.facts.items())
    return (
        f"<p><b>{escape(report.summary)}</b> "
        f'<button type="button" class="loratorio-copy" data-text="{escape(report.text)}">Copy</button></p>'
        f"<table><tr><th>check</th><th>result</th><th>found</th></tr>{rows}</table><p>{escape(ABOUT_DB)}</p><ul>{facts}</ul>"
    )


def add_route(_: Any, app: Any) -> None:
    """For the WebUI's callback when its server has started: the check as a call of the API, where the WebUI has one.

    With ``--api-auth`` it asks for the same name and password.
    """
    from modules.shared import cmd_opts

    if not getattr(cmd_opts, "api", False):
        return

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        with refusals():
            report = run(asked)
        findings = [asdict(each) for each in report.findings]
        return {
            "summary": report.summary,
            "findings": findings,
            "facts": dict(report.facts),
            "text": report.text,
        }

    app.add_api_route(PATH, answer, methods=["POST"], dependencies=_who_may(cmd_opts))


def _who_may(cmd_opts: Any) -> Sequence[Any]:
    """What stands before the route: the WebUI's own question for name and password."""
    if not getattr(cmd_opts, "api_auth", None):
        return []
    from fastapi import Depends
    from modules.api.api import Api

    known = Api.__new__(Api)  # only this method is needed, and the WebUI's own instance cannot be reached
    known.credentials = dict(pair.split(":", 1) for pair in cmd_opts.api_auth.split(","))
    return [Depends(known.auth)]
