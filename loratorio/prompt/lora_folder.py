"""The LoRA files in a folder and below it, and the names that prompts have for them."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path

from ..errors import LoratorioError

SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
"""Files that can run code when they are opened. They are never opened."""


class LoraFolder:
    """The contents of a LoRA folder, read once.

    Links are followed, as in the WebUIs. Every real folder is read once, so circular links end. Folders that cannot be opened and
    dead links are skipped and named by `cannot_be_read`.

    A LoRA's name is its file's name without extension; where several files share it, with the folders before it (``sub/name``).
    Case does not matter, nor whether an accented letter is one character or two.

    Attributes:
        files: sorted by path, all below `root`.
        pickles: files that may be LoRAs and are never opened.

    Raises:
        LoratorioError: there is no such folder, or it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.pickles: list[Path] = []
        self._unreadable: list[str] = []
        try:
            is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
            if is_folder:
                os.listdir(folder)
        except FileNotFoundError:
            is_folder = False
        except (OSError, ValueError) as problem:
            raise LoratorioError(
                f"The LoRA folder {readable(folder)} cannot be opened ({reason(problem)}): check its permissions."
            ) from problem
        if not is_folder:
            raise LoratorioError(f"There is no LoRA folder {readable(folder)}: check the path.")
        self.files = tuple(sorted(self._found(folder)))
        self._relative = {file: self._path_in_folder(file) for file in self.files}
        stems = Counter(folded(file.stem) for file in self.files)
        self._repeated = {stem for stem, count in stems.items() if count > 1}
        self._real_root = folder.resolve()

    def name_of(self, file: Path) -> str:
        """The shortest name that no other file has."""
        relative = self._relative[file]
        return relative if folded(file.stem) in self._repeated else relative.rpartition("/")[2]

    def find(self, name: str) -> list[Path]:
        """The files that a prompt may mean by `name`; those that have just this spelling, if any do."""
        name = name.replace("\\", "/").removeprefix("./")
        place = -1 if "/" not in name else None
        own = {
            file: path if place is None else path.rpartition("/")[2] for file, path in self._relative.items()
        }
        exact = [file for file, path in own.items() if path == name]
        return exact or [file for file, path in own.items() if folded(path) == folded(name)]

    def within(self, pattern: str) -> list[Path]:
        """The files that a folder (all below it), a glob, or a name means; ``*`` and ``.`` alone mean all."""
        path = re.sub(r"/+", "/", pattern.replace("\\", "/")).removeprefix("./").strip("/")
        if folded(path).endswith(SUFFIX):
            path = path[: -len(SUFFIX)]
        if path in ("*", ".", ""):
            return list(self.files)
        below = [file for file, own in self._relative.items() if folded(own).startswith(f"{folded(path)}/")]
        if below:
            return below
        if re.search(r"[*?\[]", path):
            wanted = list(_without_repeats(folded(path).split("/")))
            return [file for file, own in self._relative.items() if _fits(wanted, folded(own).split("/"))]
        return self.find(path)

    def leads_out(self, file: Path) -> bool:
        """Whether a file lies elsewhere and is here by a link."""
        return not file.resolve().is_relative_to(self._real_root)

    @property
    def cannot_be_read(self) -> str:
        """A sentence about folders that could not be opened and dead links, or nothing."""
        if not self._unreadable:
            return ""
        others = f" and {len(self._unreadable) - 2} more" if len(self._unreadable) > 2 else ""
        return f"Could not be read: {', '.join(self._unreadable[:2])}{others}."

    def _found(self, folder: Path) -> Iterator[Path]:
        seen: set[str] = set()
        waiting = [folder]
        while waiting:
            # Links wait until the folders that they may lead to have been read by their own names.
            for path, folders, names in os.walk(waiting.pop(0), onerror=self._cannot):
                real = os.path.realpath(path)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                waiting += [Path(path, name) for name in sorted(folders) if os.path.islink(Path(path, name))]
                folders.sort()
                for name in names:
                    suffix = os.path.splitext(name)[1].lower()
                    if suffix == SUFFIX and self._is_file(Path(path, name)):
                        yield Path(path, name)
                    elif suffix in PICKLES:
                        self.pickles.append(Path(path, name))

    def _is_file(self, file: Path) -> bool:
        try:
            return stat.S_ISREG(os.stat(file).st_mode)
        except OSError as problem:
            what = f"{readable(file.name)} is a dead link" if file.is_symlink() else ""
            self._unreadable.append(what or f"{readable(file.name)} ({reason(problem)})")
            return False

    def _cannot(self, problem: OSError) -> None:
        self._unreadable.append(
            f"the folder {readable(Path(problem.filename or '').name)} ({reason(problem)})"
        )

    def _path_in_folder(self, file: Path) -> str:
        return readable(file.relative_to(self.root).with_suffix("").as_posix())


def ambiguous_note(name: str, found: Sequence[Path], folder: LoraFolder) -> str:
    """A sentence if `name` may mean several files, of which the first is used; else nothing."""
    if len({file.resolve() for file in found}) < 2:
        return ""
    names = [folder.name_of(file) for file in found]
    return (
        f"{len(found)} LoRA files are called {name}: {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}. "
        f"{names[0]} was used. To choose another, write its folder before the name."
    )


def folded(text: str) -> str:
    """`text` as names are compared: without capitals, and accented letters as one character."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def readable(path: Path | str) -> str:
    """A path that can be printed: bytes that are not UTF-8 become question marks."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def reason(problem: OSError | ValueError) -> str:
    """The system's reason, in a few words."""
    return (getattr(problem, "strerror", None) or str(problem)).lower()


def _without_repeats(parts: Sequence[str]) -> Iterator[str]:
    """Without a ``**`` after another, which would only be slow."""
    for part, before in zip(parts, ("", *parts), strict=False):
        if not part == before == "**":
            yield part


def _fits(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether folders and name fit a glob's parts; ``**`` fits any number of them."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        if len(wanted) == 1:
            return bool(parts)
        return any(_fits(wanted[1:], parts[start:]) for start in range(len(parts)))
    return bool(parts) and bool(re.match(translate(wanted[0]), parts[0])) and _fits(wanted[1:], parts[1:])
