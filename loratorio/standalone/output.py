"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import LoratorioError
from ..prompt.lora_folder import folded, reason

if TYPE_CHECKING:
    from PIL import Image


Name = TypeVar("Name")

LONGEST_NAME = 255
"""Bytes of a file's name on the usual systems."""


def png(image: Image.Image, infotext: str = "") -> bytes:
    """A PNG, with the infotext where the WebUIs put theirs."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if infotext:
        notes.add_text("parameters", infotext)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def write_all(files: Mapping[Path, bytes], replacing: bool = True) -> None:
    """Write all these files, or none: each first under another name in its folder, and only then all under their own.

    Raises:
        FileExistsError: not `replacing`, and one is there already, perhaps since a moment. Nothing was written.
        LoratorioError: the disk is full, or a folder cannot be written to. What was there before is there still.
    """
    made_folders: list[Path] = []
    # Whatever is about to be made is noted first: an interrupt may come after any of these lines.
    written: list[tuple[Path, Path]] = []
    placed: list[tuple[Path, Path | None]] = []
    try:
        for number, (path, content) in enumerate(files.items()):
            made_folders += _make_folder(path.parent)
            temporary = _beside(path, number, "tmp")
            written.append((temporary, path))
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for number, (temporary, path) in enumerate(written):
            _place(temporary, path, _beside(path, number, "old") if replacing else None, placed)
    except BaseException as problem:
        for path, older in reversed(placed):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True) if older is None else os.replace(older, path)
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in reversed(made_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(problem, OSError) and not isinstance(problem, FileExistsError):
            raise LoratorioError(_sentence(problem, next(iter(files)).parent)) from problem
        raise
    for _, older in placed:
        if older is not None:
            with contextlib.suppress(OSError):
                older.unlink(missing_ok=True)


def write_numbered(out: Path, make: Callable[[int], Mapping[Path, bytes]]) -> list[Path]:
    """Write the files that `make` gives for the next free number in the folder `out`, so that no older picture is lost.

    Others may write there at the same time: whoever comes second takes the next number.

    Raises:
        LoratorioError: as `write_all`.
    """
    return _write_first_free(make, count(_next_number(out)))


def write_beside(out: Path, make: Callable[[Path], Mapping[Path, bytes]]) -> list[Path]:
    """Write the files that `make` gives for `out`, a file or a folder; where one of them is there already, for ``out-2``, ``out-3``, ….

    Raises:
        LoratorioError: as `write_all`.
    """
    if not is_picture(out):
        out = out.absolute()
    stem, suffix = (out.stem, out.suffix) if is_picture(out) else (out.name, "")
    return _write_first_free(make, chain([out], (out.with_name(f"{stem}-{n}{suffix}") for n in count(2))))


def _write_first_free(make: Callable[[Name], Mapping[Path, bytes]], names: Iterable[Name]) -> list[Path]:
    for name in names:
        files = make(name)
        with contextlib.suppress(FileExistsError):
            write_all(files, replacing=False)
            return list(files)
    raise AssertionError("names never end")


def file_labels(names: Sequence[str], room: int, taken: Sequence[str] = ()) -> list[str]:
    """Each name as a part of a file's name: what no system allows there replaced, at most `room` bytes, no two alike nor as `taken`."""
    known = {folded(each) for each in taken}
    labels: list[str] = []
    for name in names:
        plain = re.sub(r"[\x00-\x1f\x7f/\\:*?\"<>|]", "-", name)
        number = 1
        label = _shortened(plain, room)
        while folded(label) in known:
            number += 1
            label = _shortened(plain, room - len(f"-{number}")) + f"-{number}"
        known.add(folded(label))
        labels.append(label)
    return labels


def check_writable(out: Path) -> None:
    """Raise LoratorioError when nothing can be written to `out`, a folder or a .png file, before the time for making pictures is spent."""
    folder = out.parent if is_picture(out) else out
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(out)
        if out.is_dir() and is_picture(out):
            raise LoratorioError(f"{out} is a folder, so it cannot be a picture: choose another --out.")
        nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not nearest.is_dir():
            raise LoratorioError(
                f"{nearest} is a file, so {folder} cannot be a folder: choose another --out."
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise LoratorioError(f"The folder {nearest} cannot be written to: choose another --out.")
    except (OSError, ValueError) as problem:
        if isinstance(problem, NotADirectoryError):
            raise LoratorioError(
                f"{folder} leads through a file, not a folder: choose another --out."
            ) from None
        raise LoratorioError(
            f"{str(out)[:80]} cannot be written to ({reason(problem)}): choose another --out."
        ) from None


def is_picture(out: Path) -> bool:
    """Whether `out` names a file and no folder."""
    return out.suffix.lower() == ".png"


def _next_number(folder: Path) -> int:
    taken = (
        [file.name[:5] for file in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")] if folder.is_dir() else []
    )
    return max((int(number) for number in taken), default=-1) + 1


def _beside(path: Path, number: int, ending: str) -> Path:
    """A short name, as the file's own may be as long as names can be."""
    return path.with_name(f".loratorio-{os.getpid()}-{threading.get_ident()}-{number}.{ending}")


def _place(temporary: Path, path: Path, older: Path | None, placed: list[tuple[Path, Path | None]]) -> None:
    """Give a written file its name. `older`: where to keep what has that name; None: nothing may have it."""
    if older is None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        placed.append((path, None))
    elif path.exists():
        placed.append((path, older))
        os.replace(path, older)
    else:
        placed.append((path, None))
    os.replace(temporary, path)


def _shortened(text: str, room: int) -> str:
    """At most `room` bytes of it."""
    return text.encode("utf-8", "replace")[:room].decode("utf-8", "ignore")


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it; those made, the outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _sentence(problem: OSError, folder: Path) -> str:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(folder if folder.exists() else folder.parent).free // 1024} KiB are left)"
        return f"The disk that {folder} is on is full{free}. Nothing was written: make room, or choose another --out."
    return f"{folder} cannot be written to: {problem.strerror or problem}. Choose another --out."
