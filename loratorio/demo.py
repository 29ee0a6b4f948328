"""``loratorio demo``: three of the toybox's LoRAs, composed by every method."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .compose.catalogue import CATALOGUE
from .output import check_writable, png, write_all
from .settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from .cli import _Studio
    from .hosts.standalone.generate import Outcome, Request

ELEMENTS = ("cat", "cactus", "night")
"""A character, an object and a background of the toybox."""

STEPS = 12


def demo_prompt() -> tuple[str, list[str]]:
    """A caption as the toybox was trained on, and the names of the LoRAs that know its words."""
    from .toybox.world import Scene, caption

    character, thing, background = ELEMENTS
    return caption(Scene(character=character, object=thing, background=background)), list(ELEMENTS)


def run_demo(studio: _Studio, out: Path, seed: int = 0, steps: int | None = None) -> None:
    """Make the pictures, and write them only when all are there."""
    from .cli import run, weight_maps
    from .hosts.standalone.describe import describe
    from .hosts.standalone.generate import Request
    from .sheet import contact_sheet

    check_writable(out)
    started = time.monotonic()
    prompt, names = demo_prompt()
    tags = [f"<lora:{name}>" for name in names]
    request = Request(
        f"{prompt} {' '.join(tags)}",
        settings=Settings(enabled=True, weight_maps=True),
        steps=steps or STEPS,
        cfg=studio.cfg,
        seed=seed,
        width=studio.size,
        height=studio.size,
    )
    files: dict[Path, bytes] = {}
    pictures: dict[str, Image.Image] = {}

    def make(label: str, file: str, request: Request) -> Outcome:
        outcome = run(studio, request, label)
        pictures[label] = outcome.images[0]
        files[out / f"{file}.png"] = png(outcome.images[0], describe(studio.checkpoint, outcome, 0))
        return outcome

    print(f"Prompt: {request.prompt}   (seed {seed}, {request.steps} steps, CFG {request.cfg:g})")
    make("No LoRA", "0-base", replace(request, prompt=prompt))
    for number, (name, tag) in enumerate(zip(names, tags, strict=True), 1):
        alone = replace(request, prompt=f"{prompt} {tag}", settings=Settings(enabled=True, method="merge"))
        make(f"{name} alone", f"{number}-{name}-alone", alone)
    for entry in CATALOGUE.values():
        own = replace(request, settings=request.settings.with_values({"method": entry.name}))
        outcome = make(entry.label, f"method-{entry.name}", own)
        for name, picture in weight_maps(outcome, 0).items():
            files[out / f"map-{entry.name}-{name}.png"] = png(picture)
    sheet = contact_sheet(
        [list(pictures.values())],
        list(pictures),
        title=request.prompt,
        per_line=max(4, (len(pictures) + 2) // 3),
    )
    files[out / "contact-sheet.png"] = png(sheet)
    write_all(files)
    print(f"{len(files)} files in {out.resolve()}, after {time.monotonic() - started:.0f} s:")
    print(f"  {out / 'contact-sheet.png'}   every method side by side")
    print(f"  {out / 'method-*.png'}        each picture, with its settings for a WebUI's PNG Info")
    print(f"  {out / 'map-*.png'}           where and when each LoRA was used")
