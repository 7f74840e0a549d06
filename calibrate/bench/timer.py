"""Timing: warm-up, poisoned outputs, and repeats until the median stands still or the time is over.

On CUDA many runs are put into one graph and timed by events, so that launches do not count; on the CPU, and where
the processor's time is what counts, by its clock. With a single thread that is the thread's own time, so that what
other programs take is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil, sqrt
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from calibrate.bench.device import Target
from calibrate.bench.family import Measurement, Part, Point, Runs
from sim.types import SimulationError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SAMPLE_S = 200e-6
"""Runs shorter than this are timed several at a time."""
MOST_RUNS = 64
FEWEST_REPEATS, MOST_REPEATS = 3, 25
STEADY = 0.01
"""Standard error of the median, as a share, that ends the repeats."""
MEMORY_SHARE = 0.9

Clock = Callable[[], float]


class BadKernelError(SimulationError):
    """An operator left its output unwritten."""


def measurer(target: Target, limit_s: float) -> Callable[[Part, Point], Measurement]:
    """A function that measures a part at a point, in about ``limit_s`` seconds at most."""

    def measure(part: Part, point: Point) -> Measurement:
        if target.cuda:
            torch.cuda.empty_cache()
        need, free = part.need_bytes(point), target.free_bytes()
        if need > free * MEMORY_SHARE:
            return Measurement((), 0.0, f"needs {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free")
        start_s = time.perf_counter()
        target.begin()
        try:
            with torch.inference_mode():
                seconds = timed(part.prepare(point), target, limit_s)
        except torch.OutOfMemoryError as error:
            return Measurement((), time.perf_counter() - start_s, f"out of memory: {str(error).splitlines()[0]}")
        return Measurement(tuple(float(f"{value:.4g}") for value in seconds), time.perf_counter() - start_s)

    return measure


def timed(runs: Runs, target: Target, limit_s: float) -> tuple[float, ...]:
    """Seconds of one run, once per repeat."""
    if runs.timed is not None:
        return runs.timed(limit_s)
    _warm_up(runs, target)
    if target.cuda and not runs.host:
        return _on_cuda(runs, limit_s)
    sample = _host_sample(runs.run, runs.sets, target)
    return repeated(sample, limit_s)


class Sample(NamedTuple):
    """Seconds of one run, and whether the system gave the processor to others meanwhile."""

    seconds: float
    disturbed: bool = False


def repeated(sample: Callable[[int], Sample], limit_s: float, clock: Clock = time.perf_counter) -> tuple[float, ...]:
    """Repeats of ``sample(runs)``, which runs so many times and gives the seconds of one.

    As many runs a sample as last ``SAMPLE_S``. Ends when the median stands still, after ``MOST_REPEATS``, or, with
    ``FEWEST_REPEATS`` done, when ``limit_s`` seconds are over. Disturbed repeats count only where there are
    fewer than ``FEWEST_REPEATS`` others.
    """
    start_s = clock()
    runs = max(1, min(MOST_RUNS, ceil(SAMPLE_S / max(sample(1).seconds, 1e-9))))
    taken: list[Sample] = []
    calm: list[float] = []
    while len(taken) < 2 * MOST_REPEATS and len(calm) < MOST_REPEATS:
        taken.append(sample(runs))
        calm += [] if taken[-1].disturbed else [taken[-1].seconds]
        if len(taken) >= FEWEST_REPEATS and clock() - start_s > limit_s:
            break
        if len(calm) >= 2 * FEWEST_REPEATS and _standard_error(calm) < STEADY:
            break
    return tuple(calm) if len(calm) >= FEWEST_REPEATS else tuple(one.seconds for one in taken)


def _standard_error(repeats: list[float]) -> float:
    """Of the median, as a share of it, from the interquartile range (1.35 deviations of a normal law)."""
    low, _, high = quantiles(repeats, n=4, method="inclusive")
    return 1.2533 * (high - low) / 1.349 / sqrt(len(repeats)) / median(repeats)


def _warm_up(runs: Runs, target: Target) -> None:
    """Two runs; each must write all of its outputs, which hold NaN before."""
    for output in runs.outputs:
        output.fill_(float("nan"))
    for number in range(2):
        written = runs.run(number % runs.sets)
        for tensor in written if isinstance(written, tuple) else (written,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise BadKernelError("an operator left values unwritten or not finite; its time means nothing")
    if target.cuda:
        torch.cuda.synchronize()


def _host_sample(run: Callable[[int], Any], sets: int, target: Target) -> Callable[[int], Sample]:
    clock = time.thread_time if not target.cuda and torch.get_num_threads() == 1 else time.perf_counter
    turn = 0

    def sample(count: int) -> Sample:
        nonlocal turn
        switches, start_s = _switches(), clock()
        for _ in range(count):
            run(turn)
            turn = (turn + 1) % sets
        elapsed_s, disturbed = clock() - start_s, _switches() > switches
        if target.cuda:
            torch.cuda.synchronize()
        return Sample(elapsed_s / count, disturbed)

    return sample


def _switches() -> int:
    """How often the system took a processor away from a thread of ours; 0 where it does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _on_cuda(runs: Runs, limit_s: float) -> tuple[float, ...]:
    graphs: dict[int, Any] = {}

    def sample(count: int) -> Sample:
        if runs.capturable and count not in graphs:
            graphs[count] = _captured(runs, count)
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        if runs.capturable:
            graphs[count].replay()
        else:
            for number in range(count):
                runs.run(number % runs.sets)
        end.record()
        end.synchronize()
        return Sample(float(start.elapsed_time(end)) / 1000 / count)

    return repeated(sample, limit_s)


def _captured(runs: Runs, count: int) -> Any:
    """A CUDA graph of so many runs; one replay uploads it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            runs.run(number % runs.sets)
    graph.replay()
    torch.cuda.synchronize()
    return graph
