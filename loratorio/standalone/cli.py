"""The command line: ``loratorio demo``, ``loratorio generate``, ``loratorio compare``, ``loratorio check``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..compose.methods import METHODS
from ..errors import LoratorioError
from ..settings import GROUPS, KNOB_BY_NAME, KNOBS, PRESET, PRESETS, Knob, Settings, find_preset

if TYPE_CHECKING:
    from .generate import Request
    from .model import LoadedModel

_NOT_OPTIONS = ("enabled",)
"""Knobs that make no sense here: who types the command wants it on."""

_PRESET_KNOBS = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset.values))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 1: a check of the self-check failed; 2: something in the input is wrong, and a sentence on stderr says
    what; 130: stopped by Ctrl-C."""
    # What the libraries advise their programmers tells the user of a command nothing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may hold what cannot be printed; that is no reason to fail once a picture is made.
            stream.reconfigure(errors="replace")
    try:
        command: Callable[[argparse.Namespace], int | None] = options.command
        return command(options) or 0
    except LoratorioError as problem:
        print(f"loratorio: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nloratorio: stopped. Files that were finished before are whole; no other was begun.",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loratorio", description="Several LoRAs in one picture, without merging them."
    )
    parser.add_argument("--version", action="version", version=f"loratorio {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="three of the toybox's LoRAs, composed by every method", description=_DEMO_HELP
    )
    demo.add_argument("--out", type=Path, default=Path("loratorio-demo"), help="folder for the pictures")
    demo.add_argument("--seed", type=int, default=0, help="of all pictures")
    demo.add_argument("--steps", type=int, help="sampling steps")
    demo.add_argument(
        "--serve", action="store_true", help="open a page for playing, instead of writing pictures"
    )
    demo.add_argument("--port", type=int, default=7861, help="of the page")
    _add_model_options(demo)
    demo.set_defaults(command=_demo)

    generate = commands.add_parser("generate", help="pictures of a prompt with <lora:name:strength> tags")
    _add_picture_options(generate)
    _add_knobs(generate)
    generate.set_defaults(command=_generate)

    compare = commands.add_parser("compare", help="a grid over methods, or over the values of any knob")
    compare.add_argument("--by", default="method", metavar="KNOB", help="what changes from column to column")
    compare.add_argument(
        "--values", help="its values, with commas between; for a choice such as the method: by default all"
    )
    _add_picture_options(compare)
    _add_knobs(compare)
    compare.set_defaults(command=_compare)

    check = commands.add_parser(
        "check",
        help="whether composing agrees with merging on your checkpoint and LoRAs",
        description=_CHECK_HELP,
    )
    check.add_argument("prompt", nargs="?", help="with one <lora:name> or more; default: one for the toybox")
    _add_model_options(check)
    check.add_argument("--negative", default="", help="negative prompt")
    check.add_argument("--cfg", help="guidance scale (default: 7, for the toybox its own)")
    check.add_argument("--size", help="512 or 512x768, in pixels (default: the model's own)")
    check.set_defaults(command=_check)
    return parser


_DEMO_HELP = (
    "Composes three LoRAs of different categories by every method with the same seed, and two characters beside each other, "
    "merged and each in its place. Writes the pictures, each LoRA's weight maps over the picture and over time, and a contact "
    "sheet of either. Needs no download and no GPU."
)


_CHECK_HELP = (
    "Makes about a dozen pictures of one to four steps, composed and with the LoRAs merged into the weights, and prints a table of how "
    "well they agree, to be copied into a report. Writes no file. The exit code is 1 if a check failed."
)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="a .safetensors file or a diffusers folder; default: the toybox, which ships",
    )
    group.add_argument(
        "--config",
        type=Path,
        help="for a file: a folder with a diffusers model's configuration, or the model's .yaml",
    )
    group.add_argument(
        "--lora-dir", type=Path, help="folder of LoRA files; default: the toybox's with the toybox"
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the fastest there is"
    )
    group.add_argument("--dtype", default="auto", help="fp32, fp16 or bf16; auto: fp16 on CUDA, else fp32")


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='e.g. "a red circle <lora:rose:0.8> <lora:dusk>"')
    _add_model_options(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--negative", default="", help="negative prompt")
    group.add_argument("--steps", help="sampling steps (default: 20)")
    group.add_argument(
        "--cfg", help="guidance scale (default: 7, for the toybox its own); 1 is without guidance"
    )
    group.add_argument("--sampler", default="euler", help="euler, euler-a, dpmpp-2m-karras or ddim")
    group.add_argument("--seed", default="0", help="of the first picture; the next has the next")
    group.add_argument("--size", help="512 or 512x768, in pixels (default: the model's own)")
    group.add_argument("--batch", default="1", help="how many pictures")
    group.add_argument("--init-image", type=Path, help="a picture to start from (img2img)")
    group.add_argument(
        "--strength", default="0.75", help="how much of the initial picture is made anew, 0 to 1"
    )
    group.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the pictures, or a .png file (default: out)"
    )


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    """An option for every knob. Values stay text here: the knob itself says what is wrong with them."""
    groups = {name: parser.add_argument_group(heading.lower()) for name, heading in GROUPS.items()}
    about = " ".join(f"{preset.name}: {preset.help}" for preset in PRESETS.values())
    groups["method"].add_argument(
        f"--{PRESET}",
        metavar="VALUE",
        help=f"{about} Sets {', '.join(_PRESET_KNOBS)}; they may be given beside it.",
    )
    for knob in KNOBS:
        if knob.name in _NOT_OPTIONS:
            continue
        extra: dict[str, Any] = {"metavar": "VALUE"}
        if knob.kind == "bool":
            extra = {"nargs": "?", "const": "true", "metavar": "true|false"}
        groups[knob.group].add_argument(
            knob.option, help=f"{knob.help} {_range(knob)}".replace("%", "%%"), **extra
        )


def _range(knob: Knob) -> str:
    if knob.kind == "choice":
        return f"One of {', '.join(name for name, _ in knob.choices)} (default: {knob.default})."
    if knob.kind == "bool":
        return f"(default: {str(knob.default).lower()})"
    return f"{knob.minimum:g} to {knob.maximum:g} (default: {knob.default})."


def _settings(options: argparse.Namespace) -> Settings:
    return Settings.from_mapping({"enabled": True, PRESET: options.preset, **_given(options)})


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The knobs that the command line names."""
    named = {knob.name: getattr(options, knob.name, None) for knob in KNOBS}
    return {name: value for name, value in named.items() if value is not None}


def _load(options: argparse.Namespace) -> LoadedModel:
    from .model import LoadedModel

    return LoadedModel.load(
        options.checkpoint, options.lora_dir, options.config, options.device, options.dtype
    )


def _request(options: argparse.Namespace, model: LoadedModel, settings: Settings) -> Request:
    from .generate import Request

    width, height = _size(options.size) if options.size else (model.size, model.size)
    return Request(
        prompt=options.prompt,
        negative=options.negative,
        settings=settings,
        steps=_number("steps", options.steps or "20", int),
        cfg=_number("cfg", options.cfg or model.cfg, float),
        sampler=options.sampler,
        seed=_number("seed", options.seed, int),
        width=width,
        height=height,
        batch=_number("batch", options.batch, int),
        init_image=_open_image(options.init_image) if options.init_image else None,
        strength=_number("strength", options.strength, float),
    )


def _number(name: str, text: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise LoratorioError(f"{name} must be {what}, not {text!r}.") from None


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise LoratorioError(f"size must be like 512 or 512x768, not {text!r}.")
    return int(sides[0]), int(sides[-1])


def _open_image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise LoratorioError(f"There is no picture {path}: check --init-image.") from None
    except (UnidentifiedImageError, OSError) as problem:
        raise LoratorioError(
            f"{path} cannot be read as a picture ({problem}): give a PNG or JPEG."
        ) from problem


def _check_early(options: argparse.Namespace) -> None:
    """What can be said to be wrong before a model is loaded."""
    from .prompt import check_text, split_loras
    from .schedule import find_sampler

    find_sampler(options.sampler)
    split_loras(options.prompt)
    check_text("negative prompt", options.negative)
    if options.size:
        _size(options.size)


def _generate(options: argparse.Namespace) -> None:
    from .describe import describe
    from .model import map_files
    from .output import check_writable, is_picture, png, write_all, write_numbered

    settings = _settings(options)
    _check_early(options)
    check_writable(options.out)
    model = _load(options)
    request = _request(options, model, settings)
    outcome = model.run(request)
    _say([*settings.without_effect(_given(options)), *outcome.notes])
    if not outcome.loras:
        _say(["there is no <lora:name> in the prompt, so this is the model's plain picture."])

    def files(paths: Sequence[Path]) -> dict[Path, bytes]:
        made: dict[Path, bytes] = {}
        for i, (path, image) in enumerate(zip(paths, outcome.images, strict=True)):
            made[path] = png(image, describe(model.checkpoint, outcome, i))
            made |= map_files(outcome, i, path.with_name(f"{path.stem}-map-.png"))
        return made

    if is_picture(options.out):
        several = len(outcome.seeds) > 1
        out: Path = options.out
        made = files([out.with_stem(f"{out.stem}-{seed}") if several else out for seed in outcome.seeds])
        write_all(made)
        written = list(made)
    else:
        written = write_numbered(
            options.out,
            lambda first: files(
                [options.out / f"{first + i:05}-{seed}.png" for i, seed in enumerate(outcome.seeds)]
            ),
        )
    for path in written:
        print(path)


def _say(notes: Iterable[str]) -> None:
    """What a user should know of the pictures, beside the list of files."""
    for note in notes:
        print(f"loratorio: {note}", file=sys.stderr)


def _compare(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from ..sheet import contact_sheet
    from .output import check_writable, is_picture, png, write_all, write_numbered

    settings = _settings(options)
    by = options.by.strip().lower().replace("-", "_")
    variants = _compared(options.by, options.values, settings)
    _check_early(options)
    check_writable(options.out)
    model = _load(options)
    request = _request(options, model, settings)
    labels = list(variants)
    outcomes = [model.run(replace(request, settings=variant), label) for label, variant in variants.items()]
    _say(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))
    columns = [outcome.images for outcome in outcomes]
    rows = [[column[i] for column in columns] for i in range(request.batch)]
    seeds = [f"seed {request.seed + i}" for i in range(request.batch)]
    sheet = png(contact_sheet(rows, labels, seeds, f"{options.prompt}\nby {by.replace('_', ' ')}"))
    if is_picture(options.out):
        write_all({options.out: sheet})
        print(options.out)
    else:
        name = f"by-{by.replace('_', '-')}.png"
        print(*write_numbered(options.out, lambda number: {options.out / f"{number:05}-{name}": sheet}))


def _compared(by: str, values: str | None, settings: Settings) -> dict[str, Settings]:
    """The settings of each column, by its label."""
    name = by.strip().lower().replace("-", "_")
    if name == PRESET:
        presets = [find_preset(value) for value in (values.split(",") if values else PRESETS)]
        return {preset.label: settings.with_values(preset.values) for preset in presets}
    knob = KNOB_BY_NAME.get(name)
    if knob is None or name in _NOT_OPTIONS:
        usable = ", ".join((PRESET, *(each for each in KNOB_BY_NAME if each not in _NOT_OPTIONS)))
        raise LoratorioError(f"--by must be one of {usable}, not {by!r}.")
    chosen: list[Any]
    if values:
        chosen = [knob.check(value) for value in values.split(",")]
    elif knob.kind == "choice":
        chosen = [choice for choice, _ in knob.choices]
    elif knob.kind == "bool":
        chosen = [False, True]
    else:
        raise LoratorioError(
            f"Say which values of {knob.name} to compare, e.g. --values {knob.minimum:g},{knob.default}."
        )
    if knob.ignored_by(settings.method):
        used = ", ".join(name for name, method in METHODS.items() if knob.name in method.knobs)
        raise LoratorioError(
            f"{knob.name} changes nothing with the method {settings.method}: name another by --method, one of {used}."
        )
    variants = [settings.with_values({knob.name: value}) for value in chosen]
    return {_value_label(knob, variant): variant for variant in variants}


def _value_label(knob: Knob, settings: Settings) -> str:
    value = getattr(settings, knob.name)
    choices: Mapping[Any, str] = dict(knob.choices)
    return choices.get(value, f"{knob.label} {value}")


def _demo(options: argparse.Namespace) -> None:
    if options.serve:
        from .serve import serve

        serve(_load(options), options.port)
        return
    from .demo import run_demo

    run_demo(_load(options), options.out, options.seed, options.steps)


def _check(options: argparse.Namespace) -> int:
    from ..check import FAIL
    from .generate import Request, check
    from .prompt import check_text, split_loras

    prompt = options.prompt
    if prompt is None and options.checkpoint is None:
        from .example import pair_prompt

        prompt = pair_prompt()
    if not split_loras(prompt or "")[1]:
        raise LoratorioError("There is no <lora:name> in the prompt: the check needs one or more.")
    check_text("negative prompt", options.negative)
    model = _load(options)
    width, height = _size(options.size) if options.size else (model.size, model.size)
    cfg = _number("cfg", options.cfg or model.cfg, float)
    request = Request(prompt, options.negative, cfg=cfg, width=width, height=height, seed=1)
    check(request, model.checkpoint.latent_scale)
    from .self_check import run_check

    report = run_check(model, request)
    print(report.text)
    return int(any(finding.verdict == FAIL for finding in report.findings))
