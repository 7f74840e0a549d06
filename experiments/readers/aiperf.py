"""NVIDIA's aiperf (records and aggregates) and genai-perf (aggregates and raw exports). Units stand in the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.readers.base import (
    UNITS_PER_S,
    Fields,
    Measured,
    Reader,
    inner,
    measures,
    nothing,
    number,
    one_of,
    spread,
    table,
)
from sim.metrics import distribution
from sim.types import ConfigError

NS = 1e-9
KEYS = {"mean": "avg", "p50": "p50", "p90": "p90", "p99": "p99"}
LATENCIES = {"TTFT": "time_to_first_token", "TPOT": "inter_token_latency", "E2E": "request_latency"}
"""aiperf's inter-token latency is (request latency - TTFT) / (tokens - 1) of a request: TPOT here."""
COUNTS = ("request_count", "benchmark_duration", "request_throughput", "output_token_throughput")


def _unit_s(path: Path, name: str, fields: Fields) -> float:
    unit = fields.get("unit")
    if unit not in UNITS_PER_S:
        raise ConfigError(f"{path}: {name}.unit: {unit!r} must be one of {', '.join(UNITS_PER_S)}")
    return 1 / UNITS_PER_S[str(unit)]


def _aggregate(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    fields = one_of(path, records, which)
    found = nothing()
    for ours, theirs in LATENCIES.items():
        if part := inner(fields, theirs):
            found |= spread(path, ours, part, KEYS, _unit_s(path, theirs, part), f"{theirs}.")
    count, seconds, rate, tokens = (number(path, inner(fields, name), "avg") for name in COUNTS)
    found |= {"completed": count, "requests/s": rate, "output tokens/s": tokens}
    errors = number(path, inner(fields, "error_request_count"), "avg")
    found |= {"requests": None if count is None else count + (errors or 0)}
    found["makespan (s)"] = seconds if seconds is not None else count / rate if count and rate else None
    tool = "aiperf" if "aiperf_version" in fields or "benchmark_id" in fields else "genai-perf"
    return Measured(source=tool, measures=found, facts=_facts(inner(fields, "input_config")))


def _facts(config: Fields) -> dict[str, Any]:
    names = inner(config, "endpoint").get("model_names") or config.get("model_names") or config.get("model")
    model = names[0] if isinstance(names, list) and names else names
    load = inner(config, "loadgen")
    stated = {"model": model, "request_rate": load.get("request_rate"), "max_concurrency": load.get("concurrency")}
    return {name: value for name, value in stated.items() if value is not None}


def _records(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    del which
    bench = table([row for place, item in enumerate(records, 1) if (row := _row(path, place, item)) is not None])
    return Measured(source="aiperf", measures=measures(bench), bench=bench)


def _row(path: Path, place: int, item: Fields) -> dict[str, Any] | None:
    """One request; None for those of a warm-up."""
    metadata, metrics = inner(item, "metadata"), inner(item, "metrics")
    if metadata.get("benchmark_phase", "profiling") != "profiling":
        return None
    error = item.get("error") or ("cancelled" if metadata.get("was_cancelled") else "")
    row = {"start": (number(path, metadata, "request_start_ns", required=True) or 0.0) * NS, "error": str(error)[:200]}
    for ours, theirs in (("ttft", "time_to_first_token"), ("e2e", "request_latency")):
        part = inner(metrics, theirs)
        value = number(path, part, "value")
        if value is None and not error:
            raise ConfigError(f"{path}:{place}: metrics.{theirs}: missing; was the benchmark run with --streaming?")
        row[ours] = 0.0 if value is None else value * _unit_s(path, f"line {place}: {theirs}", part)
    counts = (("input", ("input_sequence_length",)), ("output", ("output_sequence_length", "output_token_count")))
    for ours, names in counts:
        known = [number(path, inner(metrics, name), "value") for name in names if name in metrics]
        row[ours] = next((value for value in known if value is not None), 0.0)
    return row


def _raw(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    """genai-perf's profile export: when requests were sent and responses came; tokens are not counted there."""
    experiments = one_of(path, records, None)["experiments"]
    chosen = one_of(path, experiments if isinstance(experiments, list) else [], which, "experiments")
    requests = chosen.get("requests") if isinstance(chosen, dict) else None
    if not isinstance(requests, list) or not requests:
        raise ConfigError(f"{path}: experiments[{which or 0}].requests: must be a list of requests")
    times = [_times(path, place, item) for place, item in enumerate(requests)]
    served = [pair for pair in times if len(pair) > 1]
    found = nothing() | {"requests": float(len(times)), "completed": float(len(served))}
    latencies = {
        "TTFT": [pair[1] - pair[0] for pair in served],
        "E2E": [pair[-1] - pair[0] for pair in served],
        "ITL": [gap for pair in served for gap in np.diff(pair[1:])],
    }
    for name, values in latencies.items():
        found |= {f"{name} {key} (s)": distribution(np.array(values) * NS)[key] for key in KEYS}
    if served:
        found["makespan (s)"] = seconds = (max(pair[-1] for pair in served) - min(pair[0] for pair in times)) * NS
        found["requests/s"] = len(served) / seconds if seconds > 0 else None
    mode = inner(chosen, "experiment")
    rate = {"request_rate": mode.get("value")} if mode.get("mode") == "request_rate" else {}
    remark = "genai-perf's raw export counts responses, not tokens: no TPOT; its ITL is between responses"
    return Measured(source="genai-perf", measures=found, remarks=(remark,), facts=rate)


def _times(path: Path, place: int, item: object) -> list[int]:
    sent, responses = (inner({"": item}, "").get(name) for name in ("timestamp", "response_timestamps"))
    given = [sent, *(responses if isinstance(responses, list) else [None])]
    times = [time for time in given if isinstance(time, int) and not isinstance(time, bool) and time >= 0]
    if len(times) < len(given) or times != sorted(times):
        raise ConfigError(f"{path}: requests[{place}]: timestamp and response_timestamps must be nanoseconds in order")
    return times


def _is_aggregate(fields: Fields) -> bool:
    return any(isinstance(fields.get(name), dict) and "unit" in fields[name] for name in LATENCIES.values())


AIPERF = Reader(
    tool="aiperf, genai-perf",
    is_it=_is_aggregate,
    read=_aggregate,
    reads="the aggregate export (profile_export_*.json)",
    unit="as the file says",
)
AIPERF_RECORDS = Reader(
    tool="aiperf records",
    is_it=lambda fields: "request_start_ns" in inner(fields, "metadata") and "metrics" in fields,
    read=_records,
    reads="the requests (profile_export.jsonl), warm-up left out",
    unit="as the file says",
    per_request=True,
)
GENAI_PERF_RAW = Reader(
    tool="genai-perf raw export",
    is_it=lambda fields: "experiments" in fields and "service_kind" in fields,
    read=_raw,
    reads="TTFT, E2E, gaps between responses",
    leaves="tokens, which it does not count",
    unit="ns",
)
