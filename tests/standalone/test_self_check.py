"""``loratorio check``: its table, its exit code, and that it sees what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratorio.adapters.bank import Bank
from loratorio.check import FAIL, MEASURED, NOT_CHECKED, PASS
from loratorio.standalone import cli, self_check
from loratorio.standalone.checkpoint import load_checkpoint
from loratorio.standalone.generate import Request
from loratorio.standalone.model import LoadedModel
from loratorio.standalone.text import TextConditioner
from tests import tiny


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    root: Path = tmp_path_factory.mktemp(request.param)
    save = tiny.save_sd if request.param == "sd" else tiny.save_sdxl
    made = load_checkpoint(save(root / "model"))
    for seed, name in enumerate(("rose", "dusk")):
        tiny.save_kohya(root / f"{name}.safetensors", made.unet, made.text_encoders[0], size=0.5, seed=seed)
    return LoadedModel(made, root)


def checked(model: LoadedModel, prompt: str = "a <lora:rose:0.8> <lora:dusk:0.5:role=style>") -> Any:
    return self_check.run_check(model, Request(prompt, "b", cfg=3.0, width=64, height=64))


def verdicts(report: Any) -> list[str]:
    return [finding.verdict for finding in report.findings]


def weights(model: LoadedModel) -> list[torch.Tensor]:
    modules = model.checkpoint.unet, *model.checkpoint.text_encoders
    return [parameter.clone() for module in modules for parameter in module.parameters()]


def test_composing_agrees_with_merging(model: LoadedModel) -> None:
    before = weights(model)
    report = checked(model)
    assert verdicts(report) == [PASS] * 4 + [MEASURED] * 3 + [PASS], report.text
    assert all(torch.equal(one, other) for one, other in zip(before, weights(model), strict=True))


def test_texts_of_the_wrong_lora_fail(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TextConditioner.of
    monkeypatch.setattr(
        TextConditioner, "of", lambda self, wanted: right(self, [(text, mix[::-1]) for text, mix in wanted])
    )
    assert checked(model).findings[2].verdict == FAIL


def test_rows_of_the_wrong_lora_fail(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = Bank.routed
    monkeypatch.setattr(
        Bank, "routed", lambda self, mixes, *args: routed(self, [mix[::-1] for mix in mixes], *args)
    )
    assert checked(model).findings[2].verdict == FAIL


def test_a_lora_of_no_effect_is_named(model: LoadedModel) -> None:
    report = checked(model, "a <lora:rose:0.8> <lora:dusk:0> <pool:x>")
    assert report.facts["LoRAs without effect"] == "dusk"
    assert verdicts(report)[:3] == [PASS, NOT_CHECKED, PASS]


def test_the_command(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    assert model.lora_dir is not None
    monkeypatch.chdir(tmp_path)
    typed = ["check", "a <lora:rose>", "--checkpoint", str(model.lora_dir / "model"), "--size", "64"]
    typed += ["--lora-dir", str(model.lora_dir), "--device", "cpu"]
    assert cli.main(typed) == 0
    assert "| One LoRA gives the same picture as merging into the weights | pass |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    routed = Bank.routed
    monkeypatch.setattr(
        Bank, "routed", lambda self, mixes, *args: routed(self, [*mixes[1:], mixes[0]], *args)
    )
    assert cli.main(typed) == 1
    assert "1 of 4 checks failed" in capsys.readouterr().out
    assert cli.main([*typed[:4], "--device", "cpu"]) == 2
    assert "there is no LoRA folder: give lora_dir (--lora-dir)" in capsys.readouterr().err
    assert cli.main(["check", "a fox"]) == 2
    assert "no <lora:name> in the prompt" in capsys.readouterr().err
