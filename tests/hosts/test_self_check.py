"""The self-check inside the stand-ins of AUTOMATIC1111 and of the Forge family."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from loratorio.adapters.bank import Bank
from loratorio.check import FAIL, MEASURED, NOT_CHECKED, PASS, STEPS, STOPPED
from loratorio.errors import LoratorioError
from loratorio.job import Job
from loratorio.settings import Settings
from loratorio.webui import self_check

STANDINS = Path(__file__).parent.parent / "standin"
PACKAGES = ("modules", "network", "networks", "backend", "ldm_patched", "modules_forge", "run")
PROMPT = "a red circle <lora:a:role=style:0.8> <pool:x> <lora:b:at=left:1>"


class Webui:
    """A stand-in with as much more of a WebUI's modules as the check uses."""

    def __init__(self, variant: str, folder: Path, monkeypatch: Any) -> None:
        import run  # type: ignore[import-not-found, unused-ignore]
        from modules import processing, shared

        self.is_a1111, self.pictures, self.history = variant == "a1111", [], folder / "params.txt"
        self.standin = run.Standin() if self.is_a1111 else run.Standin(variant)
        self.loras = {name: self.standin.lora(name, seed) for seed, name in enumerate(("a", "b", "c"))}
        self.model = self.standin.model
        self.model.sd_checkpoint_info = SimpleNamespace(filename="base", name_for_extra="base")
        shared.sd_model, self.shared, self._run = self.model, shared, run
        self.before: Callable[[Any], None] = lambda p: None
        state = shared.state
        state.skipped, state.job = False, ""
        state.begin, state.end = lambda job: setattr(state, "job", job), lambda: setattr(state, "job", "")
        monkeypatch.setattr(shared, "total_tqdm", SimpleNamespace(clear=lambda: None), raising=False)
        self._process = processing.process_images
        self._own = getattr(processing, "StableDiffusionProcessingTxt2Img", None)
        monkeypatch.setattr(processing, "process_images", self.process_images)
        monkeypatch.setattr(processing, "StableDiffusionProcessingTxt2Img", self.processing, raising=False)
        others = [
            SimpleNamespace(name="builtin", is_builtin=True, path="x", version=""),
            SimpleNamespace(name="other", is_builtin=False, path=str(folder), version="v1 | x"),
        ]
        self.module("call_queue", queue_lock=threading.Lock())
        self.module("paths", data_path=str(folder))
        self.module("devices", device=torch.device("cpu"))
        self.module("extensions", active=lambda: others)
        self.module("launch_utils", git_tag=lambda: "v0")
        self.module(
            "scripts",
            scripts_txt2img=SimpleNamespace(alwayson_scripts=[Script(variant)]),
            ScriptRunner=SimpleNamespace,
        )

    def module(self, name: str, **content: Any) -> None:
        import modules

        full = f"modules.{name}"
        module = sys.modules.setdefault(full, ModuleType(full))
        vars(module).update(content)
        setattr(modules, name, module)

    def processing(self, *args: Any, **fields: Any) -> Any:
        if args:  # the stand-in's own call
            return self._own(*args, **fields)
        prompt, negative_prompt = fields.pop("prompt"), fields.pop("negative_prompt")
        assert fields.pop("do_not_save_samples")
        assert fields.pop("do_not_save_grid")
        fields.pop("sd_model")
        self.pictures.append(prompt)
        tags = []
        for content in re.findall(r"<lora:([^>]*)>", prompt):
            name, *parts = content.split(":")
            named = dict(part.split("=", 1) for part in parts if "=" in part)
            strength = float(next(part for part in parts if "=" not in part))
            if name in self.loras and self.is_a1111:
                tags.append(self._run.Tag(self.loras[name], strength, strength, named))
            elif name in self.loras:
                tags.append(self._run.tag(name, strength, strength, **named))
        text = re.sub("<[^>]*>", "", prompt)
        return self.standin.job(
            *tags, prompts=(text,), negative=negative_prompt, close=lambda: None, **fields
        )

    def process_images(self, p: Any) -> Any:
        self.history.write_text("the check's", encoding="utf8")
        (script,) = p.scripts.alwayson_scripts
        p.events = [
            (event, lambda p, event=event: getattr(script, event)(p, *p.script_args))
            for event in ("process", "process_before_every_sampling")
        ]
        self.before(p)
        samples = self._process(p)
        return SimpleNamespace(images=[SimpleNamespace(tobytes=samples.numpy().tobytes)])

    def check(self, prompt: str = PROMPT, **more: Any) -> Any:
        return self_check.run({"prompt": prompt, "cfg_scale": 5, **more})


class Script:
    """What scripts/loratorio_script.py is to the WebUIs."""

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def title(self) -> str:
        return "LoRAtorio"

    def process(self, p: Any, knobs: Any) -> None:
        settings = Settings.from_mapping(knobs)
        p.loratorio_job = Job(p, settings, tell=p.comment) if settings.enabled else None

    def process_before_every_sampling(self, p: Any, knobs: Any) -> None:
        if not p.loratorio_job:
            return
        if self._variant == "a1111":
            from loratorio.hosts.a1111 import HOST as host
        else:
            from loratorio.hosts.forge import Forge
            from loratorio.hosts.forge.variants import Neo, ReForge, Variant

            host = Forge({"neo": Neo, "forge": Variant, "reforge": ReForge}[self._variant]())
        host.before_sampling(p.loratorio_job)


@pytest.fixture(params=["a1111", "neo", "forge", "reforge"])
def webui(request: Any, tmp_path: Path, monkeypatch: Any) -> Iterator[Webui]:
    def ours() -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}

    before = ours()
    for name in before:
        del sys.modules[name]
    path = str(STANDINS / ("a1111" if request.param == "a1111" else "forge"))
    sys.path.insert(0, path)
    try:
        yield Webui(request.param, tmp_path, monkeypatch)
    finally:
        sys.path.remove(path)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def verdicts(report: Any) -> list[str]:
    return [finding.verdict for finding in report.findings]


def test_two_loras(webui: Webui) -> None:
    webui.history.write_text("the user's", encoding="utf8")
    report = webui.check()
    assert verdicts(report) == [PASS] * 4 + [MEASURED] * 3 + [PASS], report.text
    assert report.summary == "All 5 checks passed."
    assert "6, at most 6 per call, with the preset Paper; 2, at most 2 per call" in report.text
    # Each LoRA has its strength, and nothing else of its tag but what the check gives it.
    assert "a red circle   <lora:a:0.8><lora:b:1>" in webui.pictures
    assert any("<lora:a:role=content:at=0.0,0,0.25,1~0:0.8>" in prompt for prompt in webui.pictures)
    assert report.facts["other extensions"] == "other v1 | x"
    assert "other v1 \\| x" in report.text
    # As before.
    assert webui.history.read_text(encoding="utf8") == "the user's"
    assert not webui.shared.state.job
    assert not any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in self_check._model().modules()
    )


def test_other_numbers_of_loras(webui: Webui) -> None:
    none = webui.check("a red circle")
    assert verdicts(none) == [NOT_CHECKED] * 8
    assert "There is no LoRA in the prompt." in none.text
    assert not webui.history.exists()
    one = webui.check("a red circle <lora:a:1>")
    assert verdicts(one) == [PASS, NOT_CHECKED, PASS, PASS, *[MEASURED] * 3, PASS], one.text
    three = webui.check("a <lora:a:1> <lora:b:1> <lora:gone:1> <lora:c:1>")
    assert verdicts(three)[0] == PASS
    assert "gone" in three.facts["LoRAs without effect"]
    assert verdicts(three) == verdicts(webui.check()), three.text


def test_shifted_rows_fail(webui: Webui, monkeypatch: Any) -> None:
    routed = Bank.routed
    monkeypatch.setattr(
        Bank, "routed", lambda self, mixes, *args: routed(self, [*mixes[1:], mixes[0]], *args)
    )
    report = webui.check()
    assert report.findings[2].verdict == FAIL, report.text
    assert "checks failed. Please copy this table into a bug report." in report.summary
    # Nothing of it stays.
    assert report.findings[-1].verdict == PASS


def test_a_lora_of_half_its_strength_fails(webui: Webui, monkeypatch: Any) -> None:
    routed = Bank.routed
    monkeypatch.setattr(
        Bank,
        "routed",
        lambda self, mixes, *args: routed(self, [tuple(part / 2 for part in mix) for mix in mixes], *args),
    )
    assert verdicts(webui.check())[:3] == [FAIL] * 3


def test_stopped_in_the_middle(webui: Webui) -> None:
    def interrupt(p: Any) -> None:
        webui.shared.state.interrupted = len(webui.pictures) == 9

    webui.before = interrupt
    report = webui.check()
    assert report.findings[0].verdict == PASS
    assert {finding.found for finding in report.findings[1:]} == {STOPPED}
    assert len(webui.pictures) == 9
    assert not webui.shared.state.interrupted
    webui.before = lambda p: None
    assert webui.check().findings[-1].verdict == PASS


def test_an_error_in_the_middle_is_a_row_of_the_table(webui: Webui) -> None:
    def fail(p: Any) -> None:
        if p.script_args[0].get("method") == "merge":
            raise ZeroDivisionError("theirs | ours")

    webui.before = fail
    report = webui.check()
    assert verdicts(report) == [PASS, FAIL, PASS, PASS, *[MEASURED] * 3, PASS], report.text
    assert "The picture failed with an error: ZeroDivisionError: theirs \\| ours" in report.text
    webui.before = lambda p: 1 / 0
    report = webui.check()
    assert verdicts(report) == [NOT_CHECKED] * 8
    assert (
        "No picture without LoRAtorio could be made. The picture failed with an error: ZeroDivisionError"
        in report.text
    )
    assert not webui.shared.state.job


def test_a_picture_that_is_left_to_the_webui_proves_nothing(webui: Webui, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        Script, "process_before_every_sampling", lambda self, p, knobs: p.loratorio_job.note("Why.")
    )
    report = webui.check()
    assert verdicts(report)[:3] == [NOT_CHECKED] * 3
    assert "0 of 2 LoRAs were composed. Why." in report.text


def test_nan_fails(webui: Webui) -> None:
    def poison(p: Any) -> None:
        if p.steps == STEPS and p.script_args[0].get("method") == "merge":
            with torch.no_grad():
                self_check._model().conv_out.bias.fill_(torch.nan)

    webui.before = poison
    report = webui.check()
    assert report.findings[1].verdict == report.findings[3].verdict == FAIL
    assert "NaN or infinite numbers" in report.findings[3].found


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"width": 8}, "width must be a number from 64 to 2048, not 8"),
        ({"height": "x"}, "height must be"),
        ({"cfg_scale": 0.5}, "cfg_scale must be"),
    ],
)
def test_bad_values(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LoratorioError, match=sentence):
        self_check.Wanted.of(values)


def test_names_cannot_leave_their_cells(webui: Webui) -> None:
    webui.loras["<i>x"] = webui.loras.pop("b")
    html = self_check.answer_page(json.dumps({"prompt": "a <lora:<script>:1> <lora:a:1>", "cfg_scale": 5}))
    assert "<script" not in html
    assert "<table>" in html


@pytest.mark.parametrize("auth", [None, "me:secret,you:x"])
def test_the_route(webui: Webui, auth: str | None, monkeypatch: Any) -> None:
    fastapi = pytest.importorskip("fastapi")
    from fastapi.security import HTTPBasic
    from fastapi.testclient import TestClient

    question = fastapi.Depends(HTTPBasic())

    class Api:
        """As the WebUIs have it."""

        credentials: dict[str, str]

        def auth(self, given=question):  # type: ignore[no-untyped-def]
            if self.credentials.get(given.username) != given.password:
                raise fastapi.HTTPException(401)

    webui.module("api")
    webui.module("api.api", Api=Api)
    monkeypatch.setattr(webui.shared, "cmd_opts", SimpleNamespace(api=True, api_auth=auth), raising=False)
    app = fastapi.FastAPI()
    self_check.add_route(None, app)
    page = TestClient(app)
    if auth:
        assert page.post(self_check.PATH, json={}).status_code == 401
        page.auth = ("me", "secret")
    answer = page.post(self_check.PATH, json={"prompt": "a <lora:a:1>"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["findings"][0]["verdict"] == PASS
    assert set(answer.json()) == {"summary", "findings", "facts", "text"}
    refused = page.post(self_check.PATH, json={"width": "wide"})
    assert refused.status_code == 422
    assert refused.json()["detail"] == "width must be a number from 64 to 2048, not 'wide'."
    # Without --api there is none.
    webui.shared.cmd_opts.api = False
    app = fastapi.FastAPI()
    self_check.add_route(None, app)
    assert TestClient(app).post(self_check.PATH, json={}).status_code == 404
