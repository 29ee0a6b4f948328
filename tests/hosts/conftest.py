"""The stand-in of tests/standin/a1111 as fixtures."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.hosts.shared import sampling_pass

STANDIN = Path(__file__).parent.parent / "standin" / "a1111"


@pytest.fixture(scope="module")
def a1111() -> Iterator[Any]:
    """The stand-in's modules, importable as the WebUI's are, for this file only."""
    before = set(sys.modules)
    sys.path.insert(0, str(STANDIN))
    try:
        import networks
        import run
        from modules import processing, script_callbacks, sd_hijack, shared

        yield SimpleNamespace(
            run=run,
            shared=shared,
            networks=networks,
            processing=processing,
            callbacks=script_callbacks,
            hijack=sd_hijack.model_hijack,
        )
    finally:
        sys.path.remove(str(STANDIN))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("modules", "network", "networks", "run"):
                del sys.modules[name]


@pytest.fixture
def standin(a1111: Any) -> Any:
    return a1111.run.Standin()


@pytest.fixture
def left_over(monkeypatch: Any) -> Iterator[Callable[[], int]]:
    """How many of the LoRAs that were read, and of what holds them in a pass, are in memory. Python doesn't look for rings meanwhile."""
    made: list[weakref.ref[Any]] = []

    class Watched(Bank):
        def __init__(self, adapters: Sequence[Adapter]) -> None:
            super().__init__(adapters)
            made.extend(map(weakref.ref, (self, *adapters)))

    def count() -> int:
        assert made
        return sum(each() is not None for each in made)

    monkeypatch.setattr(sampling_pass, "Bank", Watched)
    gc.collect()
    gc.disable()
    yield count
    gc.enable()


def assert_encoded_once(monkeypatch: Any, parser: Any, make: Callable[[int], Any]) -> None:
    """make: samples that many batches of one prompt. Its text is encoded once, for all of them and for the next job."""
    from loratorio.hosts import forget

    encoded: list[Any] = []
    original = parser.get_learned_conditioning

    def counted(*args: Any, **kwargs: Any) -> Any:
        encoded.append(args[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(parser, "get_learned_conditioning", counted)

    def encodings(count: int) -> int:
        encoded.clear()
        make(count)
        return len(encoded)

    encodings(1)  # now the WebUI has encoded its own
    forget()
    once = encodings(1)
    assert once > 0
    assert encodings(2) == 0
    forget()
    assert encodings(3) == once
    forget()
