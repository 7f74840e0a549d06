"""What a reader of results makes of a file: requests where they are there, figures where they are not, and facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.runs.vllm_bench import Bench, request_table
from sim.metrics import distribution
from sim.types import ConfigError

LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "E2E": "e2e_s"}
SPREADS = ("TTFT", "TPOT", "ITL", "E2E")
FIGURES = ("mean", "p50", "p90", "p99")
UNITS_PER_S = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e3, "milliseconds": 1e3, "us": 1e6, "ns": 1e9}
MS = 1e-3
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A real result. ``bench`` is None where the file has summaries only.

    ``facts``: what it says of itself: model, gpu, tp, request_rate, max_concurrency.
    """

    source: str
    measures: Mapping[str, float | None]
    bench: Bench | None = None
    remarks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One tool's files. ``records``: the JSON objects of the file, one or many; ``is_it`` knows them by their keys.

    ``per_request``: many objects are the requests of one benchmark, not benchmarks of their own. ``reads``, ``leaves``:
    for the documentation.
    """

    tool: str
    is_it: Callable[[Fields], bool]
    read: Callable[[Path, Sequence[Fields], int | None], Measured]
    reads: str
    leaves: str = ""
    unit: str = ""
    per_request: bool = False


def measures(bench: Bench) -> dict[str, float | None]:
    """Counts, latencies of completed requests, throughput and makespan."""
    done = (bench.requests["outcome"] == "completed").to_numpy()
    columns = {name: bench.requests[column].to_numpy(dtype=float)[done] for name, column in LATENCIES.items()}
    gaps = [gaps for gaps, ok in zip(bench.gaps_s, done, strict=True) if ok] if bench.gaps_s else []
    columns["ITL"] = np.concatenate([np.empty(0), *gaps])
    found: dict[str, float | None] = {"requests": len(done), "completed": int(done.sum())}
    for name in SPREADS:
        spread = distribution(columns[name])
        found |= {f"{name} {key} (s)": spread[key] for key in FIGURES}
    tokens, seconds = int(bench.requests["output_tokens"][done].sum()), bench.duration_s
    found["requests/s"] = int(done.sum()) / seconds if seconds > 0 else None
    found["output tokens/s"] = tokens / seconds if seconds > 0 else None
    found["makespan (s)"] = seconds
    return found


def nothing() -> dict[str, float | None]:
    """Every figure, without a value."""
    names = ["requests", "completed", *(f"{name} {key} (s)" for name in SPREADS for key in FIGURES)]
    return dict.fromkeys([*names, "requests/s", "output tokens/s", "makespan (s)"])


def number(path: Path, fields: Fields, name: str, *, required: bool = False) -> float | None:
    """A field's number; None if it is absent (or NaN, as some tools write what they do not have)."""
    value = fields.get(name)
    if value is None and not required:
        return None
    if isinstance(value, float) and value != value and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ConfigError(f"{path}: {name}: {value!r} must be a number >= 0")
    return float(value)


def inner(fields: Any, *names: str) -> Fields:
    """The mapping under these keys; empty if there is none."""
    for name in names:
        fields = fields.get(name) if isinstance(fields, Mapping) else None
    return fields if isinstance(fields, Mapping) else {}


def spread(
    path: Path, name: str, fields: Fields, keys: Mapping[str, str], unit_s: float, where: str = ""
) -> dict[str, float | None]:
    """Mean and quantiles of a latency. ``keys``: ours -> theirs; ``unit_s``: seconds in one of their units."""
    found = {}
    for ours, theirs in keys.items():
        try:
            value = number(path, fields, theirs)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f": {theirs}:", f": {where}{theirs}:", 1)) from None
        if value is not None:
            found[f"{name} {ours} (s)"] = value * unit_s
    return dict(found)


def table(rows: Sequence[Mapping[str, Any]], gaps_s: tuple[NDArray[np.float64], ...] = ()) -> Bench:
    """A benchmark from rows of input, output, start, ttft, e2e (s) and error (empty: served)."""
    columns = {name: np.array([row[name] for row in rows]) for name in ("input", "output", "start", "ttft", "e2e")}
    arrays = {"input_lens": columns["input"], "output_lens": columns["output"], "ttfts": columns["ttft"]}
    first_s = float(columns["start"].min()) if rows else 0.0
    last_s = float((columns["start"] + columns["e2e"]).max()) if rows else 0.0
    known = request_table(arrays, columns["start"] - first_s, columns["e2e"], [row["error"] for row in rows])
    return Bench(requests=known, gaps_s=gaps_s, duration_s=last_s - first_s)


def one_of(path: Path, records: Sequence[Any], which: int | None, what: str = "benchmarks") -> Any:
    """The one that ``--benchmark`` chooses of several."""
    if which is None and len(records) > 1:
        raise ConfigError(f"{path}: it has {len(records)} {what}; choose one with --benchmark 0, 1, ...")
    if not 0 <= (which or 0) < len(records):
        raise ConfigError(f"{path}: --benchmark {which}: it has {len(records)}, counted from 0")
    return records[which or 0]
