"""Does the missing cells of a grid: here, in several processes, or on Ray."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratorio.errors import LoratorioError

from .backend import Backend, do_cell, make_backend
from .plan import Cell
from .store import Store

Tell = Callable[[int, int, Cell], None]
"""Told (cells done, cells in all, the last one)."""

_studios: dict[str, Backend] = {}


def run(
    cells: Sequence[Cell],
    store: Store,
    backend: str,
    workers: int = 1,
    ray_address: str | None = None,
    until: float | None = None,
    tell: Tell = lambda done, total, cell: None,
) -> int:
    """Make the cells that the store lacks.

    Args:
        backend: ``module:function`` that makes the backend, once per worker.
        workers: how many cells are done at once.
        ray_address: ``local`` starts Ray on this machine; ``auto`` or an address joins a cluster; None uses no Ray.
        until: time (`time.monotonic`) after which no new cell is begun.

    Returns:
        How many cells were done now.
    """
    todo = store.missing(cells)
    total, before = len(cells), len(cells) - len(todo)
    if ray_address is not None:
        finished = _on_ray(todo, store.folder, backend, workers, ray_address, until)
    elif workers > 1:
        finished = _in_processes(todo, store.folder, backend, workers, until)
    else:
        finished = _here(todo, store.folder, backend, until)
    count = 0
    for cell in finished:
        count += 1
        tell(before + count, total, cell)
    return count


def work(cell: Cell, folder: Path, backend: str) -> Cell:
    """One cell, in any process; an existing result is kept."""
    store = Store(folder)
    if not store.has(cell):
        if backend not in _studios:
            _studios[backend] = make_backend(backend)
        store.write(do_cell(_studios[backend], cell))
    return cell


def _late(until: float | None) -> bool:
    return until is not None and time.monotonic() > until


def _here(todo: Sequence[Cell], folder: Path, backend: str, until: float | None) -> Iterator[Cell]:
    for cell in todo:
        if _late(until):
            return
        yield work(cell, folder, backend)


def _in_processes(
    todo: Sequence[Cell], folder: Path, backend: str, workers: int, until: float | None
) -> Iterator[Cell]:
    context = multiprocessing.get_context("spawn")
    with (
        _threads(max(1, (os.cpu_count() or 1) // workers)),
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        queue = iter(todo)
        running = {pool.submit(work, cell, folder, backend) for cell in itertools.islice(queue, workers)}
        while running:
            done = next(as_completed(running))
            running.remove(done)
            following = None if _late(until) else next(queue, None)
            if following is not None:
                running.add(pool.submit(work, following, folder, backend))
            yield done.result()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside this block, new processes compute with `count` threads, unless the user has set a number."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


def _on_ray(
    todo: Sequence[Cell], folder: Path, backend: str, workers: int, address: str, until: float | None
) -> Iterator[Cell]:
    """On Ray. A cell whose worker dies is given to another one; results go to `folder`, which all workers must see."""
    if importlib.util.find_spec("ray") is None:
        raise LoratorioError("--ray needs Ray: pip install 'loratorio[lab]'.")
    import ray

    folder = folder.resolve()
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"num_cpus": workers} if address == "local" else {"address": address}
        ray.init(include_dashboard=False, log_to_driver=False, **options)
    try:
        remote: Any = ray.remote(num_cpus=1, max_retries=5, retry_exceptions=False)(work)
        queue = iter(todo)
        running = [remote.remote(cell, folder, backend) for cell in itertools.islice(queue, workers)]
        while running:
            done, running = ray.wait(running, num_returns=1)
            following = None if _late(until) else next(queue, None)
            if following is not None:
                running.append(remote.remote(following, folder, backend))
            yield ray.get(done[0])
    finally:
        if mine:
            ray.shutdown()
