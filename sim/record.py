"""What a run leaves behind: rows written by the engine, and the ``Result`` that shows them as tables.

Rows hold integers (picoseconds, counts); seconds appear in the tables. pandas is imported only when a table
is asked for. A request's every token time can be recovered: its ``tokens`` are emission instants and
intervals of cohort iterations, and each cohort's segments say when its iterations ended.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.types import PS_PER_S, Outcome, Request

if TYPE_CHECKING:
    import pandas as pd

MEASURED_COLUMNS = (
    "request", "arrival_s", "input_tokens", "output_tokens", "outcome", "reason", "intake_s", "queue_s", "prefill_s",
    "transfer_s", "decode_s", "ttft_s", "tpot_s", "e2e_s", "preemptions", "cached_tokens", "bytes_moved",
    "prefill_stage", "decode_stage", "klass",
)  # fmt: skip
TRACE_COLUMNS = ("session", "priority", "samples", "beam_search", "prefix", "prefix_block_tokens")
"""What a replay needs beside arrival, lengths and class; prefix hashes are text, as in a trace file."""
REQUEST_COLUMNS = (*MEASURED_COLUMNS, *TRACE_COLUMNS)

LAST_INT64 = 2**63 - 1

ON_THE_WAY = " > "
"""Between the nodes of a path, in the columns of a request's places."""


CohortId = tuple[int, int]
"""Running numbers of the replica, and of the cohort on it."""
Segment = tuple[int, int, int, int, int]
"""Cohort iteration it starts at, start ps, iterations, first duration ps, slope ps per iteration."""


class RequestRow(NamedTuple):
    """One request's life; times in ps since the start, ``None`` where it did not get so far."""

    request: Request
    outcome: Outcome
    reason: str
    scheduled_ps: int | None
    first_token_ps: int | None
    prefill_end_ps: int | None
    transfer_ps: int
    finish_ps: int | None
    tokens: tuple[int | tuple[CohortId, int, int], ...]
    """Emission instants, or (cohort, from iteration, to iteration)."""
    preemptions: int
    cached_tokens: int
    bytes_moved: int
    prefill_stage: str
    decode_stage: str
    queued_ps: int | None = None
    """When a scheduler first knew of it: at arrival, or at the next boundary if an iteration ran then (vLLM's
    ``queued_ts``)."""


class StepRow(NamedTuple):
    """Equal iterations of one micro-batch on one replica."""

    replica: str
    start_ps: int
    end_ps: int
    iterations: int
    prefill_tokens: int
    decode_seqs: int
    decode_context: int


class LinkRow(NamedTuple):
    request: int
    source: str
    target: str
    bytes: int
    start_ps: int
    end_ps: int


class MemoryRow(NamedTuple):
    replica: str
    time_ps: int
    used_blocks: int
    total_blocks: int
    waiting: int
    running: int


class ReplicaRow(NamedTuple):
    replica: str
    role: str
    gpus: str
    gpu: str
    tp: int
    pp: int
    total_blocks: int
    busy_s: float
    stage_busy_s: tuple[float, ...]
    measured: bool
    stage_tp: tuple[int, ...]
    """GPUs of each stage: ``gpus`` names them in order of the stages."""
    up_s: float
    down_s: float | None
    """None: up until the end."""


class NoteRow(NamedTuple):
    """A fault, a change of plan, a replica that came up or went away."""

    time_ps: int
    kind: str
    text: str


@dataclass(kw_only=True)
class Recorder:
    """Collects rows while the engine runs; links, steps and memory, written most, become rows when read."""

    requests: list[RequestRow] = field(default_factory=list)
    link_fields: list[tuple[Any, ...]] = field(default_factory=list)
    step_fields: list[tuple[Any, ...]] = field(default_factory=list)
    memory_fields: list[tuple[Any, ...]] = field(default_factory=list)
    replicas: list[ReplicaRow] = field(default_factory=list)
    notes: list[NoteRow] = field(default_factory=list)
    segments: dict[CohortId, Sequence[Segment]] = field(default_factory=dict)

    @property
    def links(self) -> list[LinkRow]:
        return list(map(LinkRow._make, self.link_fields))

    @property
    def steps(self) -> list[StepRow]:
        return list(map(StepRow._make, self.step_fields))

    @property
    def memory(self) -> list[MemoryRow]:
        return list(map(MemoryRow._make, self.memory_fields))


class Result:
    """A finished run. Tables are built on demand and cached."""

    def __init__(
        self, rows: Recorder, *, system: str, mirrors: str, events: int, wall_s: float, extrapolated_share: float
    ) -> None:
        rows.requests.sort(key=attrgetter("request.id"))
        self.rows = rows
        self.system = system
        self.mirrors = mirrors
        self.events = events
        self.wall_s = wall_s
        self.extrapolated_share = extrapolated_share

    @property
    def segments(self) -> int:
        """Collapsed runs of iterations."""
        return len(self.rows.step_fields)

    @property
    def iterations(self) -> int:
        return sum(fields[3] for fields in self.rows.step_fields)

    @cached_property
    def makespan_s(self) -> float:
        """First arrival to last completion; 0 if nothing completed."""
        ends = [row.finish_ps for row in self.rows.requests if row.outcome == "completed" and row.finish_ps is not None]
        starts = [row.request.arrival_s for row in self.rows.requests]
        return max(ends) / PS_PER_S - min(starts) if ends else 0.0

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """One array per measured column, in order of request id; NaN where undefined."""
        rows = self.rows.requests
        requests = [row.request for row in rows]
        arrival = _array(requests, "arrival_s", float)
        arrived = np.rint(arrival * PS_PER_S) / PS_PER_S  # as the engine's clock has it
        output = _array(requests, "output_tokens", np.int64)
        transfer, finish = _array(rows, "transfer_ps", float) / PS_PER_S, _array(rows, "finish_ps", float) / PS_PER_S
        names = ("queued_ps", "scheduled_ps", "first_token_ps", "prefill_end_ps")
        queued, scheduled, first, prefilled = (_array(rows, name, float) / PS_PER_S for name in names)
        with np.errstate(invalid="ignore", divide="ignore"):
            tpot = np.where(output > 1, (finish - first) / (output - 1), np.nan)
        values: tuple[Any, ...] = (
            _array(requests, "id", np.int64),
            arrival,
            _array(requests, "input_tokens", np.int64),
            output,
            _array(rows, "outcome", object),
            _array(rows, "reason", object),
            queued - arrived,
            scheduled - arrived,
            prefilled - scheduled,
            transfer,
            finish - prefilled - transfer,
            first - arrived,
            tpot,
            finish - arrived,
            _array(rows, "preemptions", np.int64),
            _array(rows, "cached_tokens", np.int64),
            _array(rows, "bytes_moved", np.int64),
            _array(rows, "prefill_stage", object),
            _array(rows, "decode_stage", object),
            _array(requests, "klass", object),
        )
        return dict(zip(MEASURED_COLUMNS, values, strict=True))

    @cached_property
    def requests(self) -> pd.DataFrame:
        import pandas as pd

        requests = [row.request for row in self.rows.requests]
        trace: dict[str, Any] = {name: list(map(attrgetter(name), requests)) for name in TRACE_COLUMNS}
        trace["prefix"] = [" ".join(map(str, prefix)) or None for prefix in trace["prefix"]]
        trace["prefix_block_tokens"] = pd.array(trace["prefix_block_tokens"], dtype="Int64")
        return pd.DataFrame({**self.columns, **trace})

    @cached_property
    def steps(self) -> pd.DataFrame:
        return _table(self.rows.steps, StepRow._fields)

    @cached_property
    def links(self) -> pd.DataFrame:
        return _table(self.rows.links, LinkRow._fields)

    @cached_property
    def memory(self) -> pd.DataFrame:
        return _table(self.rows.memory, MemoryRow._fields)

    @cached_property
    def replicas(self) -> pd.DataFrame:
        return _table(self.rows.replicas, ReplicaRow._fields)

    @cached_property
    def notes(self) -> pd.DataFrame:
        return _table(self.rows.notes, NoteRow._fields)

    def token_times_ps(self, request: int) -> list[int]:
        """When each output token of a request (by id) was emitted."""
        return list(self._token_times(self._row_of[request]))

    def token_gaps_s(self) -> list[NDArray[Any]]:
        """The gaps between consecutive tokens of each request, in order of request id."""
        return [_gaps_s(list(self._token_times(row))) for row in self.rows.requests]

    def itl_s(self) -> NDArray[Any]:
        """Every gap between consecutive tokens of a request, over all requests."""
        return np.concatenate([np.empty(0), *self.token_gaps_s()])

    def log(self) -> bytes:
        """Everything that happened to requests, as integers: equal runs give equal bytes."""
        lines = [
            json.dumps([row.request.id, *row[1:8], list(self._token_times(row)), *row[9:]], separators=(",", ":"))
            for row in self.rows.requests
        ]
        return "\n".join(lines).encode()

    @cached_property
    def _row_of(self) -> dict[int, RequestRow]:
        return {row.request.id: row for row in self.rows.requests}

    @cached_property
    def _segment_starts(self) -> dict[CohortId, list[int]]:
        return {key: [segment[0] for segment in segments] for key, segments in self.rows.segments.items()}

    def _token_times(self, row: RequestRow) -> Iterator[int]:
        for item in row.tokens:
            if isinstance(item, int):
                yield item
                continue
            key, first_it, last_it = item
            starts = self._segment_starts[key]
            place = bisect_right(starts, first_it) - 1
            for it0, start_ps, iterations, first_ps, slope_ps in self.rows.segments[key][place:]:
                if it0 >= last_it:
                    break
                for count in range(max(1, first_it + 1 - it0), min(iterations, last_it - it0) + 1):
                    yield start_ps + count * first_ps + slope_ps * (count * (count - 1) // 2)


def _gaps_s(times_ps: list[int]) -> NDArray[Any]:
    if times_ps and times_ps[-1] > LAST_INT64:  # after day 106
        return np.array([late - early for early, late in pairwise(times_ps)], dtype=float) / PS_PER_S
    return np.diff(np.array(times_ps, dtype=np.int64)) / PS_PER_S


def _array(items: Sequence[Any], name: str, dtype: Any) -> NDArray[Any]:
    """One attribute of every item; as a float, ``None`` becomes NaN."""
    return np.array(list(map(attrgetter(name), items)), dtype=dtype)


def _table(rows: Sequence[tuple[Any, ...]], names: tuple[str, ...]) -> pd.DataFrame:
    """Rows as a table; ``*_ps`` columns become seconds."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(names))
    for name in names:
        if name.endswith("_ps"):
            table[name] = table[name] / PS_PER_S
    return table.rename(columns={name: name[:-3] + "_s" for name in names if name.endswith("_ps")})
