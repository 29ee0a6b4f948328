"""The command line: ``loratorio demo``, ``loratorio generate``, ``loratorio compare``, ``loratorio check``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..compose.methods import METHODS
from ..compose.methods.reuse import SHORT
from ..errors import LoratorioError
from ..prompt.places import AUTO
from ..prompt.places import OPTION as PLACE
from ..settings import GROUPS, KNOB_BY_NAME, KNOBS, PRESET, PRESETS, Knob, Settings, find_preset
from . import example
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from .model import ModelFiles
    from .prompt import PromptLora
    from .request import Request

_NOT_OPTIONS = ("enabled",)
"""Knobs that make no sense here: who types the command wants it on."""

_SETTINGS = Settings(enabled=True, naming="option")

_PRESET_KNOBS = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset.values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0: done; 1: the self-check found a failure; 2: wrong input, explained by a sentence on stderr; 130: stopped
    by Ctrl-C."""
    # The libraries' hints are for programmers, not for users of a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that cannot be printed must not be an error after the picture is made.
            stream.reconfigure(errors="replace")
    try:
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except LoratorioError as problem:
        _say([str(problem)])
        return 2
    except ModuleNotFoundError as problem:
        if (problem.name or "").startswith("loratorio"):
            raise
        _say([f"{problem.name} is not installed. In LoRAtorio's folder: pip install '.[standalone]'"])
        return 2
    except KeyboardInterrupt:
        print(
            "\nloratorio: stopped. Files that are already written are complete.",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loratorio", description="Compose several LoRAs in one picture instead of merging them."
    )
    parser.add_argument("--version", action="version", version=f"loratorio {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, about: str, *examples: str
    ) -> Any:
        lines = "\n".join(f"  loratorio {name} {each}".rstrip() for each in examples)
        made = commands.add_parser(
            name,
            help=help,
            description=about,
            epilog=f"examples, with the toybox:\n{lines}",
            formatter_class=_Formatter,
        )
        made.set_defaults(command=run)
        return made

    demo = command(
        "demo", _demo, "compose three of the toybox's LoRAs with every method", _DEMO_HELP, "", "--serve"
    )
    demo.add_argument("--out", type=Path, help=f"folder for the pictures (default: {_DEMO_OUT})")
    demo.add_argument("--seed", help="seed of all pictures (default: 0)")
    demo.add_argument("--steps", help="sampling steps (default: 12, and 20 for the two characters)")
    demo.add_argument(
        "--serve", action="store_true", help="serve a web page to play with, instead of writing pictures"
    )
    demo.add_argument("--port", help=f"port of the page (default: {_PORT})")
    _add_model_options(demo)

    about = "Makes pictures from a prompt, with its LoRAs composed, and prints their file names. Existing files are never overwritten."
    generate = command(
        "generate",
        _generate,
        "make pictures from a prompt with <lora:name:strength> tags",
        about,
        f'"{example.prompt()}" --weight-maps',
        f'"{example.pair_prompt("auto")}" --size 192x128',
    )
    _add_picture_options(generate)
    _add_knobs(generate)

    about = "Makes the same pictures with several values of one knob, side by side in one file."
    compare = command(
        "compare",
        _compare,
        "compare methods, or the values of any knob, in a grid",
        about,
        f'"{example.prompt()}" --by preset',
        f'"{example.prompt()}" --by patch-size --values 1,2,4 --batch 2',
    )
    compare.add_argument(
        "--by",
        default="method",
        metavar="KNOB",
        help="the knob that differs between columns (default: method)",
    )
    compare.add_argument(
        "--values",
        help="its values, separated by commas (default: all, if it is a choice such as the method)",
    )
    _add_picture_options(compare)
    _add_knobs(compare)

    check = command(
        "check",
        _check,
        "check that composing agrees with merging on your checkpoint and LoRAs",
        _CHECK_HELP,
        "",
    )
    check.add_argument(
        "prompt", nargs="?", help="a prompt with one <lora:name> or more (default: one for the toybox)"
    )
    _add_model_options(check)
    check.add_argument("--negative", default="", help="negative prompt")
    check.add_argument("--cfg", help="guidance scale (default: the model's own)")
    check.add_argument("--size", help="in pixels, 512 or 512x768 (default: the model's own)")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples stay lines; descriptions are wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = argparse.HelpFormatter._fill_text
        return text if text.startswith("examples") else wrap(self, text, width, indent)


_DEMO_OUT, _PORT = Path("loratorio-demo"), 7861

_DEMO_HELP = (
    "Composes three LoRAs of different categories with every method and the same seed. Then two characters next to each other, "
    "merged and each in its place. Writes the pictures, weight maps over the picture and over time, and a contact sheet of each. "
    "Needs no download and no GPU."
)


_CHECK_HELP = (
    "Makes about a dozen pictures of one to four steps, composed and with the LoRAs merged into the weights. Prints a table of how well "
    "they agree, which you can copy into a bug report. Writes no file. The exit code is 1 if a check failed."
)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="a .safetensors file or a diffusers folder (default: the toybox, which is included)",
    )
    group.add_argument(
        "--config",
        type=Path,
        help="for a file: a folder with the configuration of a diffusers model, or the model's .yaml (default: a folder or .yaml with "
        "the file's name next to it, else from the hub)",
    )
    group.add_argument(
        "--lora-dir", type=Path, help="folder of LoRA files (default: for the toybox, its own)"
    )
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, or auto: the fastest available (default: auto)",
    )
    group.add_argument(
        "--dtype", default="auto", help="fp32, fp16, bf16, or auto: fp16 on CUDA, else fp32 (default: auto)"
    )


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text with <lora:name:strength> tags, as in the examples")
    _add_model_options(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--negative", default="", help="negative prompt (default: none)")
    group.add_argument("--steps", help="sampling steps (default: 20)")
    group.add_argument("--cfg", help="guidance scale; 1: no guidance (default: 7, for the toybox 3)")
    group.add_argument("--sampler", default="euler", help=f"{', '.join(SAMPLERS)} (default: euler)")
    group.add_argument("--seed", help="seed of the first picture; each further one has the next (default: 0)")
    group.add_argument("--size", help="in pixels, 512 or 512x768 (default: the model's own)")
    group.add_argument("--batch", help="number of pictures (default: 1)")
    group.add_argument("--init-image", type=Path, help="picture to start from, for img2img (default: none)")
    group.add_argument("--strength", help="how much to change the initial picture, 0 to 1 (default: 0.75)")
    group.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the pictures, or a .png file (default: out)"
    )


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    """An option for every knob. Values stay text here: the knob itself checks them."""
    groups = {
        name: parser.add_argument_group(heading[0].lower() + heading[1:]) for name, heading in GROUPS.items()
    }
    about = " ".join(f"{preset.name}: {preset.help}" for preset in PRESETS.values())
    groups["method"].add_argument(
        f"--{PRESET}",
        metavar="VALUE",
        help=f"{about} Sets {', '.join(KNOB_BY_NAME[name].option for name in _PRESET_KNOBS)}; options that you give as well override it "
        "(default: balanced).",
    )
    for knob in KNOBS:
        if knob.name in _NOT_OPTIONS:
            continue
        extra: dict[str, Any] = {"metavar": "VALUE"}
        if knob.kind == "bool":
            extra = {"action": argparse.BooleanOptionalAction}
        groups[knob.group].add_argument(
            knob.option, help=f"{knob.help} {_range(knob)}".replace("%", "%%"), **extra
        )


def _range(knob: Knob) -> str:
    if knob.kind == "choice":
        return f"One of {', '.join(name for name, _ in knob.choices)} (default: {knob.default})."
    if knob.kind == "bool":
        return f"(default: {'on' if knob.default else 'off'})"
    return f"{knob.minimum:g} to {knob.maximum:g} (default: {knob.default})."


def _settings(options: argparse.Namespace) -> Settings:
    return _SETTINGS.with_values({PRESET: options.preset, **_given(options)})


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The knobs that the command line names."""
    named = {knob.name: getattr(options, knob.name, None) for knob in KNOBS}
    return {name: value for name, value in named.items() if value is not None}


def _request(options: argparse.Namespace, settings: Settings) -> Request:
    """What was typed, checked as far as that goes without the model. Imports no torch."""
    from .request import Request, check

    numbers = {"steps": int, "cfg": float, "seed": int, "batch": int, "strength": float}
    typed = {name: getattr(options, name) for name in numbers}
    given = {name: _number(name, text, numbers[name]) for name, text in typed.items() if text is not None}
    if options.size is not None:
        given["width"], given["height"] = _size(options.size)
    image = None if options.init_image is None else _open_image(options.init_image)
    request = Request(
        options.prompt, options.negative, settings, sampler=options.sampler, init_image=image, **given
    )
    check(request)
    return request


def _model_files(options: argparse.Namespace) -> ModelFiles:
    from .model import ModelFiles

    return ModelFiles.of(options.checkpoint, options.lora_dir, options.config, options.device, options.dtype)


def _tags(request: Request, files: ModelFiles, variants: Iterable[Settings]) -> list[PromptLora]:
    """The tags of the prompt. Raises LoratorioError for a LoRA, role or place that does not exist or work with these settings."""
    from ..prompt.roles import participants_of
    from .lora_lookup import look_up
    from .prompt import split_loras

    _, tags = split_loras(request.prompt)
    found, _ = look_up(tags, files.lora_dir)
    participants = participants_of([lora.tagged for lora in found])
    if participants.has_places or any(lora.words for lora in participants.loras):
        from ..sampling.engine import check_places  # imports torch

        for variant in variants:
            check_places(variant, participants)
    return tags


def _number(name: str, text: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise LoratorioError(f"--{name} must be {what}, not {text!r}.") from None


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise LoratorioError(f"--size must be like 512 or 512x768, not {text!r}.")
    return int(sides[0]), int(sides[-1])


def _open_image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise LoratorioError(f"There is no picture {path}: check --init-image.") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as problem:
        raise LoratorioError(
            f"{path} cannot be read as a picture ({problem}): give a PNG or JPEG."
        ) from problem


def _generate(options: argparse.Namespace) -> None:
    from .output import check_writable, is_picture, write_beside, write_numbered

    settings = _settings(options)
    request = _request(options, settings)
    files = _model_files(options)
    tags = _tags(request, files, [settings])
    check_writable(options.out)
    _say(_without_effect(options, request, tags, [settings]))
    model = files.load()
    outcome = model.run(request)
    _say(outcome.notes)
    if not tags:
        _say(["there is no <lora:name> in the prompt, so nothing was composed."])

    from .describe import describe
    from .model import map_files
    from .output import png

    def made(paths: Sequence[Path]) -> dict[Path, bytes]:
        pictures: dict[Path, bytes] = {}
        for i, (path, image) in enumerate(zip(paths, outcome.images, strict=True)):
            pictures[path] = png(image, describe(model.checkpoint, outcome, i))
            pictures |= map_files(outcome, i, path.with_name(f"{path.stem}-map-.png"))
        return pictures

    def of_name(out: Path) -> dict[Path, bytes]:
        several = len(outcome.seeds) > 1
        return made([out.with_stem(f"{out.stem}-{seed}") if several else out for seed in outcome.seeds])

    def of_number(first: int) -> dict[Path, bytes]:
        return made([options.out / f"{first + i:05}-{seed}.png" for i, seed in enumerate(outcome.seeds)])

    written = (
        write_beside(options.out, of_name)
        if is_picture(options.out)
        else write_numbered(options.out, of_number)
    )
    for path in written:
        print(path)


def _say(notes: Iterable[str]) -> None:
    """Print notes to stderr, apart from the list of files on stdout."""
    for note in notes:
        print(f"loratorio: {note}", file=sys.stderr)


def _without_effect(
    options: argparse.Namespace, request: Request, tags: Sequence[PromptLora], variants: Iterable[Settings]
) -> Iterator[str]:
    """Sentences about options that have no effect with the others. variants: the settings of all pictures."""
    settings = request.settings
    # A box that is unticked anyway is not mentioned.
    given = [
        name for name, value in _given(options).items() if value is not False or KNOB_BY_NAME[name].default
    ]
    comparing = hasattr(options, "by")
    methods = {variant.method for variant in variants}
    yield from settings.without_effect(
        name for name in given if all(KNOB_BY_NAME[name].ignored_by(method) for method in methods)
    )
    placed = [tag for tag in tags if PLACE in tag.options]
    weighed = [knob.name for knob in KNOBS if knob.group == "weights"]
    typed = {*given, *(name for name in ("negative", "strength", "config") if getattr(options, name))}
    for names, without, why in (
        (["strength"], request.init_image is None, "without --init-image"),
        (
            ["config"],
            options.checkpoint is not None and options.checkpoint.is_dir(),
            "with a folder as --checkpoint",
        ),
        (["negative", "recentre", "rescale"], request.cfg == 1, "with --cfg 1, which has no guidance"),
        (["weight_maps", "single_maps"], comparing, "with compare, which writes only one sheet"),
        (["single_maps"], not comparing and not settings.weight_maps, "without --weight-maps"),
        (["pool_size", "pool_interval"], not any(tag.pool for tag in tags), "without a <pool:…> tag"),
        (
            ["yielding"],
            len(placed) in (0, len(tags)),
            "unless some LoRAs have a place (at=…) and others have none",
        ),
        (
            ["find_after"],
            not any(tag.options[PLACE].strip().startswith(AUTO) for tag in placed),
            f"without {PLACE}={AUTO}",
        ),
        (["own_words"], len(placed) < 2, "unless several LoRAs have a place (at=…)"),
        (weighed, len(tags) == 1 and not tags[0].pool and not placed, "with a single LoRA"),
        (
            ["reuse"],
            (request.steps or SHORT + 1) <= SHORT and request.cfg == 1,
            f"in {SHORT} steps or fewer with --cfg 1: every LoRA runs at every step",
        ),
        ([*given], not tags, "without a <lora:name> tag"),
    ):
        idle = [settings.called(name) for name in names if name in typed]
        if without and idle:
            yield f"{' and '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect {why}."
            typed -= {*names}


def _compare(options: argparse.Namespace) -> None:
    from .output import check_writable, is_picture, write_beside, write_numbered

    settings = _settings(options)
    by = options.by.strip().lower().replace("-", "_")
    variants = _compared(options.by, options.values, settings)
    request = _request(options, settings)
    for variant in variants.values():
        _request(options, variant)
    files = _model_files(options)
    tags = _tags(request, files, variants.values())
    check_writable(options.out)
    _say(_without_effect(options, request, tags, variants.values()))
    replaced = (PRESET, *_PRESET_KNOBS) if by == PRESET else (by,)
    typed = {PRESET: options.preset, **_given(options)}
    idle = [settings.called(name) for name in replaced if typed.get(name) is not None]
    _say(f"{name} has no effect: --by {options.by} sets it for each column." for name in idle)
    model = files.load()
    labels = list(variants)
    outcomes = [model.run(replace(request, settings=variant), label) for label, variant in variants.items()]
    _say(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))

    from ..pictures.sheet import contact_sheet
    from .output import png

    columns = [outcome.images for outcome in outcomes]
    rows = [[column[i] for column in columns] for i in range(request.batch)]
    seeds = [f"seed {request.seed + i}" for i in range(request.batch)]
    sheet = png(contact_sheet(rows, labels, seeds, f"{options.prompt}\nby {by.replace('_', ' ')}"))
    name = f"by-{by.replace('_', '-')}.png"
    print(
        *(
            write_beside(options.out, lambda out: {out: sheet})
            if is_picture(options.out)
            else write_numbered(options.out, lambda number: {options.out / f"{number:05}-{name}": sheet})
        )
    )


def _compared(by: str, values: str | None, settings: Settings) -> dict[str, Settings]:
    """The settings of each column, by its label."""
    name = by.strip().lower().replace("-", "_")
    known = [each.name for each in KNOBS if each.name not in _NOT_OPTIONS and each.group != "shown"]
    if name not in (PRESET, *known):
        usable = ", ".join((PRESET, *(each.replace("_", "-") for each in known)))
        raise LoratorioError(f"--by must be one of {usable}, not {by!r}.")
    if name == PRESET:
        presets = _values(PRESET, values, find_preset) if values else PRESETS.values()
        return {preset.label: settings.with_values(preset.values) for preset in presets}
    knob = KNOB_BY_NAME[name]
    chosen: list[Any]
    if values:
        chosen = _values(name, values, knob.check)
    elif knob.kind == "choice":
        chosen = [choice for choice, _ in knob.choices]
    elif knob.kind == "bool":
        chosen = [False, True]
    else:
        raise LoratorioError(
            f"Give the values of {knob.option} to compare, e.g. --values {knob.minimum:g},{knob.default}."
        )
    if knob.ignored_by(settings.method):
        used = ", ".join(name for name, method in METHODS.items() if knob.name in method.knobs)
        raise LoratorioError(
            f"{knob.option} has no effect with --method {settings.method}. The methods that use it: {used}."
        )
    variants = [settings.with_values({knob.name: value}) for value in chosen]
    return {_value_label(knob, variant): variant for variant in variants}


def _values(name: str, values: str, check: Callable[[str], Any]) -> list[Any]:
    try:
        return [check(value) for value in values.split(",")]
    except LoratorioError as problem:
        raise LoratorioError(str(problem).replace(name, "--values", 1)) from None


def _value_label(knob: Knob, settings: Settings) -> str:
    value = getattr(settings, knob.name)
    choices: Mapping[Any, str] = dict(knob.choices)
    return choices.get(value, f"{knob.label} {value}")


def _demo(options: argparse.Namespace) -> None:
    idle = ("out", "seed", "steps") if options.serve else ("port",)
    without = "with --serve" if options.serve else "without --serve"
    _say(f"--{name} has no effect {without}." for name in idle if getattr(options, name) is not None)
    if options.serve:
        port = _number("port", options.port or _PORT, int)
        if not 1 <= port <= 65535:
            raise LoratorioError(f"--port must be from 1 to 65535, not {port}.")
        model = _model_files(options).load()

        from .serve import serve

        serve(model, port)
        return
    from .demo import run_demo

    steps = None if options.steps is None else _number("steps", options.steps, int)
    seed = _number("seed", options.seed or "0", int)
    run_demo(_model_files(options), options.out or _DEMO_OUT, seed, steps)


def _check(options: argparse.Namespace) -> int:
    from ..check import FAIL
    from .request import Request, check

    prompt = options.prompt
    if prompt is None and options.checkpoint is None:
        prompt = example.pair_prompt()
    width, height = _size(options.size) if options.size else (None, None)
    cfg = None if options.cfg is None else _number("cfg", options.cfg, float)
    request = Request(prompt or "", options.negative, _SETTINGS, cfg=cfg, width=width, height=height, seed=1)
    check(request)
    files = _model_files(options)
    if not _tags(request, files, [request.settings]):
        raise LoratorioError("There is no <lora:name> in the prompt: the check needs at least one.")
    model = files.load()
    from .self_check import run_check

    report = run_check(model, request)
    print(report.text)
    return int(any(finding.verdict == FAIL for finding in report.findings))
