"""Pools: a folder, a glob or a list of LoRAs as candidates, ``<pool:folder-or-glob:0.8>``.

Which of them are used is decided while sampling (`compose.methods.loratorio.FromPool`); here is which files they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from .errors import LoratorioError
from .roles import POOL_OPTION, looks_like_speed_lora

_POOL_TAG = re.compile(r"<pool:([^<>]*)>", re.IGNORECASE)
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)
SUFFIX = ".safetensors"
_WILD = set("*?[")

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Candidates(Generic[Loaded]):
    """A pool's LoRAs that could be read, and the names of the files that could not, each with the reason."""

    loaded: tuple[Loaded, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=())

    @property
    def note(self) -> str:
        """A sentence on the skipped files, or nothing."""
        if not self.skipped:
            return ""
        return f"Left out of the pool because they cannot be used: {', '.join(name for name, _ in self.skipped)}."


def pool_files(pattern: str, folder: Path, known: Iterable[str] = ()) -> list[Path]:
    """The LoRA files that a pool names, sorted, each once.

    Args:
        pattern: relative to the LoRA folder: a folder (all below it), a glob (``anime/*``, ``**/hat*``), a LoRA's name, or several of
            these with commas. ``*`` alone is every LoRA.
        folder: the LoRA folder. Nothing outside of it is used, whichever way the pattern or a link in the folder leads there.
        known: names of LoRAs that the prompt has already; they are left out.

    Raises:
        LoratorioError: a pattern that leaves the folder, or that no LoRA fits.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise LoratorioError(
            f"There is no LoRA folder {folder}: the pool <pool:{pattern}> has nothing to choose from."
        )
    taken = {name.lower() for name in known}
    files: dict[Path, Path] = {}  # by where a link ends, so that no file comes twice
    for part in (each.strip() for each in pattern.split(",")):
        found = list(_fitting(part, root)) if part else []
        if part and not found:
            raise LoratorioError(
                f"No LoRA fits {part!r} of the pool <pool:{pattern}>: check the name or the folder."
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise LoratorioError(
            "A pool needs a folder, a pattern or names: <pool:folder:0.8>, <pool:anime/*>, <pool:a,b,c>."
        )
    return sorted(file for file in files.values() if file.stem.lower() not in taken)


def expanded(prompt: str, folder: Path) -> str:
    """`prompt` with every ``<pool:…:0.8>`` replaced by a ``<lora:name:0.8:pool=1>`` for each candidate.

    For hosts that read LoRA tags themselves and pass over arguments that they do not know: `roles` takes a LoRA with
    ``pool=1`` for a candidate. Speed LoRAs are left out.

    Raises:
        LoratorioError: as `pool_files`.
    """
    known = [match.group(1).split(":")[0].strip() for match in _LORA_TAG.finditer(prompt)]

    def tags(match: re.Match[str]) -> str:
        pattern, _, rest = match.group(1).partition(":")
        names = [file.stem for file in pool_files(pattern.strip(), folder, known)]
        known.extend(names)
        chosen = [name for name in names if not looks_like_speed_lora(name)]
        return "".join(f"<lora:{name}:{rest or '1'}:{POOL_OPTION}=1>" for name in chosen)

    return _POOL_TAG.sub(tags, prompt)


def load_candidates(files: Iterable[Path], load: Callable[[Path], Loaded]) -> Candidates[Loaded]:
    """Every file through `load`; those at which it raises LoratorioError or OSError are skipped."""
    loaded: list[Loaded] = []
    skipped: list[tuple[str, str]] = []
    for file in files:
        try:
            loaded.append(load(file))
        except (LoratorioError, OSError) as problem:
            skipped.append((file.stem, str(problem)))
    return Candidates(tuple(loaded), tuple(skipped))


def _fitting(part: str, root: Path) -> Iterator[Path]:
    path = PurePosixPath(part.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or any(":" in each for each in path.parts):
        raise LoratorioError(f"A pool stays inside the LoRA folder: {part!r} leads out of it.")
    if (root / path).is_dir():
        globbed: Iterable[Path] = (root / path).rglob(f"*{SUFFIX}")
    elif _WILD & set(part):
        globbed = root.glob(str(path))
    else:
        # A LoRA by name lies anywhere below the folder, as it does for a <lora:…> tag.
        name = path.name.removesuffix(SUFFIX).lower()
        globbed = (file for file in root.rglob(f"*{SUFFIX}") if file.stem.lower() == name)
    for file in globbed:
        # A link may lead anywhere; what counts is where it ends.
        inside = file.resolve().is_relative_to(root)
        if inside and file.is_file() and file.suffix.lower() == SUFFIX:
            yield file
