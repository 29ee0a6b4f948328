"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoratorioError

if TYPE_CHECKING:
    from PIL import Image


def png(image: Image.Image, infotext: str = "") -> bytes:
    """A PNG, with the infotext where the WebUIs put theirs."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if infotext:
        notes.add_text("parameters", infotext)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=notes)
    return buffer.getvalue()


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write all these files, or none: each first under another name in its folder, and only then all under their own.

    Raises:
        LoratorioError: the disk is full, or a folder cannot be written to. What was there before is there still.
    """
    made_folders: list[Path] = []
    written: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            made_folders += _make_folder(path.parent)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            written[temporary] = path
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in written.items():
            os.replace(temporary, path)
    except BaseException as problem:
        for temporary in written:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in reversed(made_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(problem, OSError):
            raise LoratorioError(_sentence(problem, next(iter(files)).parent)) from problem
        raise


def check_writable(folder: Path) -> None:
    """Raise LoratorioError when nothing can be written into `folder`, before the time for making pictures is spent."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise LoratorioError(f"{nearest} is a file, so {folder} cannot be a folder: choose another --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LoratorioError(f"The folder {nearest} cannot be written to: choose another --out.")


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
