"""``loratorio demo``: three of the toybox's LoRAs, composed by every method; two characters; a character in four styles."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..compose.methods import METHODS
from ..settings import Settings
from . import example
from .lora_lookup import look_up
from .output import check_writable, png, write_beside
from .prompt import split_loras
from .request import Request, check

if TYPE_CHECKING:
    from PIL import Image

    from .generate import Outcome
    from .model import ModelFiles

STEPS = 20


def run_demo(model_files: ModelFiles, out: Path, seed: int = 0, steps: int | None = None) -> None:
    """Make the pictures, and write them when all are finished: into `out`, or a folder next to it if `out` has some already."""
    request = Request(
        example.prompt(),
        settings=Settings(enabled=True, weight_maps=True, single_maps=True, naming="option"),
        steps=STEPS if steps is None else steps,
        seed=seed,
    )
    check(request)
    for text in (example.prompt(), example.pair_prompt(), *map(example.styled_prompt, example.STYLES)):
        look_up(split_loras(text)[1], model_files.lora_dir)
    check_writable(out)
    model = model_files.load()

    from ..pictures.sheet import contact_sheet
    from .describe import describe
    from .model import map_files

    started = time.monotonic()
    cfg, size = model.checkpoint.cfg, model.checkpoint.native_size
    files: dict[str, bytes] = {}
    pictures: dict[str, Image.Image] = {}
    pair: dict[str, Image.Image] = {}

    def make(label: str, file: str, request: Request, shown: dict[str, Image.Image] = pictures) -> Outcome:
        outcome = model.run(request, label)
        shown[label] = outcome.images[0]
        files[f"{file}.png"] = png(outcome.images[0], describe(model.checkpoint, outcome, 0))
        return outcome

    def add_maps(outcome: Outcome, name: str) -> None:
        files.update({path.name: made for path, made in map_files(outcome, 0, Path(name)).items()})

    print(f"Prompt: {request.prompt}   (seed {seed}, {request.steps} steps, CFG {cfg:g})")
    make("No LoRA", "0-base", replace(request, prompt=example.TEXT))
    for number, name in enumerate(example.LORAS, 1):
        alone = replace(
            request, prompt=f"{example.TEXT} <lora:{name}>", settings=Settings(enabled=True, method="merge")
        )
        make(f"{name} alone", f"{number}-{name}-alone", alone)
    for entry in (each.entry for each in METHODS.values()):
        own = replace(request, settings=request.settings.with_values({"method": entry.name}))
        outcome = make(entry.label, f"method-{entry.name}", own)
        add_maps(outcome, f"map-{entry.name}-.png")
    merge = Settings(enabled=True, method="merge")
    # Wide enough for two figures.
    beside = replace(request, prompt=example.pair_prompt(), width=3 * size // 2)
    placed = replace(beside, prompt=example.pair_prompt("auto"))
    merged = replace(beside, settings=merge)
    make("Merge", "two-merge", merged, pair)
    make("LoRAtorio", "two-loratorio", beside, pair)
    in_places = make("LoRAtorio, places found", "two-places", placed, pair)
    add_maps(in_places, "map-two-places-.png")
    files["two-characters.png"] = png(contact_sheet([list(pair.values())], list(pair), title=placed.prompt))
    rows: dict[str, dict[str, Image.Image]] = {"Merge": {}, "LoRAtorio": {}}
    for style in example.STYLES:
        styled = replace(request, prompt=example.styled_prompt(style))
        make(style, f"style-{style}-merge", replace(styled, settings=merge), rows["Merge"])
        make(style, f"style-{style}-loratorio", styled, rows["LoRAtorio"])
    shown = [list(row.values()) for row in rows.values()]
    files["styles.png"] = png(
        contact_sheet(shown, example.STYLES, list(rows), f"{example.STYLED} in four styles")
    )
    sheet = contact_sheet(
        [list(pictures.values())],
        list(pictures),
        title=request.prompt,
        per_line=max(4, (len(pictures) + 2) // 3),
    )
    files["contact-sheet.png"] = png(sheet)
    written = write_beside(out, lambda folder: {folder / name: made for name, made in files.items()})
    out = written[0].parent
    print(f"{len(files)} files in {out.resolve()}, after {time.monotonic() - started:.0f} s:")
    print(f"  {out / 'contact-sheet.png'}    every method side by side")
    print(f"  {out / 'method-*.png'}         each picture, with its settings for a WebUI's PNG Info")
    print(
        f"  {out / 'two-characters.png'}   two characters next to each other, merged, and each in a place of its own"
    )
    print(f"  {out / 'styles.png'}           one character in four styles, merged above, composed below")
    print(f"  {out / 'map-*.png'}            where and when each LoRA was used")
