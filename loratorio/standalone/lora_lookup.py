"""The LoRA files that a prompt's tags name, and their metadata. Imports no torch, so that errors appear at once."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import LoratorioError
from ..prompt.lora_folder import PICKLES, SUFFIX, LoraFolder, ambiguous_note, folded, readable, reason
from ..prompt.pool import pool_files
from ..prompt.roles import TaggedLora, chosen_from_pool, participants_of, repeats, united
from .prompt import PromptLora


@dataclass(frozen=True)
class TagFiles:
    """A tag of the prompt, and the LoRAs that it names by their files: one, or a pool's candidates."""

    tag: PromptLora
    loras: Mapping[Path, TaggedLora]


def look_up(tags: Sequence[PromptLora], folder: Path | None, prompt: str) -> tuple[list[TagFiles], list[str]]:
    """The files of every tag, in order, and notes for the user. For a pool: those that `prompt`, without tags, calls.

    Raises:
        LoratorioError: no folder, a LoRA that is missing or whose file cannot be opened, a role or a place that cannot be read.
    """
    if not tags:
        return [], []
    if folder is None:
        raise LoratorioError(
            f"The prompt names LoRA {tags[0].name}, but there is no LoRA folder: lora_dir is not set."
        )
    there = LoraFolder(folder)
    found: list[TagFiles] = []
    notes: list[str] = []
    named = [tag.name for tag in tags if not tag.pool]
    for tag in tags:
        if tag.pool:
            taken = [*named, *(lora.name for each in found if each.tag.pool for lora in each.loras.values())]
            files = pool_files(tag.name, there, taken)
            candidates = [
                TaggedLora(there.name_of(file), tag.options, read_metadata(file), True, file)
                for file in files
            ]
            chosen, note = chosen_from_pool(candidates, prompt)
            loras = {files[number]: lora for number, lora in chosen.items()}
        else:
            file, note = find_lora(there, tag.name)
            check_safetensors(file, f"LoRA {tag.name}")
            loras = {file: TaggedLora(tag.name, tag.options, read_metadata(file), False, file)}
        found.append(TagFiles(tag, loras))
        notes += [note] if note and note not in notes else []
    participants_of([lora for each in found for lora in each.loras.values()])
    return _each_once(found), notes


def _each_once(found: Sequence[TagFiles]) -> list[TagFiles]:
    """The tags of one LoRA as one tag, with their strengths added up, as merging does; pools as they are."""
    named = [each for each in found if not each.tag.pool]
    tagged = [lora for each in named for lora in each.loras.values()]
    once: dict[int, TagFiles] = {}
    for numbers in repeats(tagged):
        tags, lora = [named[i].tag for i in numbers], united([tagged[i] for i in numbers])
        te, unet = sum(tag.te for tag in tags), sum(tag.unet for tag in tags)
        files = dict.fromkeys(named[numbers[0]].loras, lora)
        once[id(named[numbers[0]])] = TagFiles(PromptLora(tags[0].name, te, unet, lora.options), files)
    return [once.get(id(each), each) for each in found if each.tag.pool or id(each) in once]


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
