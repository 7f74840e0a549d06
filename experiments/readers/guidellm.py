"""Reports of guidellm: the 0.x schema and the later one (``start_time`` beside ``request_start_time``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.readers.base import (
    MS,
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
from sim.types import ConfigError

STATUSES = ("successful", "incomplete", "errored")
MODELS = (("config", "backend", "model"), ("benchmarker", "backend", "model"), ("worker", "backend_model"))
LATENCIES = {"TTFT": "time_to_first_token_ms", "TPOT": "inter_token_latency_ms"}


def read(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    """guidellm's ``time_per_output_token_ms`` includes the first token; its ``inter_token_latency_ms`` is what is
    called TPOT here, and gaps between single tokens are not in the report (guidellm/schemas/request_stats.py).

    A report may hold a sample of its requests (``--sample-requests``): its metrics then say how many there were.
    """
    benchmarks = one_of(path, records, None).get("benchmarks")
    if not isinstance(benchmarks, list) or not benchmarks:
        raise ConfigError(f"{path}: benchmarks: must be a list of guidellm's benchmarks")
    chosen = one_of(path, benchmarks, which)
    groups = chosen.get("requests") if isinstance(chosen, dict) else None
    if not isinstance(groups, dict) or not isinstance(groups.get("successful"), list):
        raise ConfigError(f"{path}: benchmarks[{which or 0}].requests.successful: missing; is it guidellm's report?")
    facts = _facts(chosen)
    rows = [_row(path, status, item) for status in STATUSES for item in groups.get(status) or ()]
    totals = inner(chosen, "metrics", "request_totals") or inner(chosen, "request_totals")
    here, all_of_them = len(groups["successful"]), number(path, totals, "successful")
    if all_of_them is not None and all_of_them > here:
        remark = f"the report holds a sample of {here} of {all_of_them:,.0f} requests: its own metrics are compared"
        return Measured(source="guidellm", measures=_metrics(path, chosen, totals), remarks=(remark,), facts=facts)
    bench = table(rows)
    return Measured(source="guidellm", measures=measures(bench), bench=bench, facts=facts)


def _facts(chosen: Fields) -> dict[str, Any]:
    for *parts, name in MODELS:
        model = inner(chosen, *parts).get(name)
        if isinstance(model, str):
            return {"model": model}
    return {}


def _metrics(path: Path, chosen: Fields, totals: Fields) -> dict[str, float | None]:
    metrics = inner(chosen, "metrics")
    found = nothing()
    for ours, theirs in LATENCIES.items():
        found |= _distribution(path, ours, inner(metrics, theirs, "successful"), MS)
    found |= _distribution(path, "E2E", inner(metrics, "request_latency", "successful"), 1.0)
    completed = number(path, totals, "successful")
    lost = sum(number(path, totals, name) or 0 for name in ("errored", "incomplete"))
    found |= {"completed": completed, "requests": None if completed is None else completed + lost}
    for ours, theirs in (("requests/s", "requests_per_second"), ("output tokens/s", "output_tokens_per_second")):
        found[ours] = number(path, inner(metrics, theirs, "successful"), "mean")
    start, end = number(path, chosen, "start_time"), number(path, chosen, "end_time")
    found["makespan (s)"] = number(path, chosen, "duration") or (end - start if start and end else None)
    return found


def _distribution(path: Path, name: str, fields: Fields, unit_s: float) -> dict[str, float | None]:
    found = spread(path, name, fields, {"mean": "mean", "p50": "median"}, unit_s)
    return found | spread(path, name, inner(fields, "percentiles"), {"p90": "p90", "p99": "p99"}, unit_s)


def _row(path: Path, status: str, item: object) -> dict[str, Any]:
    """Of the older and the newer names; E2E ends with the last token, as elsewhere."""
    if not isinstance(item, dict):
        raise ConfigError(f"{path}: requests.{status}: {item!r} must be an object")
    served = status == "successful"
    start = "request_start_time" if "request_start_time" in item else "start_time"
    row: dict[str, Any] = {
        name: number(path, item, key, required=served) or 0.0
        for name, key in (("input", "prompt_tokens"), ("output", "output_tokens"), ("start", start),
                          ("ttft", "time_to_first_token_ms"))
    }  # fmt: skip
    gap_ms = number(path, item, "inter_token_latency_ms", required=served and row["output"] > 1) or 0.0
    row["ttft"] *= MS
    row["e2e"] = row["ttft"] + gap_ms * MS * max(row["output"] - 1, 0)
    return row | {"error": "" if served else str(item.get("error") or status)}


GUIDELLM = Reader(
    tool="guidellm",
    is_it=lambda fields: "benchmarks" in fields,
    read=read,
    reads="the requests; of a sampled report its metrics; --benchmark chooses one of several",
    leaves="gaps between tokens are not in its reports",
    unit="ms; s for request_latency and times",
)
