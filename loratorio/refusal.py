"""How an error of ours leaves a WebUI's sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import LoratorioError

try:
    from fastapi import HTTPException as _Known
except ImportError:  # no WebUI, which has it
    _Known: Any = Exception  # type: ignore[no-redef]


class Refusal(LoratorioError, _Known):  # type: ignore[misc, valid-type]
    """A LoratorioError that the WebUI's API answers with status 422 and the sentence, without a traceback in its log.

    The page shows the class' name before the sentence.
    """

    def __init__(self, sentence: str) -> None:
        Exception.__init__(self, sentence)
        self.status_code, self.detail, self.headers = 422, sentence, None

    def __str__(self) -> str:
        return str(self.detail)


Refusal.__name__ = Refusal.__qualname__ = "LoRAtorio"


@contextmanager
def refusals() -> Iterator[None]:
    """Inside this block, a LoratorioError becomes a `Refusal`."""
    try:
        yield
    except Refusal:
        raise
    except LoratorioError as problem:
        raise Refusal(str(problem)) from None
