"""Random API calls: never a 5xx of ours, never another unticked picture afterwards, no memory that is not given back.

LORATORIO_WEBUI_FUZZ    how many calls; 40 by default
LORATORIO_WEBUI_SEED    of the random numbers; 0 by default
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

from loratorio.prompt.places import NAMED
from loratorio.settings import KNOBS, PRESETS

from .client import PLAIN, Refused, WebUI

CALLS = int(os.environ.get("LORATORIO_WEBUI_FUZZ", "40"))
CHECK_EVERY = 20
ODD: list[Any] = [None, "", "warm", -1, 1e9, 10**400, [], {}, True, "NaN", "hard", 0.5]
STRENGTHS = [
    *["1", "0.8", "0.5:1"] * 4,
    "1",
    "0.8",
    "0",
    "-0.7",
    "2",
    "0.5:1",
    "0:1",
    "te=0.3:unet=1",
    "",
    "abc",
    "1e30",
    "1_0",
    "nan",
    "1:1:1:1",
]
ROLES = [
    *["role=content", "role=style", "role=always"] * 4,
    "role=content",
    "role=style",
    "role=always",
    "role=",
    "role=STYLE ",
    "role=stile",
]
PLACES = [
    *["at=left", "at=0,0,0.5,1~0.1"] * 4,
    *(f"at={name}" for name in NAMED),
    "at=0,0,0.5,1",
    "at=left+right~0.2",
    "at=nowhere",
    "at=2,2,3,3",
    "at=",
    "at=0,0,0,0",
]
OTHERS = ["words=a hat", "words=", "pool=1", "rolle=style", "start=2", "stop=3", "lbw=XYZ", "a=b=c", "x"]
POOLS = [
    "*",
    "*:0.5",
    "c*",
    "none",
    "../x",
    "/etc/*",
    "",
    ",",
    "*:0.5:role=style",
    "cat,night",
    "**/*",
    "[",
    "?at",
]
SAMPLERS = ["Euler", "Euler a", "DDIM", "DPM++ 2M", "Heun", "DPM++ 2M SDE", "LCM", "UniPC"]


def tag(some: random.Random, loras: list[str]) -> str:
    kind = some.choice(["lora"] * 20 + ["lyco", "Lora", "pool", "pool", "Pool"])
    if kind.lower() == "pool":
        return f"<{kind}:{some.choice(POOLS)}>"
    name = some.choice([*loras * 8, "no such lora", "../x", "<b>", "__proto__", "a,b", "ä"])
    parts = [name, some.choice(STRENGTHS)]
    for options, often in ((ROLES, 0.3), (PLACES, 0.3), (OTHERS, 0.2)):
        if some.random() < often:
            parts.append(some.choice(options))
    return f"<{kind}:{':'.join(part for part in parts if part)}>"


def knobs(some: random.Random) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for knob in some.sample(KNOBS, some.randint(0, 6)):
        if some.random() < 0.02:
            chosen[knob.name] = some.choice(ODD)
        elif knob.kind == "bool":
            chosen[knob.name] = some.random() < 0.5
        elif knob.kind == "choice":
            chosen[knob.name] = some.choice(knob.choices)[some.randint(0, 1)]
        elif knob.kind == "int":
            chosen[knob.name] = some.choice(
                [int(knob.minimum), int(knob.default), some.randint(int(knob.minimum), 12)]
            )
        else:
            chosen[knob.name] = some.choice(
                [knob.minimum, knob.default, knob.maximum, some.uniform(knob.minimum, knob.maximum)]
            )
    if some.random() < 0.15:
        chosen["preset"] = some.choice([*PRESETS] if some.random() < 0.9 else ["slow"])
    if some.random() < 0.01:
        chosen["tmperature"] = 1
    chosen["enabled"] = some.random() < 0.93
    return chosen


def call(some: random.Random, loras: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The knobs, and the fields of the request."""
    words = some.sample(
        [
            "a red circle",
            "sky",
            "(night:1.2)",
            "[a:b:0.5]",
            "AND a hill :0.6",
            "BREAK tree",
            "# not read",
            "",
        ],
        2,
    )
    tags = [tag(some, loras) for _ in range(some.choice([0, 1, 2, 2, 3, 3, 4]))]
    parts = [*words, *tags]
    some.shuffle(parts)
    fields: dict[str, Any] = {
        "prompt": " ".join(parts),
        "negative_prompt": some.choice(["", "blurry", "<lora:cat:1>", "bad " * 90]),
        "steps": some.choice([1, 2, 4, 4, 6, 12]),
        "cfg_scale": some.choice([1.0, 4.0, 4.0, 7.5]),
        "sampler_name": some.choice(SAMPLERS),
        "width": some.choice([64, 64, 72, 96]),
        "batch_size": some.choice([1, 1, 1, 2]),
        "n_iter": some.choice([1, 1, 2]),
    }
    if some.random() < 0.12:
        fields |= {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
        if some.random() < 0.5:
            fields["hr_prompt"] = f"a hill {tag(some, loras)}"
    return knobs(some), fields


def asked(webui: WebUI, ours: Any, fields: dict[str, Any]) -> str:
    """What came of it: composed, or not, or the status of a refusal."""
    try:
        made = webui.txt2img(ours, **fields)
    except Refused as refused:
        return str(refused.status)
    return "composed" if "LoRAtorio LoRAs" in "".join(made.infotexts) else "not composed"


def used_memory(webui: WebUI) -> float:
    return float(webui.call("memory")["ram"]["used"])


def test_random_calls(webui: WebUI, loras: list[str], record_property: Any) -> None:
    seed = int(os.environ.get("LORATORIO_WEBUI_SEED", "0"))
    some = random.Random(seed)
    plain = {
        **PLAIN,
        "prompt": f"a red circle <lora:{loras[0]}:1> <lora:{loras[1]}:0.8>",
        "sampler_name": "Euler",
    }
    before = webui.txt2img(**plain)
    answers: Counter[str] = Counter()
    memory: list[float] = []
    for number in range(CALLS):
        chosen, fields = call(some, loras)
        answer = asked(webui, [chosen], fields)
        answers[answer] += 1
        if answer.startswith("5"):
            # The WebUI's own trouble, which it has without us too.
            assert asked(webui, None, fields).startswith("5"), (answer, chosen, fields)
            answers["of these the WebUI's own"] += 1
        if number % CHECK_EVERY == CHECK_EVERY - 1:
            assert (webui.txt2img(**plain).image == before.image).all(), (number, chosen, fields)
            memory.append(used_memory(webui))
    # Once all sizes and methods have been there, the same calls again need no more memory.
    again = random.Random(seed)
    calls = [call(again, loras) for _ in range(min(CALLS, 60))]
    grown = [used_memory(webui)]
    for _ in range(2):
        for chosen, fields in calls:
            asked(webui, [chosen], fields)
        grown.append(used_memory(webui))
    shown = [round(each / 2**20) for each in (*memory, *grown)]
    record_property("answers", dict(answers))
    print(f"\n{CALLS} calls: {dict(answers)}; memory in MiB {shown}")
    assert answers["composed"] > CALLS / 10
    assert grown[2] <= grown[1] * 1.01, shown
