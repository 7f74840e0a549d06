"""A job from its command: journal, workers, progress, and what becomes of it when somebody stops it."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.jobs.executor import Jobs
from experiments.jobs.journal import opened
from experiments.jobs.workers import dask, local
from sim.types import ConfigError


class StoppedError(SystemExit):
    """Somebody asked this process to end: it exits with 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """``workers``: processes, None: one per processor. ``dask``: a scheduler's address, or ``local``. ``shard``:
    (i, n): this is part i, from 1, of n."""

    workers: int | None = None
    dask: str | None = None
    shard: tuple[int, int] | None = None
    retry_failed: bool = False


def shard_of(text: str | None) -> tuple[int, int] | None:
    """``2/8``; ``ConfigError`` if it is not such a part."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {text}: give part/parts, such as 2/8, the first from 1 to the second")
    return int(found[1]), int(found[2])


@contextmanager
def jobs(
    folder: Path | None, study: Mapping[str, Any], where: Where, done: Callable[[], None] = lambda: None
) -> Iterator[Jobs]:
    """The executor of a job. ``folder`` keeps its journal, None keeps nothing.

    Whatever ends it, what is finished is on disk, and no worker is left.
    """
    with opened(folder, study) as journal, _workers(where) as workers, _stoppable():
        if where.retry_failed:
            journal.forget_failures()
        executor = Jobs(workers, journal, done)
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            raise
        executor.shutdown()


@contextmanager
def _workers(where: Where) -> Iterator[Any]:
    if where.dask is None:
        yield local(where.workers)
    else:
        with dask(where.dask, where.workers) as workers:
            yield workers


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C alike are ``StoppedError`` in here (in a thread neither can be heard)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
