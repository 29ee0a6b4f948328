"""Pools: a folder, a glob or a list of LoRAs as candidates, ``<pool:folder-or-glob:0.8>``.

This module finds the files. Which of them are used is decided by `admission`, and while sampling by `compose.candidates`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..errors import LoratorioError
from .lora_folder import LoraFolder, folded
from .roles import POOL_OPTION, looks_like_speed_lora

_POOL_TAG = re.compile(r"<pool:([^<>]*)>", re.IGNORECASE)
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)


def pool_files(
    pattern: str, folder: Path | LoraFolder | Sequence[Path], known: Iterable[str] = ()
) -> list[Path]:
    """The LoRA files that a pool names, sorted, each once.

    Args:
        pattern: relative to the LoRA folder: a folder (and everything below it), a glob (``anime/*``, ``**/hat*``), a LoRA's name,
            or several of these separated by commas. ``*`` alone means every LoRA. Case does not matter.
        folder: the LoRA folder, or several. Files outside of them are never used, whether by the pattern or by a link.
        known: names of LoRAs that the prompt already has; they are left out.

    Raises:
        LoratorioError: a pattern that leaves the folder, or that matches no LoRA.
    """
    folders = _read(folder, pattern)
    taken = {folded(name) for name in known}
    files: dict[Path, tuple[LoraFolder, Path]] = {}  # by where a link ends, so that no file comes twice
    for part in (each.strip() for each in pattern.split(",")):
        for loras, file in _fitting_in_any(part, pattern, folders) if part else ():
            files.setdefault(file.resolve(), (loras, file))
    if not files:
        raise LoratorioError(
            "The pool is empty. It needs a folder, a pattern or names: <pool:folder:0.8>, <pool:anime/*>, <pool:a,b,c>."
        )
    return sorted(
        file for loras, file in files.values() if not taken & {folded(loras.name_of(file)), folded(file.stem)}
    )


def has_pool(prompt: str) -> bool:
    """Whether a prompt has a pool's tag."""
    return _POOL_TAG.search(prompt) is not None


def expanded(
    prompt: str,
    folder: Path | Sequence[Path],
    name_of: Callable[[Path], str] = lambda file: file.stem,
    is_candidate: Callable[[Path], bool] = lambda file: not looks_like_speed_lora(file.stem),
) -> str:
    """`prompt` with every ``<pool:…:0.8>`` replaced by a ``<lora:name:0.8:pool=1>`` for each candidate.

    For hosts that read LoRA tags themselves and ignore unknown arguments: `roles` treats a LoRA with ``pool=1`` as a candidate.

    Args:
        name_of: the name that the host has for a file.
        is_candidate: whether a file may be one; speed LoRAs may not.

    Raises:
        LoratorioError: as `pool_files`.
    """
    known = [match.group(1).split(":")[0].strip() for match in _LORA_TAG.finditer(prompt)]

    def tags(match: re.Match[str]) -> str:
        pattern, _, rest = match.group(1).partition(":")
        names = [name_of(file) for file in pool_files(pattern.strip(), folder, known) if is_candidate(file)]
        known.extend(names)
        return "".join(f"<lora:{name}:{rest or '1'}:{POOL_OPTION}=1>" for name in names)

    return _POOL_TAG.sub(tags, prompt)


def _read(folder: Path | LoraFolder | Sequence[Path], pattern: str) -> list[LoraFolder]:
    if isinstance(folder, LoraFolder):
        return [folder]
    read: list[LoraFolder] = []
    trouble: list[LoratorioError] = []
    for each in [folder] if isinstance(folder, Path) else folder:
        try:
            read.append(LoraFolder(each))
        except LoratorioError as problem:
            trouble.append(problem)
    if not read:
        raise LoratorioError(f"{trouble[0]} The pool <pool:{pattern}> is empty.") from trouble[0]
    return read


def _fitting_in_any(part: str, pattern: str, folders: Sequence[LoraFolder]) -> list[tuple[LoraFolder, Path]]:
    found: list[tuple[LoraFolder, Path]] = []
    trouble: list[LoratorioError] = []
    for loras in folders:
        try:
            found += [(loras, file) for file in _fitting(part, pattern, loras)]
        except LoratorioError as problem:
            trouble.append(problem)
    if not found:
        raise trouble[0]
    return found


def _fitting(part: str, pattern: str, loras: LoraFolder) -> Iterator[Path]:
    path = PurePosixPath(part.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in part:
        raise LoratorioError(
            f"{part!r} of the pool <pool:{pattern}> is outside the LoRA folder: name a folder or LoRA inside it."
        )
    fitting = loras.within(part)
    inside = [file for file in fitting if not loras.leads_out(file)]
    if fitting and not inside:
        raise LoratorioError(
            f"{part!r} of the pool <pool:{pattern}> links to {fitting[0].resolve()}, outside the LoRA folder. "
            "A pool uses only files inside it: name the LoRA by itself, or move it here."
        )
    if not inside:
        raise LoratorioError(
            f"No LoRA matches {part!r} of the pool <pool:{pattern}>: check the name or the folder. {loras.cannot_be_read}".strip()
        )
    yield from inside
