"""Where points are run: in this process, in processes that end with it, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sim.types import ConfigError

WATCH_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """``fresh`` makes an executor that runs ``count`` points at a time; one that broke is replaced by another.

    ``alive``: whether there is still somebody to ask.
    """

    count: int
    fresh: Callable[[], Executor]
    alive: Callable[[], bool] = lambda: True


class Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **more))
        except Exception as error:
            future.set_exception(error)
        return future


def process_pool(workers: int | None) -> ProcessPoolExecutor:
    """Fresh interpreters, so that a job behaves alike on every system; ``None``: one per processor.

    A worker ends when this process does, however it ends.
    """
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
    )


def local(workers: int | None) -> Workers:
    """In processes; with one worker in this one."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or here
    return Workers(count=1, fresh=Here) if count == 1 else Workers(count=count, fresh=lambda: process_pool(count))


@contextmanager
def dask(address: str, workers: int | None) -> Iterator[Workers]:
    """A Dask cluster: the address of its scheduler, or ``local`` to start worker processes on this machine.

    ``ConfigError`` without Dask, or if no scheduler answers.
    """
    try:
        import distributed
    except ImportError:
        raise ConfigError("--dask: dask is not installed; pip install 'phasewise[cluster]'") from None
    library: Any = distributed  # its classes have no types
    try:
        if address == "local":
            count = workers or os.cpu_count() or 1
            cluster = library.LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None,
                                   host="127.0.0.1", silence_logs=50)  # fmt: skip
            client = library.Client(cluster)
        else:
            cluster = None
            client = library.Client(address, timeout="10s", set_as_default=False)
            count = workers or max(1, sum(client.nthreads().values()))
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(f"--dask {address}: no scheduler answers there ({str(error).splitlines()[0]})") from None
    try:
        yield Workers(
            count=count,
            fresh=lambda: client.get_executor(pure=False),
            alive=lambda: client.status == "running",
        )
    finally:
        client.close(timeout=2)
        if cluster is not None:
            cluster.close(timeout=5)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone; Ctrl-C is the parent's to hear."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)
