"""``Jobs``: an executor whose answers are kept, and which asks again what a lost worker took with it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from experiments.jobs.content import key_of
from experiments.jobs.journal import JobLostError, Journal
from experiments.jobs.workers import Workers
from sim.types import ConfigError, InfeasibleError

LOSSES = 3
"""A point whose worker is lost so many times has failed."""
INFEASIBLE = "infeasible: "
"""Begins the reason where a planner found nothing, which is an answer rather than a fault."""


class PointError(ConfigError):
    """A point has no answer; the text says why."""


@dataclass(eq=False)
class _Task:
    key: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    futures: list[Future[Any]] = field(default_factory=list)
    """More than one if the same point was asked for again while it ran."""
    alone: bool = False
    losses: int = 0


class Jobs(Executor):
    """Calls are functions, or frozen objects, that a worker can import; arguments have content (``content.plain``);
    answers are JSON data.

    A call that raises gives a future with ``InfeasibleError`` if it did, else ``PointError``; both are journaled. When
    a worker is lost, the points that were running are asked again, one at a time, so that one that ends its worker is
    told from those beside it.
    """

    def __init__(
        self, workers: Workers, journal: Journal | None = None, done: Callable[[], None] = lambda: None
    ) -> None:
        self._workers = workers
        self._journal = journal or Journal({})
        self._done = done
        self._inner = workers.fresh()
        self._waiting: deque[_Task] = deque()
        self._suspects: deque[_Task] = deque()
        self._running: dict[Future[Any], _Task] = {}
        self._tasks: dict[str, _Task] = {}
        self._closed = False
        self._lock = threading.RLock()

    def submit(self, call: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        if more:
            raise TypeError("a job takes its arguments by place")
        future: Future[Any] = Future()
        key = key_of(call, *args)
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            known = self._journal.get(key)
            if known is None and key in self._tasks:
                self._tasks[key].futures.append(future)
            elif known is None:
                self._tasks[key] = task = _Task(key, call, args, [future])
                self._waiting.append(task)
        if known is not None:
            _settle(future, known.answer, known.failed)
            self._done()
        self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """``cancel_futures``: begin nothing new. What is running is waited for only with ``wait``."""
        with self._lock:
            self._closed = True
            dropped = [*self._waiting, *self._suspects] if cancel_futures else []
            for task in dropped:
                self._tasks.pop(task.key, None)
            if cancel_futures:
                self._waiting.clear()
                self._suspects.clear()
            left = [future for task in self._tasks.values() for future in task.futures]
        for task in dropped:
            for future in task.futures:
                future.cancel()
        if wait:
            for future in left:
                if not future.cancelled():
                    future.exception()
        for inner in list(self._running) if cancel_futures else ():
            inner.cancel()
        self._inner.shutdown(wait=wait)

    # ------------------------------------------------------------ inside

    def _start(self) -> None:
        """Hand out points while there are workers; suspects go alone."""
        while True:
            with self._lock:
                queue = self._suspects or self._waiting
                most = 1 if self._suspects else self._workers.count
                if not queue or len(self._running) >= most or (self._suspects and self._running):
                    return
                task = queue.popleft()
                task.alone = most == 1
                try:
                    inner = self._inner.submit(task.call, *task.arguments)
                except (BrokenExecutor, RuntimeError):  # a worker was lost while it had nothing to do
                    self._inner = self._workers.fresh()
                    inner = self._inner.submit(task.call, *task.arguments)
                self._running[inner] = task
            inner.add_done_callback(self._ended)

    def _ended(self, inner: Future[Any]) -> None:
        with self._lock:
            task = self._running.pop(inner, None)
            if task is None:
                return
            error = CancelledError() if inner.cancelled() else inner.exception()
            if isinstance(error, BrokenExecutor | CancelledError):
                self._lost(task)
            else:
                self._finish(task, None if error else inner.result(), error)
        self._start()

    def _lost(self, task: _Task) -> None:
        """Its worker is gone, and with a process pool all that ran beside it."""
        if self._closed:
            for future in task.futures:
                future.cancel()
            return
        if not self._workers.alive():
            self._give_up(task)
            return
        task.losses += task.alone
        if task.losses >= LOSSES:
            self._finish(task, None, PointError(f"its worker was lost {LOSSES} times: out of memory, or killed"))
        else:
            self._suspects.append(task)

    def _give_up(self, task: _Task) -> None:
        """No scheduler, no answers: nothing of it is journaled."""
        error = JobLostError("the scheduler is gone; what was finished is kept: run the same command again")
        for lost in (task, *self._waiting, *self._suspects):
            self._tasks.pop(lost.key, None)
            for future in lost.futures:
                future.set_exception(error)
        self._waiting.clear()
        self._suspects.clear()

    def _finish(self, task: _Task, answer: Any, error: BaseException | None) -> None:
        failed = None if error is None else _reason(error)
        self._tasks.pop(task.key, None)
        lost: JobLostError | None = None
        try:
            self._journal.add(task.key, answer, failed)
        except JobLostError as full:
            lost = full
        for future in task.futures:
            if lost is not None:
                future.set_exception(lost)
            else:
                _settle(future, answer, failed)
            self._done()


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":  # of Dask, after several tries
        return "its worker was lost several times: out of memory, or killed"
    if isinstance(error, ConfigError):
        return f"{INFEASIBLE if isinstance(error, InfeasibleError) else ''}{error}"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def _settle(future: Future[Any], answer: Any, failed: str | None) -> None:
    try:
        if failed is None:
            future.set_result(answer)
        elif failed.startswith(INFEASIBLE):
            future.set_exception(InfeasibleError(failed.removeprefix(INFEASIBLE)))
        else:
            future.set_exception(PointError(failed))
    except InvalidStateError:
        return  # it was cancelled meanwhile
