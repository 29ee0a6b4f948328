"""Random API calls, in every way to make pictures, beside scripts and other extensions: never a 5xx of ours, never a 422 that another
setting does not explain, never a ticked picture that says nothing, never another unticked picture afterwards, no memory that is not
given back.

LORATORIO_WEBUI_FUZZ    how many calls; 40 by default
LORATORIO_WEBUI_SEED    of the random numbers; 0 by default
LORATORIO_WEBUI_PID     the WebUI's process, where it runs on this machine under Linux: its memory is measured more exactly
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loratorio.prompt.places import NAMED
from loratorio.settings import KNOBS, PRESETS

from .client import PLAIN, SIZE, Refused, WebUI
from .scenarios import INIT, ONCE, Scenario
from .test_guidance import GUIDES
from .test_neighbours import WAYS
from .test_scenarios import upscaled

CALLS = int(os.environ.get("LORATORIO_WEBUI_FUZZ", "40"))
CHECK_EVERY = 20


class Some(NamedTuple):
    """What a call may say of one thing: what is right, and what is wrong with a sentence or without effect with a note."""

    good: list[Any]
    bad: list[Any]

    def of(self, some: random.Random, is_bad: bool) -> Any:
        return some.choice(self.bad if is_bad and some.random() < 0.25 else self.good)


ODD: list[Any] = [None, "", "warm", -1, 1e9, 10**18, [], {}, True, "NaN", "hard", 0.5]
STRENGTHS = Some(
    ["1", "1", "0.8", "0.8", "0.5:1", "0:1", "-0.7", "2", "0", "te=0.3:unet=1", ""],
    ["abc", "1e30", "1_0", "nan", "1:1:1:1", "0,8", "1.0:5-15"],
)
ROLES = Some(["role=content", "role=style", "role=always"], ["role=", "role=STYLE ", "role=stile"])
PLACES = Some(
    ["at=left", "at=0,0,0.5,1~0.1", "at=0,0,0.5,1", "at=left+right~0.2", *(f"at={name}" for name in NAMED)],
    ["at=nowhere", "at=2,2,3,3", "at=", "at=0,0,0,0"],
)
OTHERS = Some(
    ["words=a hat", "words=(a hat:1.2)", "words=a [red|blue] hat", "words="],
    ["pool=1", "rolle=style", "start=2", "stop=3", "lbw=XYZ", "a=b=c", "x", "words=a hat:1.2"],
)
POOLS = Some(
    ["*", "*:0.5", "{0}*", "*:0.5:role=style", "**/*", "?{1}"], ["none", "../x", "/etc/*", "", ",", "["]
)
SAMPLERS = ["Euler", "Euler a", "DDIM", "DPM++ 2M", "Heun", "DPM++ 2M SDE", "LCM", "UniPC"]


def tag(some: random.Random, loras: list[str], is_bad: bool, has_places: bool = False) -> str:
    kind = Some(["lora"] * 8 + ["lyco", "pool"], ["Lora", "Pool"]).of(some, is_bad)
    if kind.lower() == "pool":
        return f"<{kind}:{POOLS.of(some, is_bad).format(loras[0], loras[0][1:])}>"
    name = Some(loras, ["no such lora", "../x", "<b>", "__proto__", "a,b", "ä", ""]).of(some, is_bad)
    parts = [name, STRENGTHS.of(some, is_bad)]
    for options, often in (
        (ROLES, 0.3),
        (PLACES, 0.6 * has_places),
        (OTHERS, 0.4 * has_places or 0.1 * is_bad),
    ):
        if some.random() < often:
            parts.append(options.of(some, is_bad))
    return f"<{kind}:{':'.join(part for part in parts if part)}>"


def knobs(some: random.Random, is_bad: bool) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for knob in some.sample(KNOBS, some.randint(0, 6)):
        if is_bad and some.random() < 0.1:
            chosen[knob.name] = some.choice(ODD)
        elif knob.kind == "bool":
            chosen[knob.name] = some.random() < 0.5
        elif knob.kind == "choice":
            chosen[knob.name] = some.choice(knob.choices)[some.randint(0, 1)]
        elif knob.kind == "int":
            chosen[knob.name] = some.choice(
                [
                    int(knob.minimum),
                    int(knob.default),
                    some.randint(int(knob.minimum), min(int(knob.maximum), 12)),
                ]
            )
        else:
            chosen[knob.name] = some.choice(
                [knob.minimum, knob.default, knob.maximum, some.uniform(knob.minimum, knob.maximum)]
            )
    if some.random() < 0.15:
        chosen["preset"] = Some([*PRESETS], ["slow"]).of(some, is_bad)
    if is_bad and some.random() < 0.05:
        chosen["tmperature"] = 1
    chosen["enabled"] = some.random() < 0.93
    return chosen


def plots(*axes: tuple[str, str]) -> list[dict[str, Any]]:
    """X/Y/Z plots of these axes, each alone and with another one."""
    also: tuple[dict[str, str], ...] = (
        {},
        {"Y type": "Seed", "Y values": "1, 2"},
        {"Y type": "[LoRAtorio] Enable", "Y values": "true, false"},
    )
    fixed = {"Use text inputs instead of dropdowns": True, "Include Sub Images": True}
    return [{"X type": axis, "X values": values, **fixed, **more} for axis, values in axes for more in also]


SCRIPTS = {
    "prompt matrix": Some([{}, {"Use different seed for each picture": True}], [{}]),
    "prompts from file or textbox": Some(
        [{"List of prompt inputs": "a hill\nsky <lora:{0}:0.5>"}, {"List of prompt inputs": "--steps 2"}],
        [{"List of prompt inputs": "a hill\nsky <lora:{0}:0,5>"}],
    ),
    "x/y/z plot": Some(
        plots(
            ("[LoRAtorio] Preset", "fast, paper"),
            ("[LoRAtorio] Enable", "true, false"),
            ("[LoRAtorio] Method", "merge, composite"),
            ("[LoRAtorio] Top-k", "1-2"),
            ("CFG Scale", "1, 4"),
            ("Prompt S/R", "red, blue"),
        ),
        plots(
            ("[LoRAtorio] Preset", "fast, slow"),
            ("[LoRAtorio] Re-centring", "0, 2"),
            ("[LoRAtorio] Method", ""),
        ),
    ),
    "loopback": Some([{"Loops": 2}], [{}]),
    "sd upscale": Some([{"Tile overlap": 16}], [{}]),
    "poor man's outpainting": Some([{"Pixels to expand": 32, "Outpainting direction": ["left"]}], [{}]),
    "outpainting mk2": Some([{"Pixels to expand": 64, "Outpainting direction": ["up"]}], [{}]),
}
"""By name, what is asked of each of the WebUIs' scripts; {0} is a LoRA."""

NEIGHBOURS = [
    *((way.script, way.args, way.options) for way in WAYS.values()),
    *((guide.script, guide.args, guide.settings) for guide in GUIDES.values()),
]
"""Other extensions: a script's name and arguments, or options of the WebUI."""

IN_CONTRADICTION = {
    r"^start \(.*\) is after end": '"start"',
    r"[Pp]lace": "at=",
    r"own words": "words=",
}
WRONG = {
    r"There is no knob '(\w+)'": "{}",
    r"^(\w+) must be": '"{}"',
    r"^X/Y/Z plot, \[LoRAtorio\] ([\w-]+)": "x/y/z plot",
    r"[Pp]ool": "<pool:",
    r"role": "role=",
    r"^The strength of LoRA .* must be a number": "<l",
    r"^The tag <(\w+):": "<{}:",
    r"^The WebUI does not read the tag <(\w+):": "<{}:",
}
"""By what a refusal says, what must stand in the call for it; of settings that are right each, and wrong together, or of a wrong one."""


def explained(sentence: str, request: str, is_bad: bool) -> bool:
    """Whether a refusal is of something in the request."""
    patterns = {**IN_CONTRADICTION, **WRONG} if is_bad else IN_CONTRADICTION
    return any(
        found and word.format(*found.groups()).lower() in request.lower()
        for pattern, word in patterns.items()
        if (found := re.search(pattern, sentence))
    )


@dataclass
class Call:
    """A call of the API.

    Attributes:
        kind: txt2img or img2img. is_bad: whether it may have something wrong in it. knobs: LoRAtorio's. fields: the others.
    """

    kind: str
    is_bad: bool
    knobs: dict[str, Any]
    fields: dict[str, Any]


class Caller:
    """Makes calls of what a WebUI has."""

    def __init__(
        self, webui: WebUI, loras: Sequence[str], extra: dict[str, Any], some: random.Random
    ) -> None:
        self.webui, self.loras, self.some = webui, list(loras), some
        self.options: dict[str, Any] = webui.call("options")
        self.samplers = [
            name for name in SAMPLERS if name in {each["name"] for each in webui.call("samplers")}
        ]
        self.scripts = {
            (each["name"], bool(each["is_img2img"])): each["args"] for each in webui.call("script-info")
        }
        self.refiner = extra.get("refiner", ("",))[0]
        self.ways = [way for way in ONCE if self._has(way)]
        self.neighbours = [
            (script, list(args), options)
            for script, args, options in NEIGHBOURS
            if options.keys() <= self.options.keys() and (not script or (script, False) in self.scripts)
        ]

    def _has(self, way: Scenario) -> bool:
        checkpoint = way.checkpoint in ("", "refiner") and (not way.checkpoint or bool(self.refiner))
        return checkpoint and way.options.keys() <= self.options.keys()

    def __call__(self) -> Call:
        some = self.some
        is_bad = some.random() < 0.35
        way = some.choice(self.ways)
        kind = way.kind if "enable_hr" in way.fields or some.random() < 0.6 else "img2img"
        start = INIT if kind == "img2img" and "init_images" not in way.fields else {}
        fields: dict[str, Any] = {
            **start,
            "prompt": self._prompt(way.text, is_bad),
            "negative_prompt": some.choice(["", "blurry", f"<lora:{self.loras[0]}:1>", "bad " * 90]),
            "steps": some.choice([1, 2, 2, 3, 3, 4, 4, 12]),
            "cfg_scale": some.choice([1.0, 4.0, 4.0, 7.5]),
            "sampler_name": some.choice(self.samplers),
            "width": some.choice([SIZE, SIZE, SIZE, SIZE + 8, 2 * SIZE]),
            "batch_size": some.choice([1, 1, 1, 2]),
            "n_iter": some.choice([1, 1, 1, 2, 2, 3]),
            **upscaled(self.webui, way.fields),
        }
        if kind == "img2img":
            fields["denoising_strength"] = some.choice([0.0, 0.05, 0.7, 0.7, 0.7, 1.0])
        elif "enable_hr" in fields and (way.second_pass or some.random() < 0.3):
            fields["hr_prompt"] = f"a hill {tag(some, self.loras, is_bad)}"
        if way.checkpoint:
            fields["refiner_checkpoint"] = self.refiner
        options = dict(way.options)
        for _ in range(some.choice([0, 0, 1, 1, 2])):
            script, args, settings = some.choice(self.neighbours)
            options |= settings
            if (script, kind == "img2img") in self.scripts:
                fields.setdefault("scripts", {})[script] = args
        fields["override_settings"] = options
        if some.random() < 0.25:
            self._choose_script(fields, kind == "img2img", is_bad)
        return Call(kind, is_bad, knobs(some, is_bad), fields)

    def _prompt(self, text: str, is_bad: bool) -> str:
        some, loras = self.some, self.loras
        parts = [
            text,
            *some.sample(["(night:1.2)", "[a:b:0.5]", "AND a hill :0.6", "BREAK tree", "a|b", "(cat", ""], 2),
        ]
        has_places = some.random() < 0.3  # which many methods, and part of the steps, refuse
        parts += [tag(some, loras, is_bad, has_places) for _ in range(some.choice([0, 1, 2, 2, 3, 3, 4]))]
        if some.random() < 0.15:
            parts += some.choice([[parts[-1]], [f"<lora:{loras[0]}:0.5>"] * 2])
        if is_bad and some.random() < 0.2:
            parts.append(some.choice([f"<lora:{loras[1]}", f"<lora {loras[0]}>", "# not read"]))
        some.shuffle(parts)
        return " ".join(parts)

    def _choose_script(self, fields: dict[str, Any], is_img2img: bool, is_bad: bool) -> None:
        """One of the WebUI's own scripts, its arguments by what the WebUI says of them. Few steps: it makes several pictures."""
        name = self.some.choice([name for name in SCRIPTS if (name, is_img2img) in self.scripts])
        # Forge Neo writes labels with other capitals.
        asked = {label.lower(): value for label, value in SCRIPTS[name].of(self.some, is_bad).items()}
        args = []
        for arg in self.scripts[name, is_img2img]:
            value = asked.pop(arg["label"].lower(), arg["value"]) if arg["label"] else arg["value"]
            if arg["label"].endswith(" type") or arg["label"] == "Upscaler":  # by number
                value = arg["choices"].index(value)
            args.append(value.format(*self.loras) if isinstance(value, str) else value)
        fields |= {"script_name": name, "script_args": args, "steps": min(fields["steps"], 3), "n_iter": 1}

    def ask(self, call: Call, ticked: bool = True) -> tuple[str, str]:
        """What came of it, composed, not composed, silent or a status, and the answer's sentence."""
        try:
            made = getattr(self.webui, call.kind)([call.knobs] if ticked else None, **call.fields)
        except Refused as refused:
            return str(refused.status), refused.answer
        finally:
            self.webui.call(
                "options", {name: self.options[name] for name in call.fields["override_settings"]}
            )
        texts = [
            text for text in made.infotexts if text and ", Script: " not in text
        ]  # a plot's grid has neither LoRAs nor notes
        for text in texts:
            if "LoRAtorio: True" in text and "LoRAtorio LoRAs" not in text and "LoRAtorio note" not in text:
                return "silent", text
        return ("composed" if "LoRAtorio LoRAs" in "".join(texts) else "not composed"), ""

    def faults(self, call: Call, answer: str, said: str) -> Iterator[str]:
        """What is wrong with the answer."""
        if answer == "silent":
            yield f"a ticked picture without LoRAs and without a note: {said}"
        if answer.startswith("5") and not self.ask(call, ticked=False)[0].startswith("5"):
            # Otherwise it is the WebUI's own trouble, which it has without us too.
            yield f"{answer}: {said}"
        if answer.startswith("4"):
            sentence = json.loads(said).get("detail")
            request = json.dumps([call.knobs, call.fields], ensure_ascii=False)
            if (
                answer != "422"
                or not isinstance(sentence, str)
                or not explained(sentence, request, call.is_bad)
            ):
                yield f"{answer}, unexplained: {said}"


def used_memory(webui: WebUI) -> float:
    """The WebUI's memory in bytes: without pages of files, which come and go with other programs', where its process is named."""
    process = os.environ.get("LORATORIO_WEBUI_PID")
    if not process:
        return float(webui.call("memory")["ram"]["used"])
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * float(status["RssAnon"].split()[0])


def without_pictures(call: Call) -> dict[str, Any]:
    """The call to be read in a report."""
    fields = {name: "…" if name in ("init_images", "mask") else value for name, value in call.fields.items()}
    return {"kind": call.kind, "is_bad": call.is_bad, "knobs": call.knobs, **fields}


@pytest.mark.timeout(0)
def test_random_calls(webui: WebUI, loras: list[str], extra: dict[str, Any], record_property: Any) -> None:
    seed = int(os.environ.get("LORATORIO_WEBUI_SEED", "0"))
    caller = Caller(webui, loras, extra, random.Random(seed))
    plain = {
        **PLAIN,
        "prompt": f"a red circle <lora:{loras[0]}:1> <lora:{loras[1]}:0.8>",
        "sampler_name": "Euler",
    }

    def unticked() -> list[bytes]:
        webui.img2img(**plain, **INIT)  # its first picture after another's differs from its next
        return [webui.txt2img(**plain).image.tobytes(), webui.img2img(**plain, **INIT).image.tobytes()]

    before = unticked()
    answers: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    memory: list[float] = []
    faults: list[str] = []
    for number in range(CALLS):
        call = caller()
        answer, said = caller.ask(call)
        answers[answer] += 1
        if answer == "422":
            sentences[re.sub(r"[\d.]+|'[^']*'", "…", said)[:110]] += 1
        found = [*caller.faults(call, answer, said)]
        answers["of the 5xx the WebUI's own"] += answer.startswith("5") and not found
        if number % CHECK_EVERY == CHECK_EVERY - 1:
            if unticked() != before:
                found.append("the unticked picture is another")
                before = unticked()
            memory.append(used_memory(webui))
            print(f"{number + 1}: {dict(answers)}, {memory[-1] / 2**20:.0f} MiB", flush=True)
        for fault in found:
            print(f"FAULT in call {number}: {fault}\n  {without_pictures(call)}", flush=True)
        faults += found
    # Once all sizes and methods have been there, the same calls again need no more memory.
    again = Caller(webui, loras, extra, random.Random(seed))
    calls = [again() for _ in range(min(CALLS, 60))]
    grown = [used_memory(webui)]
    for _ in range(2):
        for call in calls:
            again.ask(call)
        grown.append(used_memory(webui))
    shown = [round(each / 2**20) for each in (*memory, *grown)]
    record_property("answers", dict(answers))
    print(f"\n{CALLS} calls: {dict(answers)}; memory in MiB {shown}")
    print("\n".join(f"{count:4d}  {sentence}" for sentence, count in sentences.most_common()))
    assert not faults
    assert answers["composed"] > CALLS / 10
    assert grown[2] <= grown[1] * 1.01, shown
