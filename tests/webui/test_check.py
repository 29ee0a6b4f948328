"""The self-check in a running WebUI."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from .client import PLAIN, SIZE, Refused, WebUI

WORDS = " and ".join(
    each.strip() for each in os.environ.get("LORATORIO_WEBUI_WORDS", "oktavo,boolio").split(",")[:2]
)


def check(webui: WebUI, *loras: str, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": WORDS + "".join(f" <lora:{name}:1>" for name in loras), "negative_prompt": "blurry"}
    asked |= {"width": SIZE, "height": SIZE, "cfg_scale": PLAIN["cfg_scale"], **fields}
    answer: dict[str, Any] = webui.call("/loratorio/check", asked)
    return answer


def results(answer: dict[str, Any]) -> list[str]:
    return [finding["verdict"] for finding in answer["findings"]]


MEASURED = ["measured"] * 3


def test_two_and_three_loras(webui: WebUI, loras: list[str], record_property: Any) -> None:
    prompt = f"{WORDS} <lora:{loras[0]}:1>"
    webui.txt2img(prompt=prompt)
    before = webui.txt2img(prompt=prompt)
    for names in (loras[:2], loras):
        answer = check(webui, *names)
        record_property(f"{len(names)} LoRAs", answer["text"])
        assert results(answer) == ["pass"] * 4 + MEASURED + ["pass"], answer["text"]
    after = webui.txt2img(prompt=prompt)
    assert np.array_equal(before.image, after.image)
    assert before.infotext == after.infotext


def test_one_lora_and_none(webui: WebUI, loras: list[str]) -> None:
    assert results(check(webui, loras[0])) == ["pass", "not checked", "pass", "pass", *MEASURED, "pass"]
    assert results(check(webui)) == ["not checked"] * 8
    missing = check(webui, loras[0], "no-such-lora")
    assert missing["facts"]["LoRAs without effect"] == "no-such-lora"
    assert results(missing)[0] == "pass"


def test_rows_of_another_lora_fail(webui: WebUI, loras: list[str], has_reference: bool) -> None:
    if not has_reference:
        pytest.skip("reference_extension/ is not installed")
    webui.call("slow-reference-shift-rows", {"on": True})
    try:
        broken = check(webui, *loras[:2])
    finally:
        webui.call("slow-reference-shift-rows", {"on": False})
    assert broken["findings"][2]["verdict"] == "FAIL", broken["text"]
    assert "failed" in broken["summary"]
    assert results(broken)[-1] == "pass"
    assert results(check(webui, *loras[:2]))[2] == "pass"


def test_interrupted(webui: WebUI, loras: list[str]) -> None:
    def interrupt() -> None:
        while not webui.call("progress")["state"]["job"]:
            time.sleep(0.05)
        time.sleep(1)
        webui.call("interrupt", {})

    user = threading.Thread(target=interrupt)
    user.start()
    answer = check(webui, *loras)
    user.join()
    assert "The check was stopped." in answer["text"]
    assert not webui.call("progress")["state"]["interrupted"]
    assert results(check(webui, *loras[:1]))[-1] == "pass"


def test_bad_values_are_a_sentence(webui: WebUI) -> None:
    with pytest.raises(Refused, match="width must be a number from 64 to 2048") as refused:
        check(webui, width="wide")
    assert refused.value.status == 422
