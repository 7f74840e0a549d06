"""A run as a Chrome trace: open the file at ui.perfetto.dev or in chrome://tracing.

A replica is a process. Its threads are lanes of micro-batches (with a pipeline several are on their way at once, each
in a lane of its own) and lanes of KV going out and coming in; its counters are KV blocks and requests. Arrows lead
from a transfer's start to its end, flags mark faults and changes of plan. Times are microseconds since the start of
the run. Format: "Trace Event Format" of the Chromium project (phases X, C, s, f, i, M).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.runs.rundir import Run
from sim.types import ConfigError

if TYPE_CHECKING:
    import pandas as pd

Event = dict[str, Any]
T = TypeVar("T")

LANES = ("batches", "KV out", "KV in")
THREADS_PER_KIND = 100_000
"""Thread numbers of the first lane of each kind lie this far apart."""
INSIDE_US = 1e-3
"""An arrow ends a nanosecond (the viewer's resolution) before its slice does, so as to belong to it."""


def write_trace(path: Path, run: Run) -> None:
    """Write the trace as JSON, event by event; ``ConfigError`` if the file cannot be written."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(trace_events(run)):
                file.write((",\n" if number else "") + json.dumps(event, allow_nan=False))
            file.write("\n]}\n")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another file") from None
    finally:
        new.unlink(missing_ok=True)


def trace_events(run: Run) -> Iterator[Event]:
    """Names first, then everything in order of time."""
    processes = {name: number for number, name in enumerate(dict.fromkeys(run.replicas["replica"]), start=1)}
    timed = [*_batches(run, processes), *_transfers(run, processes), *_counters(run, processes), *_flags(run)]
    threads = {(event["pid"], event["tid"]) for event in timed if event["ph"] == "X"}
    yield from _names(run, processes, sorted(threads))
    yield from sorted(timed, key=lambda event: event["ts"])


def _batches(run: Run, processes: dict[str, int]) -> Iterator[Event]:
    steps = run.steps.sort_values("start_s", kind="stable")
    for replica, rows in steps.groupby("replica", sort=False):
        for lane, row in in_lanes(_rows(rows), lambda row: (row.start_s, row.end_s)):
            event = {
                "name": _kind(row),
                "cat": "batch",
                "pid": processes[str(replica)],
                "tid": _thread("batches", lane),
            }
            yield _slice(
                event, row.start_s, row.end_s,
                {"iterations": row.iterations, "prompt tokens per iteration": row.prefill_tokens,
                 "decoding requests": row.decode_seqs, "tokens attended to at first": row.decode_context},
            )  # fmt: skip


def _kind(row: Any) -> str:
    if row.prefill_tokens and row.decode_seqs:
        return "mixed"
    return "prefill" if row.prefill_tokens else "decode"


def _transfers(run: Run, processes: dict[str, int]) -> Iterator[Event]:
    """A slice at either end, and the arrow between them."""
    links = run.links.sort_values("start_s", kind="stable").reset_index(drop=True)
    for end, place in (("KV out", "source"), ("KV in", "target")):
        for replica, rows in links.groupby(place, sort=False):
            for lane, row in in_lanes(_rows(rows), lambda row: (row.start_s, row.end_s)):
                event = {"cat": "transfer", "pid": processes[str(replica)], "tid": _thread(end, lane)}
                args = {"bytes": row.bytes, "from": row.source, "to": row.target}
                yield _slice({"name": f"KV of request {row.request}", **event}, row.start_s, row.end_s, args)
                yield _arrow_end({"name": "KV", "id": row.Index + 1, **event}, end, _us(row.start_s), _us(row.end_s))


def _slice(event: Event, start_s: float, end_s: float, args: Event) -> Event:
    start_us = _us(start_s)
    return {"ph": "X", **event, "ts": start_us, "dur": round(_us(end_s) - start_us, 6), "args": args}


def _arrow_end(event: Event, end: str, start_us: float, end_us: float) -> Event:
    if end == "KV out":
        return {"ph": "s", **event, "ts": start_us}
    return {"ph": "f", "bp": "e", **event, "ts": round(max(start_us, end_us - INSIDE_US), 6)}


def _counters(run: Run, processes: dict[str, int]) -> Iterator[Event]:
    for row in _rows(run.memory):
        common = {"ph": "C", "pid": processes[str(row.replica)], "ts": _us(row.time_s)}
        yield {**common, "name": "KV blocks in use", "args": {"blocks": row.used_blocks}}
        yield {**common, "name": "requests waiting", "args": {"requests": row.waiting}}
        yield {**common, "name": "requests running", "args": {"requests": row.running}}


def _flags(run: Run) -> Iterator[Event]:
    for row in _rows(run.notes) if run.notes is not None else ():
        yield {"ph": "i", "s": "g", "name": f"{row.kind}: {row.text}", "cat": "cluster", "pid": 0, "tid": 0,
               "ts": _us(row.time_s)}  # fmt: skip


def _names(run: Run, processes: dict[str, int], threads: Iterable[tuple[int, int]]) -> Iterator[Event]:
    rows = {row.replica: row for row in _rows(run.replicas)}
    for replica, pid in processes.items():
        row = rows[replica]
        pipeline = f" PP{row.pp}" if row.pp > 1 else ""
        text = f"{replica} ({row.role}): {row.gpu} TP{row.tp}{pipeline}"
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": text}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for pid, tid in threads:
        kind, lane = divmod(tid, THREADS_PER_KIND)
        text = LANES[kind] + (f" {lane + 1}" if lane else "")
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": text}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    """With the names of its columns; pandas cannot say their types."""
    return iter(table.itertuples())


def in_lanes(items: Iterable[T], span: Callable[[T], tuple[float, float]]) -> Iterator[tuple[int, T]]:
    """Each item (in order of start) with the lowest lane that is free at its start: those of a lane never overlap."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    lanes = 0
    for item in items:
        start, end = span(item)
        while busy and busy[0][0] <= start:
            heappush(free, heappop(busy)[1])
        if not free:
            free.append(lanes)
            lanes += 1
        lane = heappop(free)
        heappush(busy, (end, lane))
        yield lane, item


def _thread(kind: str, lane: int) -> int:
    return LANES.index(kind) * THREADS_PER_KIND + lane


def _us(seconds: float) -> float:
    """Microseconds, to the engine's picosecond."""
    return round(seconds * 1e6, 6)
