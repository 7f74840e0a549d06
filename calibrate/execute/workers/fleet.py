"""The worker processes of a run: started, listened to, and ended, whatever happens.

A worker that dies, hangs up or falls silent raises ``WorkerLostError``. Workers exit by themselves when this process is
gone, so that none is ever left behind.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from calibrate.execute.workers.process import TOKEN
from calibrate.execute.workers.wire import receive, send
from sim.types import ConfigError, SimulationError

START_S = 120.0
SILENT_S = 10.0
"""A worker says every half second that it is alive; after so long without a word it counts as lost."""
STOP_S = 3.0


class WorkerLostError(SimulationError):
    """A worker process died, failed or fell silent; the message says which, and what is known of why."""


class Word(NamedTuple):
    """What a worker said, and when (``time.perf_counter``)."""

    worker: str
    at_s: float
    header: dict[str, Any]


class Fleet:
    """One process per stage, by stage name. Use as a context: leaving it ends them all."""

    def __init__(self, configs: Mapping[str, dict[str, Any]]) -> None:
        self._configs = configs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._words: SimpleQueue[Word] = SimpleQueue()
        self._heard_s: dict[str, float] = {}
        self.ports: dict[str, int] = {}

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def say(self, worker: str, header: dict[str, Any]) -> None:
        try:
            send(self._sockets[worker], header)
        except OSError:
            raise self._lost(worker, "hung up") from None

    def hear(self, timeout_s: float) -> Word | None:
        """The next word other than a sign of life; None after the timeout.

        Raises ``WorkerLostError``, or the ``ConfigError`` that a worker met.
        """
        ends_s = time.perf_counter() + timeout_s
        while True:
            left_s = max(0.0, min(SILENT_S / 4, ends_s - time.perf_counter()))
            try:
                word = self._words.get(timeout=left_s) if left_s else self._words.get_nowait()
            except Empty:
                self._check_silence()
                if time.perf_counter() >= ends_s:
                    return None
                continue
            self._heard_s[word.worker] = word.at_s
            if word.header["is"] in ("gone", "failed"):
                raise self._failure(word)
            if word.header["is"] != "alive":
                return word

    def close(self) -> None:
        """Ask every worker to stop; kill those that do not."""
        for worker_socket in self._sockets.values():
            try:
                send(worker_socket, {"do": "stop"})
                worker_socket.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # it is gone already
        ends_s = time.perf_counter() + STOP_S
        for process in self._processes.values():
            try:
                process.wait(timeout=max(0.0, ends_s - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for worker_socket in self._sockets.values():
            worker_socket.close()
        self._sockets.clear()

    # ------------------------------------------------------------ inside

    def _start(self) -> None:
        token = secrets.token_hex(16)
        with socket.create_server(("127.0.0.1", 0)) as door:
            door.settimeout(0.2)
            for name in self._configs:
                self._start_one(name, token, door.getsockname()[1])
            while len(self._sockets) < len(self._configs):
                self._let_in(token, door)
        for _ in self._configs:
            word = self.hear(START_S)
            if word is None:
                silent = ", ".join(name for name in self._configs if name not in self.ports)
                raise WorkerLostError(f"workers {silent} were not ready after {START_S:.0f} s")
            self.ports[word.worker] = word.header["port"]

    def _start_one(self, name: str, token: str, port: int) -> None:
        command = [sys.executable, "-m", "calibrate.execute.workers.process", str(port), name]
        self._processes[name] = subprocess.Popen(
            command, env=os.environ | {TOKEN: token}, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._heard_s[name] = time.perf_counter() + START_S

    def _let_in(self, token: str, door: socket.socket) -> None:
        """The next process that knows the word gets its stage."""
        try:
            found, _ = door.accept()
        except TimeoutError:
            for name, process in self._processes.items():
                if process.poll() is not None and name not in self._sockets:
                    raise self._lost(name, "ended before it said a word") from None
            self._check_silence()
            return
        found.settimeout(START_S)
        try:
            header, _ = receive(found)
        except (EOFError, OSError, ValueError):
            header = {}  # somebody else's business
        name = str(header.get("name"))
        if header.get("token") != token or name not in self._configs or name in self._sockets:
            found.close()
            return
        found.settimeout(None)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[name] = found
        send(found, self._configs[name])
        threading.Thread(target=self._listen, args=(name, found), daemon=True).start()

    def _listen(self, name: str, source: socket.socket) -> None:
        while True:
            try:
                header, _ = receive(source)
            except (EOFError, OSError, ValueError):
                self._words.put(Word(name, time.perf_counter(), {"is": "gone"}))
                return
            self._words.put(Word(name, time.perf_counter(), header))

    def _check_silence(self) -> None:
        now_s = time.perf_counter()
        for name, at_s in self._heard_s.items():
            if now_s - at_s > SILENT_S:
                raise self._lost(name, f"has been silent for {now_s - at_s:.0f} s")

    def _failure(self, word: Word) -> SimulationError:
        if word.header["is"] == "gone":
            return self._lost(word.worker, "is gone")
        if word.header["kind"] == "ConfigError":
            return ConfigError(f"worker {word.worker}: {word.header['text']}")
        killed = self._killed()
        if killed is not None and killed != word.worker:
            return self._lost(killed, "is gone")  # that is why this one failed
        return WorkerLostError(f"worker {word.worker} failed: {word.header['text']}")

    def _killed(self) -> str | None:
        """A worker that ended without a word, now or very soon: those that fail exit with 1, once they have said so."""
        for _ in range(10):
            for name, process in self._processes.items():
                if process.poll() not in (None, 1):
                    return name
            time.sleep(0.02)
        return None

    def _lost(self, name: str, what: str) -> WorkerLostError:
        process = self._processes[name]
        try:
            status = f"exit status {process.wait(timeout=1)}"
        except subprocess.TimeoutExpired:
            status = "still running"
        others = ", ".join(other for other in self._processes if other != name) or "none"
        return WorkerLostError(
            f"worker {name} {what} (process {process.pid}, {status}); the others ({others}) are stopped"
        )


def cores_for(names: Iterable[str]) -> dict[str, int]:
    """One of this process's processor cores for each worker, in turn."""
    cores = sorted(os.sched_getaffinity(0))
    return {name: cores[number % len(cores)] for number, name in enumerate(names)}
