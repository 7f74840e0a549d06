"""inference-perf, trtllm-bench, InferenceX (formerly InferenceMAX), and files that are known but have no latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.readers.base import MS, Fields, Measured, Reader, inner, nothing, number, one_of, spread
from sim.types import ConfigError

MEDIANS = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99"}
PERCENTILES = {"p50": "p50", "p90": "p90", "p99": "p99"}


def _inference_perf(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    fields = one_of(path, records, which)
    good = inner(fields, "successes")
    latency, throughput = inner(good, "latency"), inner(good, "throughput")
    found = nothing()
    names = (("TTFT", "time_to_first_token"), ("TPOT", "time_per_output_token"), ("ITL", "inter_token_latency"),
             ("E2E", "request_latency"))  # fmt: skip
    for ours, theirs in names:
        found |= spread(path, ours, inner(latency, theirs), MEDIANS, 1.0, f"successes.latency.{theirs}.")
    completed = number(path, good, "count")
    failed = number(path, inner(fields, "failures"), "count")
    found |= {"completed": completed, "requests": None if completed is None else completed + (failed or 0)}
    found["requests/s"] = number(path, throughput, "requests_per_sec")
    found["output tokens/s"] = number(path, throughput, "output_tokens_per_sec")
    rate = found["requests/s"]
    found["makespan (s)"] = completed / rate if completed and rate else None
    load = inner(fields, "load_summary")
    asked = load.get("requested_rate")
    return Measured(source="inference-perf", measures=found, facts={} if asked is None else {"request_rate": asked})


def _trtllm(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    fields = one_of(path, records, which)
    total, streaming = inner(fields, "performance"), inner(fields, "streaming_metrics")
    found = nothing() | {"requests": number(path, inner(fields, "request_info"), "num_requests")}
    found["completed"] = found["requests"]
    found |= spread(path, "E2E", total, {"mean": "avg_request_latency_ms"}, MS, "performance.")
    found |= spread(path, "E2E", inner(total, "request_latency_percentiles_ms"), PERCENTILES, MS)
    for ours, theirs in (("TTFT", "ttft"), ("TPOT", "tpot")):
        found |= spread(path, ours, streaming, {"mean": f"avg_{theirs}_ms"}, MS, "streaming_metrics.")
        found |= spread(path, ours, inner(streaming, f"{theirs}_percentiles"), PERCENTILES, MS)
    seconds = number(path, total, "total_latency_ms")
    found["makespan (s)"] = None if seconds is None else seconds * MS
    found["requests/s"] = number(path, total, "request_throughput_req_s")
    found["output tokens/s"] = number(path, total, "system_output_throughput_tok_s")
    facts = {"model": inner(fields, "engine").get("model"), "tp": inner(fields, "world_info").get("tp_size")}
    return Measured(
        source="trtllm-bench", measures=found, facts={name: value for name, value in facts.items() if value is not None}
    )


def _inferencex(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    """Seconds throughout, under vLLM's names without ``_ms``; aggregates count tokens per GPU."""
    fields = one_of(path, records, which)
    found = nothing()
    for ours, theirs in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2el")):
        found |= spread(path, ours, fields, {key: f"{word}_{theirs}" for key, word in MEDIANS.items()}, 1.0)
    completed = number(path, fields, "completed")
    found |= {"completed": completed, "requests": completed, "makespan (s)": number(path, fields, "duration")}
    found["requests/s"] = number(path, fields, "request_throughput")
    found["output tokens/s"] = number(path, fields, "output_throughput")
    per_gpu, tp = number(path, fields, "output_tput_per_gpu"), number(path, fields, "tp")
    if found["output tokens/s"] is None and per_gpu is not None and tp:
        found["output tokens/s"] = per_gpu * tp
    names = {"model": ("model", "model_id"), "gpu": ("hw",), "tp": ("tp",),
             "max_concurrency": ("conc", "max_concurrency"), "request_rate": ("request_rate",)}  # fmt: skip
    facts: dict[str, Any] = {}
    for ours, options in names.items():
        facts |= next(({ours: fields[name]} for name in options if fields.get(name) is not None), {})
    return Measured(source="InferenceX", measures=found, facts=facts)


def _is_inferencex(fields: Fields) -> bool:
    return any(f"{word}_{name}" in fields for word in ("mean", "median") for name in ("ttft", "tpot", "e2el"))


def _left(tool: str, why: str) -> Reader:
    def refuse(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
        del records, which
        raise ConfigError(f"{path}: this looks like a result of {tool}; not read: {why}")

    return Reader(tool=tool, is_it=_marks[tool], read=refuse, reads="refused", leaves=why)


_marks = {
    "vllm bench throughput": lambda fields: {"elapsed_time", "tokens_per_second"} <= fields.keys(),
    "vllm bench latency": lambda fields: {"avg_latency", "percentiles"} <= fields.keys(),
    "SGLang's bench_one_batch": lambda fields: {"prefill_latency", "median_decode_latency"} <= fields.keys(),
    "LLMPerf": lambda fields: "results_inter_token_latency_s_mean" in fields or "results_ttft_s_mean" in fields,
    "MLPerf LoadGen": lambda fields: fields.get("key") == "loadgen_version" or "result_samples_per_second" in fields,
}
INFERENCE_PERF = Reader(
    tool="inference-perf",
    is_it=lambda fields: "successes" in fields and "load_summary" in fields,
    read=_inference_perf,
    reads="summary_lifecycle_metrics.json and a stage's",
    leaves="normalised time per output token",
    unit="s",
)
TRTLLM = Reader(
    tool="trtllm-bench",
    is_it=lambda fields: "request_info" in fields and "performance" in fields,
    read=_trtllm,
    reads="the report (--report_json), with streaming metrics where it has them",
    unit="ms",
)
INFERENCEX = Reader(
    tool="InferenceX",
    is_it=_is_inferencex,
    read=_inferencex,
    reads="results and aggregates (median_ttft, p99_e2el, ...)",
    leaves="interactivity, energy, cost",
    unit="s",
)
REFUSED = tuple(
    _left(tool, why)
    for tool, why in (
        ("vllm bench throughput", "it has no latencies; give the result of 'vllm bench serve --save-result'"),
        ("vllm bench latency", "it times one batch, not a server under load; give that of 'vllm bench serve'"),
        ("SGLang's bench_one_batch", "it times one batch, not a server under load; give that of bench_serving"),
        ("LLMPerf", "its times are the client's mean per request only; give the result of another tool"),
        ("MLPerf LoadGen", "it has no requests; give the result of another tool"),
    )
)
