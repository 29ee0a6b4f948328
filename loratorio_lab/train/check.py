"""`loratorio-lab check`: is the toybox good enough? For each LoRA, pictures of its own prompt with and without it.

The classifier must find the element in at least 95 % of the pictures with the LoRA and in at most 5 % of the base's. Writes the
contact sheet (base above, LoRA below) and, with --thumbs, the pictures for the LoRA cards. Exit code 1 if an element fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from loratorio import toybox
from loratorio.toybox.elements import Element
from loratorio_lab.toybox.classifier import classifier_file, classify, load_classifier
from loratorio_lab.toybox.pipeline import load_pipeline
from loratorio_lab.toybox.world import World

FOUND, ABSENT = 0.95, 0.05
STEPS, GUIDANCE = 20, 3.0
SHOWN = 4
"""Seeds on the contact sheet."""


def sample(
    pipeline: StableDiffusionPipeline, texts: list[str], pixels: int, first_seed: int = 0
) -> list[Image.Image]:
    """One picture per text, the i-th from seed first_seed + i."""
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(texts))]
    made: list[Image.Image] = pipeline(
        texts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        height=pixels,
        width=pixels,
    ).images
    return made


def with_lora(
    pipeline: StableDiffusionPipeline, folder: Path, element: Element, texts: list[str], pixels: int
) -> list[Image.Image]:
    """As `sample`, with the element's LoRA, read by diffusers from its kohya file."""
    pipeline.load_lora_weights(
        str(folder), weight_name=f"{element.name}.safetensors", adapter_name=element.name
    )
    try:
        return sample(pipeline, texts, pixels)
    finally:
        pipeline.unload_lora_weights()


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]]) -> Image.Image:
    """Two columns of elements, each with its name, the base's pictures and the LoRA's pictures."""
    side, label, half = rows[0][1][0].height, 14, (len(rows) + 1) // 2
    block = (SHOWN * side + 8, 2 * side + label + 6)
    sheet = Image.new("RGB", (2 * block[0], half * block[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, base, made) in enumerate(rows):
        x, y = block[0] * (i // half), block[1] * (i % half)
        draw.text((x + 2, y + 1), name, fill="black")
        for row, pictures in enumerate((base, made)):
            for column, picture in enumerate(pictures[:SHOWN]):
                sheet.paste(picture, (x + column * side, y + label + row * side))
    return sheet


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loratorio-lab check", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="names of elements")
    parser.add_argument("--folder", type=Path, default=toybox.FOLDER, help="where model/ and lora/ are")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here")
    parser.add_argument("--thumbs", type=Path, help="write a 128 px picture of each LoRA into this folder")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    world = World()
    model = options.folder / "model"
    pipeline = load_pipeline(model / "toybox.safetensors", folder=model / "toybox_text")
    classifier = load_classifier(classifier_file(options.folder))
    print(f"{'element':12} {'category':11} {'trigger':8} {'with LoRA':>9} {'base':>6}")
    rows, good = [], True
    for element in world.elements:
        if options.only and element.name not in options.only:
            continue
        texts = world.prompts(element, options.seeds)
        base = sample(pipeline, texts, world.pixels)
        made = with_lora(pipeline, options.folder / "lora", element, texts, world.pixels)
        hits, misses = (
            float(np.mean([found[element.name] for found in classify(shown, classifier)]))
            for shown in (made, base)
        )
        passed = hits >= FOUND and misses <= ABSENT
        good = good and passed
        print(
            f"{element.name:12} {element.category:11} {element.trigger:8} {hits:9.0%} {misses:6.0%} {'' if passed else 'FAILS'}",
            flush=True,
        )
        rows.append((f"{element.name} ({element.category}): {texts[0]}", base, made))
        if options.thumbs:
            options.thumbs.mkdir(parents=True, exist_ok=True)
            thumb = made[0].resize((128, 128), Image.Resampling.LANCZOS).quantize(64)
            thumb.save(options.thumbs / f"{element.name}.png", optimize=True)
    if options.sheet:
        contact_sheet(rows).quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(
            options.sheet, optimize=True
        )
        print(f"contact sheet: {options.sheet}")
    return 0 if good else 1
