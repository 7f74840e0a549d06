"""A real server's result beside a prediction: read from the JSON of any of three tools, compared metric by metric.

The tools: ``phasewise replay`` and ``vllm bench serve`` (one format), and guidellm. ``compare`` sets both side by side;
times in seconds. Errors are predicted over measured less 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.runs.rundir import Run
from experiments.runs.vllm_bench import MS_PER_S, Bench, bench_of, duration_of, load, of_run, request_table
from experiments.scenario.file import Scenario
from experiments.scenario.workload import WorkloadSpec
from sim.metrics import distribution
from sim.types import ConfigError, Request
from traces import write

if TYPE_CHECKING:
    import pandas as pd

LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "E2E": "e2e_s"}
FIGURES = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99"}
"""Ours, and vLLM's word for it."""
STATUSES = ("successful", "incomplete", "errored")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A real result. ``bench`` is None where the file has summaries only."""

    source: str
    measures: Mapping[str, float | None]
    bench: Bench | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows of metric, measured, predicted, error; a row per request where they are the same ones on both sides."""

    rows: list[dict[str, Any]]
    requests: pd.DataFrame | None
    remarks: list[str] = field(default_factory=list)

    def beyond(self, tolerance: float) -> list[str]:
        """Metrics whose error is greater."""
        return [row["metric"] for row in self.rows if row["error"] is not None and abs(row["error"]) > tolerance]

    def per_request(self) -> dict[str, dict[str, float | None]]:
        """Median and 90th percentile of the requests' absolute relative errors, by latency."""
        if self.requests is None:
            return {}
        found = {}
        for name in LATENCIES:
            spread = distribution(self.requests[f"{name} error"].abs().to_numpy(dtype=float))
            found[name] = {key: spread[key] for key in ("p50", "p90")}
        return found


# ---------------------------------------------------------------- read


def read_measured(path: Path, benchmark: int | None = None) -> Measured:
    """A result file. ``benchmark``: which one of a guidellm report of several. ``ConfigError`` names file and field."""
    fields = load(path)
    if "benchmarks" in fields:
        bench = _guidellm(path, fields["benchmarks"], benchmark)
        return Measured(source="guidellm", measures=measures(bench), bench=bench)
    if benchmark is not None:
        raise ConfigError(f"{path}: --benchmark {benchmark}: only guidellm's reports have several")
    own = fields.get("phasewise")
    partial = isinstance(own, dict) and own.get("partial")
    remarks = (f"the measurement is partial: {own['stopped']}",) if isinstance(own, dict) and partial else ()
    if "ttfts" not in fields:
        return Measured(source="vllm bench serve", measures=_summaries(path, fields), remarks=remarks)
    bench = bench_of(path, fields)
    return Measured(
        source="vllm bench serve", measures=measures(bench), bench=bench, remarks=(*remarks, *_grain(bench))
    )


def _grain(bench: Bench) -> Sequence[str]:
    """ITL is between events: it is not per token where events carry several."""
    done = (bench.requests["outcome"] == "completed").to_numpy()
    events = sum(len(gaps) + 1 for gaps, ok in zip(bench.gaps_s, done, strict=True) if ok)
    tokens = int(bench.requests["output_tokens"][done].sum())
    if events and abs(tokens / events - 1) > 0.02:
        return (f"the server sent {tokens / events:.2f} tokens per event: measured ITL is between events, not tokens",)
    return ()


def _summaries(path: Path, fields: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a file without arrays (no ``--save-detailed``): what it states."""
    found: dict[str, float | None] = dict.fromkeys(measures(_nothing()))
    completed, failed = _number(path, fields, "completed"), _number(path, fields, "failed")
    duration_s = duration_of(path, fields)
    found |= {"completed": completed, "requests": None if completed is None else completed + (failed or 0)}
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        for ours, theirs in FIGURES.items():
            value_ms = _number(path, fields, f"{theirs}_{'e2el' if name == 'E2E' else name.lower()}_ms")
            found[f"{name} {ours} (s)"] = None if value_ms is None else value_ms / MS_PER_S
    found["requests/s"] = _number(path, fields, "request_throughput")
    found["output tokens/s"] = _number(path, fields, "output_throughput")
    found["makespan (s)"] = duration_s
    return found


def _guidellm(path: Path, benchmarks: object, number: int | None) -> Bench:
    """Requests of one benchmark of a report.

    guidellm's ``time_per_output_token_ms`` includes the first token; its ``inter_token_latency_ms`` is what is called
    TPOT here, and gaps between single tokens are not in the report (guidellm/schemas/request_stats.py).
    """
    if not isinstance(benchmarks, list) or not benchmarks:
        raise ConfigError(f"{path}: benchmarks: must be a list of guidellm's benchmarks")
    if number is None and len(benchmarks) > 1:
        raise ConfigError(f"{path}: it has {len(benchmarks)} benchmarks; choose one with --benchmark 0, 1, ...")
    if not 0 <= (number or 0) < len(benchmarks):
        raise ConfigError(f"{path}: --benchmark {number}: it has {len(benchmarks)}, counted from 0")
    groups = benchmarks[number or 0].get("requests") if isinstance(benchmarks[number or 0], dict) else None
    if not isinstance(groups, dict) or not isinstance(groups.get("successful"), list):
        raise ConfigError(f"{path}: benchmarks[{number or 0}].requests.successful: missing; is it guidellm's report?")
    rows = [_guidellm_row(path, status, item) for status in STATUSES for item in groups.get(status) or ()]
    columns = {name: np.array([row[name] for row in rows]) for name in ("input", "output", "start", "ttft", "e2e")}
    arrays = {"input_lens": columns["input"], "output_lens": columns["output"], "ttfts": columns["ttft"]}
    first_s = columns["start"].min() if rows else 0.0
    last_s = float((columns["start"] + columns["e2e"]).max()) if rows else 0.0
    table = request_table(arrays, columns["start"] - first_s, columns["e2e"], [row["error"] for row in rows])
    return Bench(requests=table, gaps_s=(), duration_s=last_s - float(first_s))


def _guidellm_row(path: Path, status: str, item: object) -> dict[str, Any]:
    """Of the older and the newer names; E2E ends with the last token, as elsewhere."""
    if not isinstance(item, dict):
        raise ConfigError(f"{path}: requests.{status}: {item!r} must be an object")
    served = status == "successful"
    start = "request_start_time" if "request_start_time" in item else "start_time"
    row = {
        name: _number(path, item, key, required=served) or 0.0
        for name, key in (("input", "prompt_tokens"), ("output", "output_tokens"), ("start", start),
                          ("ttft", "time_to_first_token_ms"))
    }  # fmt: skip
    gap_ms = _number(path, item, "inter_token_latency_ms", required=served and row["output"] > 1) or 0.0
    row["ttft"] /= MS_PER_S
    row["e2e"] = row["ttft"] + gap_ms / MS_PER_S * max(row["output"] - 1, 0)
    return row | {"error": "" if served else str(item.get("error") or status)}


def _number(path: Path, fields: Mapping[str, Any], name: str, *, required: bool = False) -> float | None:
    value = fields.get(name)
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ConfigError(f"{path}: {name}: {value!r} must be a number >= 0")
    return float(value)


# ---------------------------------------------------------------- predict


def predict(
    scenario: Scenario, measured: Measured, *, own: bool, progress: Callable[[int], None] | None = None
) -> Bench:
    """Simulate what was measured: the file's requests at the times they were sent, or the scenario's ``own``.

    ``ConfigError`` where the file does not have them.
    """
    from experiments.scenario.resolve import resolve

    if own:
        setup = resolve(scenario)
        return _simulated(scenario.where, setup.run(progress=progress), setup)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "sent.csv"
        write(trace, _sent(scenario, measured))
        workload = WorkloadSpec(trace=str(trace), too_long=scenario.workload.too_long)
        setup = resolve(scenario.model_copy(update={"workload": workload}))
        return _simulated(scenario.where, setup.run(progress=progress), setup)


def _simulated(name: str, result: Any, setup: Any) -> Bench:
    return of_run(Run.of(name, result, setup.summary(result), tokens=True))


def _sent(scenario: Scenario, measured: Measured) -> list[Request]:
    """The requests that were served, in order of sending; the others had no answer to repeat."""
    mend = "simulate the scenario's own requests with --workload scenario"
    if measured.bench is None:
        raise ConfigError(f"{scenario.where}: the result has no requests (vLLM: --save-detailed); {mend}")
    rows = served(measured.bench).requests
    if rows["arrival_s"].isna().any():
        raise ConfigError(f"{scenario.where}: the result does not say when requests were sent (start_times); {mend}")
    if not len(rows):
        raise ConfigError(f"{scenario.where}: the result has no request that was served; {mend}")
    cells = zip(rows["arrival_s"], rows["input_tokens"], rows["output_tokens"], strict=True)
    return [
        Request(id=number, arrival_s=float(arrival_s), input_tokens=max(1, int(inputs)), output_tokens=int(outputs))
        for number, (arrival_s, inputs, outputs) in enumerate(cells)
    ]


def served(bench: Bench) -> Bench:
    """Only what completed, in order of sending."""
    rows = bench.requests[bench.requests["outcome"] == "completed"].sort_values("arrival_s", kind="stable")
    gaps = tuple(bench.gaps_s[place] for place in rows.index) if bench.gaps_s else ()
    return replace(bench, requests=rows.reset_index(drop=True), gaps_s=gaps)


def of_saved(run: Run) -> Bench:
    """A run directory as a prediction; without its tokens it has no ITL."""
    if run.tokens is not None:
        return of_run(run)
    rows = run.requests.sort_values(["arrival_s", "request"], kind="stable", ignore_index=True)
    return Bench(requests=rows, gaps_s=(), duration_s=float(run.summary["makespan_s"]))


# ---------------------------------------------------------------- compare


def compare(measured: Measured, predicted: Bench) -> Comparison:
    """Both sides by the same functions; request by request if they are the same ones in the same order.

    Failed requests are counted but not judged: the prediction is of those that were served, and must complete them.
    """
    ours = measures(predicted)
    rows = []
    for metric, value in measured.measures.items():
        guess = ours[metric]
        error = None
        if metric != "requests" and value and guess is not None:
            error = guess / value - 1
        rows.append({"metric": metric, "measured": value, "predicted": guess, "error": error})
    return Comparison(rows=rows, requests=_paired(measured.bench, predicted), remarks=list(measured.remarks))


def measures(bench: Bench) -> dict[str, float | None]:
    """Counts, latencies of completed requests, throughput and makespan."""
    done = (bench.requests["outcome"] == "completed").to_numpy()
    columns = {name: bench.requests[column].to_numpy(dtype=float)[done] for name, column in LATENCIES.items()}
    gaps = [gaps for gaps, ok in zip(bench.gaps_s, done, strict=True) if ok] if bench.gaps_s else []
    columns["ITL"] = np.concatenate([np.empty(0), *gaps])
    found: dict[str, float | None] = {"requests": len(done), "completed": int(done.sum())}
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        spread = distribution(columns[name])
        found |= {f"{name} {key} (s)": spread[key] for key in FIGURES}
    tokens, seconds = int(bench.requests["output_tokens"][done].sum()), bench.duration_s
    found["requests/s"] = int(done.sum()) / seconds if seconds > 0 else None
    found["output tokens/s"] = tokens / seconds if seconds > 0 else None
    found["makespan (s)"] = seconds
    return found


def _paired(measured: Bench | None, predicted: Bench) -> pd.DataFrame | None:
    """A row per request: lengths, each latency measured, predicted, and its error. None if they are other requests."""
    if measured is None:
        return None
    real, ours = served(measured).requests, predicted.requests
    same = len(real) == len(ours) and all(
        (real[name].to_numpy() == ours[name].to_numpy()).all() for name in ("input_tokens", "output_tokens")
    )
    if not same:
        return None
    table = ours[["request", "arrival_s", "input_tokens", "output_tokens"]].copy()
    for name, column in LATENCIES.items():
        seen, guess = real[column].to_numpy(dtype=float), ours[column].to_numpy(dtype=float)
        table[f"{name} measured (s)"], table[f"{name} predicted (s)"] = seen, guess
        table[f"{name} error"] = np.divide(guess, seen, out=np.full(len(seen), np.nan), where=seen > 0) - 1
    return table


def _nothing() -> Bench:
    empty = dict.fromkeys(("input_lens", "output_lens", "ttfts"), np.empty(0))
    return Bench(requests=request_table(empty, np.empty(0), np.empty(0), ()), gaps_s=(), duration_s=0.0)
