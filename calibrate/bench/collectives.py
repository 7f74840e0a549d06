"""All-reduce and send/receive between processes: NCCL with a GPU each, gloo where there is none.

The processes live as long as the ``Group``; one that dies ends the calibration with a message, never a wait.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import distributed, multiprocessing

from calibrate.bench.device import DTYPES, Target
from calibrate.bench.family import Family, Part, Point, Runs
from calibrate.bench.shapes import Shard, linear_in
from sim.types import SimulationError

BYTES = (2**12, 2**18, 2**24)
REPEATS = 15
START_S, ANSWER_S = 120.0, 60.0
POLL_S = 0.2


def collective_family(shard: Shard, target: Target, group: Group) -> Family:
    """The operators between the GPUs of a group, by bytes of the message."""

    def prepare(operator: str) -> Callable[[Point], Runs]:
        return lambda point: Runs(
            lambda _: None, timed=lambda limit_s: group.seconds(operator, shard.spec.dtype, point["bytes"], limit_s)
        )

    parts = tuple(
        Part(
            operator=name,
            prepare=prepare(name),
            need_bytes=lambda point: 4 * shard.tp * point["bytes"],
            bytes=linear_in("bytes", 1),
        )
        for name in ("all_reduce", "send_recv")
    )
    axes = {"bytes": BYTES}
    return Family(
        name="collective", tp=shard.tp, dtype=shard.spec.dtype, axes=axes, parts=parts, refined=("bytes",), checks=2
    )


def can_group(target: Target, size: int) -> bool:
    """Whether this machine can run ``size`` ranks: a GPU for each, or any number on the processor."""
    return size > 1 and (not target.cuda or torch.cuda.device_count() >= size)


class Group:
    """``size`` processes that are started at the first question and stopped by ``close``."""

    def __init__(self, size: int, *, cuda: bool) -> None:
        self.size = size
        self.cuda = cuda
        self._workers: list[Any] = []

    def seconds(self, operator: str, dtype: str, size_bytes: int, limit_s: float) -> tuple[float, ...]:
        """Repeats of one operator, as the slowest rank saw each."""
        if not self._workers:
            self._start()
        for orders in self._orders:
            orders.put((operator, dtype, size_bytes, limit_s))
        by_rank = [self._answer(ANSWER_S + limit_s) for _ in range(self.size)]
        return tuple(max(repeat) for repeat in zip(*by_rank, strict=True))

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()
        if self._workers:
            self._folder.cleanup()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="phasewise-")
        self._orders = [context.Queue() for _ in range(self.size)]
        self._answers = context.Queue()
        threads = max(1, torch.get_num_threads() // self.size)
        store = str(Path(self._folder.name) / "store")
        for rank, orders in enumerate(self._orders):
            given = (rank, self.size, store, self.cuda, threads, orders, self._answers)
            self._workers.append(context.Process(target=_work, args=given, daemon=True))
        for worker in self._workers:
            worker.start()
        for _ in range(self.size):
            self._answer(START_S)

    def _answer(self, patience_s: float) -> Any:
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            try:
                return self._answers.get(timeout=POLL_S)
            except Empty:
                dead = [rank for rank, worker in enumerate(self._workers) if not worker.is_alive()]
                if dead:
                    raise SimulationError(
                        f"calibrate: the process of rank {dead[0]} died (exit code "
                        f"{self._workers[dead[0]].exitcode}); the same command goes on, --tp 1 leaves collectives out"
                    ) from None
        raise SimulationError(f"calibrate: {self.size} ranks gave no answer in {patience_s:.0f} s; is a port blocked?")


def _work(rank: int, size: int, store: str, cuda: bool, threads: int, orders: Any, answers: Any) -> None:
    """One rank: answers each order with the seconds of its repeats, until it is terminated."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=ANSWER_S),
    )
    answers.put(())
    while True:
        operator, dtype, size_bytes, limit_s = orders.get()
        try:
            answers.put(_repeats(operator, _buffer(dtype, size_bytes, device), rank, limit_s))
        except RuntimeError as error:
            sys.exit(f"calibrate: rank {rank}: {str(error).splitlines()[0]}")


def _buffer(dtype: str, size_bytes: int, device: torch.device) -> torch.Tensor:
    kind = DTYPES[dtype]
    return torch.zeros(max(1, size_bytes // kind.itemsize), dtype=kind, device=device)


def _repeats(operator: str, x: torch.Tensor, rank: int, limit_s: float) -> list[float]:
    """The first rank sends and the second receives; all begin together."""
    run = {"all_reduce": distributed.all_reduce, "send_recv": _pass_on(rank)}[operator]
    seconds: list[float] = []
    warm_ups = 2
    for number in range(REPEATS + warm_ups):
        distributed.barrier()
        start_s = time.perf_counter()
        run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(max(time.perf_counter() - start_s, 1e-9))
        over = torch.tensor([float(sum(seconds) > limit_s and number >= warm_ups + 2)], device=x.device)
        distributed.all_reduce(over)
        if over.item():
            break
    return seconds[warm_ups:]


def _pass_on(rank: int) -> Callable[[torch.Tensor], None]:
    def run(x: torch.Tensor) -> None:
        if rank == 0:
            distributed.send(x, 1)
        elif rank == 1:
            distributed.recv(x, 0)

    return run
