"""How far a picture is: in a terminal, a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int], None]
"""Told (steps done, all steps)."""


@contextmanager
def bar(label: str = "") -> Iterator[Progress]:
    """A progress bar on stderr if that is a terminal, from the first step on, so that errors in the input have no bar."""
    from tqdm import tqdm

    bars: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(
                tqdm(
                    total=total,
                    desc=label or None,
                    unit="step",
                    leave=False,
                    dynamic_ncols=True,
                    disable=None,
                )
            )
        bars[0].update(done - bars[0].n)

    try:
        yield progress
    finally:
        for each in bars:
            each.close()
