"""`loratorio-lab bench --webui URL`: a user's own LoRAs through a running WebUI, scored with CLIPScore.

The LoRAs are described as ComposLoRA's testbed does it, in a JSON file: ``{category: [{"id": name, "trigger": [words]}]}``
with a category ``character``; one more level of styles (``{"anime": {…}}``) is understood too.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import inspect
import io
import itertools
import json
import os
import statistics
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratorio.errors import LoratorioError
from loratorio.pictures.sheet import contact_sheet
from loratorio.settings import PRESETS

from .plan import CHARACTER, METHOD_ROWS, PRESET_ROWS, Variant, combinations, sample

QUICK_ROWS = tuple(row for row in PRESET_ROWS if row.name in ("merge", *PRESETS))
"""The WebUI's own merging, and the presets."""

SHEET_ROWS = 8
"""Combinations on a sheet of pictures."""

Score = Callable[[Any, str], float]
"""A PIL picture and a text to the CLIPScore, 100·cos, as in the papers."""


@dataclass(frozen=True)
class Task:
    """One picture to request."""

    variant: Variant
    loras: tuple[str, ...]
    prompt: str
    triggers: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.variant.name}.{'+'.join(self.loras)}.{self.seed}"


def bench_webui(options: argparse.Namespace) -> None:
    """Make and score the pictures that are not there yet; print the table, and write it and sheets of the pictures beside them.

    Raises:
        LoratorioError: no LoRA list, or one of LoRAs that the WebUI does not have; no answer from it; open_clip is not installed.
    """
    if options.loras is None:
        raise LoratorioError(
            "--webui needs --loras FILE: a JSON file of LoRAs and trigger words by category."
        )
    sampling(options)
    categories, triggers = read_loras(options.loras)
    rows = QUICK_ROWS if options.quick else METHOD_ROWS
    tasks = list(_tasks(options, rows, categories, triggers))
    if not tasks:
        raise LoratorioError(
            f"{options.loras} has no combination of {options.counts} LoRAs: each has one of {CHARACTER}, and at most one of "
            "every other category."
        )
    check_names(options.webui, triggers)
    folder = options.out / "webui"
    folder.mkdir(parents=True, exist_ok=True)
    score = _scorer()
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for task in tasks:
        if until is not None and time.monotonic() > until:
            break
        _do(task, options, folder, score)
    made = complete(tasks, folder)
    if not made:
        raise LoratorioError(
            f"In {options.minutes:g} minutes not one prompt was made by every method: give it more --minutes, or fewer --steps."
        )
    text = table(rows, made, folder)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text, *(f"\n{file}" for file in (folder / "table.md", *sheets(rows, made, folder))), sep="")


def read_loras(file: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """LoRA names by category, the character first, and each one's trigger words. Raises LoratorioError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if CHARACTER not in content and len(content) == 1:
            content = next(iter(content.values()))
        order = [CHARACTER, *(name for name in content if name != CHARACTER)]
        categories = {name: [str(each["id"]) for each in content[name]] for name in order}
        triggers = {
            str(each["id"]): ", ".join(each.get("trigger", [])) for own in content.values() for each in own
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as problem:
        raise LoratorioError(
            f'{file} is not a list of LoRAs as {{"character": [{{"id": "name", "trigger": ["word"]}}], …}}: {problem!r}.'
        ) from problem
    return categories, triggers


def _tasks(
    options: argparse.Namespace,
    rows: Sequence[Variant],
    categories: Mapping[str, Sequence[str]],
    triggers: Mapping[str, str],
) -> Iterator[Task]:
    """A prompt by every method, then the next, with each number of LoRAs in turn, so that results are comparable whenever time runs out."""
    counts = [int(each) for each in options.counts.split(",")]
    chosen = [sample(combinations(categories, count), options.combinations) for count in counts]
    for combo in (combo for each in itertools.zip_longest(*chosen) for combo in each if combo):
        words = ", ".join(triggers[name] for name in combo if triggers[name])
        tags = " ".join(f"<lora:{name}:1>" for name in combo)
        prompt = f"{options.base_prompt}{', ' if options.base_prompt else ''}{words} {tags}"
        for seed in range(options.seeds):
            for variant in rows:
                yield Task(variant, combo, prompt, words, seed)


def _do(task: Task, options: argparse.Namespace, folder: Path, score: Score) -> None:
    """One picture, unless it exists. The score is written last, so that a scored picture is complete."""
    from PIL import Image

    result = folder / f"{task.file_name}.json"
    if result.is_file():
        return
    since = time.perf_counter()
    body = {
        "prompt": task.prompt,
        "negative_prompt": options.negative,
        "seed": task.seed,
        **sampling(options),
        "alwayson_scripts": {"LoRAtorio": {"args": [{"enabled": True, **task.variant.knobs}]}},
    }
    answer = ask(options.webui, "txt2img", body)
    seconds = time.perf_counter() - since
    data = base64.b64decode(answer["images"][0].partition(",")[2] or answer["images"][0])
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    (folder / f"{task.file_name}.png").write_bytes(data)
    temporary = result.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(
        json.dumps({"score": score(picture, task.triggers), "seconds": seconds}), encoding="utf-8"
    )
    os.replace(temporary, result)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, under the API's names; the rest is the WebUI's own. Raises LoratorioError for a bad size."""
    asked = {"steps": options.steps, "cfg_scale": options.cfg, "sampler_name": options.sampler}
    if options.size is not None:
        sides = options.size.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise LoratorioError(f"--size must be WIDTHxHEIGHT, such as 512x768, not {options.size!r}.")
        asked |= {"width": int(sides[0]), "height": int(sides[1])}
    return {name: value for name, value in asked.items() if value is not None}


def check_names(url: str, names: Collection[str]) -> None:
    known = {each.get(key) for each in ask(url, "loras") for key in ("name", "alias")}
    lacking = [name for name in names if name not in known]
    if lacking:
        raise LoratorioError(
            f'The WebUI has no LoRA {", ".join(lacking)}: write each "id" as the name in a prompt\'s tag.'
        )


def ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{url.rstrip('/')}/sdapi/v1/{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as problem:
        raise LoratorioError(
            f"The WebUI refused the call {path} ({problem.code}): {problem.read().decode()[:500]}"
        ) from problem
    except (urllib.error.URLError, TimeoutError, ConnectionError) as problem:
        raise LoratorioError(
            f"No WebUI answers at {url} ({problem}): start it with --api, and check the address."
        ) from problem


def _scorer() -> Score:
    """CLIPScore by open_clip's ViT-B-32, or ``LORATORIO_SCORER=module:function``, which makes a scorer of your own."""
    own = os.environ.get("LORATORIO_SCORER")
    if own:
        module, _, name = own.partition(":")
        try:
            make = getattr(importlib.import_module(module), name)
            inspect.signature(make).bind()
        except (ImportError, AttributeError, TypeError, ValueError) as problem:
            raise LoratorioError(
                f"LORATORIO_SCORER={own} cannot be used ({problem}): write module:function, a function without arguments that returns the "
                "one that scores. A file in this folder also needs PYTHONPATH=."
            ) from problem
        made: Score = make()
        return made
    try:
        import open_clip
    except ImportError:
        raise LoratorioError("--webui scores with open_clip: pip install 'loratorio[lab]'.") from None
    import torch

    model, _, prepare = open_clip.create_model_and_transforms("ViT-B-32", pretrained="openai")
    words = open_clip.get_tokenizer("ViT-B-32")
    model.eval()

    def score(picture: Any, text: str) -> float:
        with torch.inference_mode():
            seen = model.encode_image(prepare(picture).unsqueeze(0))
            said = model.encode_text(words([text]))
        return 100 * float(torch.cosine_similarity(seen, said).clamp_min(0))

    return score


def complete(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """Those of combinations and seeds that every method has made."""
    there = [task for task in tasks if (folder / f"{task.file_name}.json").is_file()]
    methods = {task.variant.name for task in tasks}
    made = Counter((task.loras, task.seed) for task in there)
    return [task for task in there if made[task.loras, task.seed] == len(methods)]


def table(rows: Sequence[Variant], tasks: Sequence[Task], folder: Path) -> str:
    """Mean CLIPScore by method and N, and seconds per picture."""
    counts = sorted({len(task.loras) for task in tasks})
    lines = [
        f"| | {' | '.join(f'N={count}' for count in counts)} | mean | s |",
        f"| --- |{' ---: |' * (len(counts) + 2)}",
    ]
    for variant in rows:
        results = [
            (len(task.loras), json.loads((folder / f"{task.file_name}.json").read_text(encoding="utf-8")))
            for task in tasks
            if task.variant == variant
        ]
        by_count = [[each["score"] for n, each in results if n == count] for count in counts]
        cells = [f"{statistics.mean(scores):.2f}" for scores in by_count]
        whole = statistics.mean(each["score"] for _, each in results)
        seconds = statistics.mean(each["seconds"] for _, each in results)
        lines.append(f"| {variant.label} | {' | '.join(cells)} | {whole:.2f} | {seconds:.1f} |")
    return "\n".join(lines)


def sheets(rows: Sequence[Variant], tasks: Sequence[Task], folder: Path) -> Iterator[Path]:
    """Writes a sheet for each number of LoRAs: a column per method, a row per combination, all with the first seed."""
    from PIL import Image

    for count in sorted({len(task.loras) for task in tasks}):
        found: dict[tuple[str, ...], dict[str, Image.Image]] = {}
        for task in tasks:
            if (
                len(task.loras) == count
                and task.seed == 0
                and (task.loras in found or len(found) < SHEET_ROWS)
            ):
                picture = Image.open(folder / f"{task.file_name}.png").convert("RGB")
                found.setdefault(task.loras, {})[task.variant.name] = picture
        if found:
            file = folder / f"sheet-{count}.png"
            contact_sheet(
                [[made.get(row.name) for row in rows] for made in found.values()],
                [row.label for row in rows],
                [" + ".join(loras) for loras in found],
            ).save(file)
            yield file
