"""The LoRA files that a prompt's tags name, and their metadata. Imports no torch, so that errors appear at once."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import LoratorioError
from ..prompt.admission import ActiveLora, each_once
from ..prompt.lora_folder import PICKLES, SUFFIX, LoraFolder, ambiguous_note, folded, readable, reason
from ..prompt.pool import pool_files
from ..prompt.roles import TaggedLora, participants_of
from .prompt import PromptLora


def look_up(tags: Sequence[PromptLora], folder: Path | None) -> tuple[list[ActiveLora], list[str]]:
    """The LoRAs of the tags, each once, those of pools as candidates; and notes for the user.

    Raises:
        LoratorioError: no folder, a LoRA that is missing or whose file cannot be opened, a role or a place that cannot be read.
    """
    if not tags:
        return [], []
    if folder is None:
        raise LoratorioError(
            f"The prompt names LoRA {tags[0].name}, but there is no LoRA folder: give lora_dir (--lora-dir)."
        )
    there = LoraFolder(folder)
    found: list[ActiveLora] = []
    notes: list[str] = []
    named = [tag.name for tag in tags if not tag.pool]
    for tag in tags:
        if tag.pool:
            taken = [*named, *(lora.tagged.name for lora in found if lora.tagged.pooled)]
            files = {there.name_of(file): file for file in pool_files(tag.name, there, taken)}
        else:
            file, note = find_lora(there, tag.name)
            check_safetensors(file, f"LoRA {tag.name}")
            files = {tag.name: file}
            notes += [note] if note and note not in notes else []
        for name, file in files.items():
            tagged = TaggedLora(name, tag.options, read_metadata(file), tag.pool, file)
            found.append(ActiveLora(tagged, tag.unet, tag.te))
    participants_of([lora.tagged for lora in found])
    return each_once(found, _added), notes


def _added(tags: Sequence[ActiveLora]) -> ActiveLora:
    """As merging does it."""
    return replace(tags[0], strength=sum(tag.strength for tag in tags), text=sum(tag.text for tag in tags))


def list_loras(folder: Path) -> dict[str, Path]:
    """Names and files of all LoRAs in a folder and below it."""
    loras = LoraFolder(folder)
    return {loras.name_of(file): file for file in loras.files}


def find_lora(folder: LoraFolder, name: str) -> tuple[Path, str]:
    """The file of the LoRA `name`, and a sentence where several files have that name, or nothing.

    Raises:
        LoratorioError: the folder has no such LoRA (with the nearest names).
    """
    found = folder.find(name)
    if found:
        return found[0], ambiguous_note(name, found, folder)
    for file in folder.pickles:
        if folded(file.stem) == folded(name):
            return file, ""  # the reader says why it will not be opened
    by_folded = {folded(folder.name_of(file)): folder.name_of(file) for file in folder.files}
    near = difflib.get_close_matches(folded(name), by_folded, n=3, cutoff=0.4)
    names = [by_folded[each] for each in near]
    hint = (
        f"The closest names are: {', '.join(names)}."
        if names
        else f"It contains {len(by_folded)} other LoRAs."
    )
    raise LoratorioError(
        f"LoRA {name} is not in {readable(folder.root)}. {hint} {folder.cannot_be_read}".strip()
    )


def read_metadata(file: Path) -> Mapping[str, str]:
    """The metadata of a .safetensors file; nothing if it cannot be read."""
    with (
        contextlib.suppress(SafetensorError, OSError, ValueError),
        safe_open(str(file), framework="np") as opened,
    ):
        return dict(opened.metadata() or {})
    return {}


def check_safetensors(path: Path, what: str) -> None:
    """Raise LoratorioError for a pickle (by its name; it is not opened), another kind of file, or one that is cut short.

    Args:
        what: for the sentence, e.g. ``LoRA rose`` or ``The checkpoint``.
    """
    if path.suffix.lower() in PICKLES:
        raise LoratorioError(
            f"{what} is a pickle ({path.name}), which can run any program when it is opened. It was not opened. "
            "Get it as .safetensors."
        )
    if path.suffix.lower() != SUFFIX:
        raise LoratorioError(f"{what} must be a {SUFFIX} file, not {path.name}.")
    try:
        # The library has one error for what the system will not open and for what it cannot make sense of.
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as problem:
        raise LoratorioError(
            f"{what} cannot be read: {readable(path)} cannot be opened ({reason(problem)}). Check its permissions."
        ) from problem
    try:
        with safe_open(str(path), framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as problem:
        raise damaged(path, what, problem) from problem


def damaged(path: Path, what: str, problem: BaseException) -> LoratorioError:
    return LoratorioError(
        f"{what} cannot be read: {readable(path)} is damaged or incomplete ({problem}). Get it again."
    )
