"""``vllm bench serve`` of any version, ``phasewise replay``, and SGLang's ``bench_serving``, once its copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.readers.base import MS, Fields, Measured, Reader, measures, nothing, number, one_of, spread
from experiments.runs.vllm_bench import Bench, bench_of, duration_of

WORDS = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99"}
"""Ours, and vLLM's word for it."""
FACTS = {"model": "model_id", "request_rate": "request_rate", "max_concurrency": "max_concurrency"}
SUMMARY_APART = 2.0
"""How far a file's own summary may be from its requests before one of them must be in another unit."""


def read(path: Path, records: Sequence[Fields], which: int | None, *, tool: str = "vllm bench serve") -> Measured:
    fields = one_of(path, records, which)
    e2e = "e2e_latency" if "mean_e2e_latency_ms" in fields else "e2el"
    facts = {ours: fields[theirs] for ours, theirs in FACTS.items() if fields.get(theirs) is not None}
    own = fields.get("phasewise")
    partial = isinstance(own, dict) and own.get("partial")
    remarks = [f"the measurement is partial: {own['stopped']}"] if isinstance(own, dict) and partial else []
    stated = _summaries(path, fields, e2e)
    if "ttfts" not in fields:
        return Measured(source=tool, measures=stated, remarks=tuple(remarks), facts=facts)
    bench = bench_of(path, fields)
    found = measures(bench)
    return Measured(
        source=tool,
        measures=found,
        bench=bench,
        remarks=(*remarks, *_grain(bench), *_apart(found, stated)),
        facts=facts,
    )


def _summaries(path: Path, fields: Fields, e2e: str) -> dict[str, float | None]:
    """What the file states of itself: all there is without ``--save-detailed``."""
    found = nothing()
    duration_s = duration_of(path, fields)
    completed, failed = number(path, fields, "completed"), number(path, fields, "failed")
    found |= {"completed": completed, "requests": None if completed is None else completed + (failed or 0)}
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        theirs = e2e if name == "E2E" else name.lower()
        found |= spread(path, name, fields, {ours: f"{word}_{theirs}_ms" for ours, word in WORDS.items()}, MS)
    found["requests/s"] = number(path, fields, "request_throughput")
    found["output tokens/s"] = number(path, fields, "output_throughput")
    found["makespan (s)"] = duration_s
    return found


def _grain(bench: Bench) -> Sequence[str]:
    """ITL is between events: it is not per token where events carry several."""
    done = (bench.requests["outcome"] == "completed").to_numpy()
    events = sum(len(gaps) + 1 for gaps, ok in zip(bench.gaps_s, done, strict=True) if ok)
    tokens = int(bench.requests["output_tokens"][done].sum())
    if events and abs(tokens / events - 1) > 0.02:
        return (f"the server sent {tokens / events:.2f} tokens per event: measured ITL is between events, not tokens",)
    return ()


def _apart(found: dict[str, float | None], stated: dict[str, float | None]) -> Sequence[str]:
    seen, said = found["TTFT mean (s)"], stated["TTFT mean (s)"]
    if seen and said and not 1 / SUMMARY_APART < seen / said < SUMMARY_APART:
        return (f"its summary says a mean TTFT of {said:.4g} s, its requests have {seen:.4g} s; the latter count",)
    return ()


def _sglang(path: Path, records: Sequence[Fields], which: int | None) -> Measured:
    return read(path, records, which, tool="sglang")


def _is_sglang(fields: Fields) -> bool:
    marks = {"mean_e2e_latency_ms", "total_output_tokens_retokenized"} & fields.keys()
    return bool(marks) or ("duration" in fields and str(fields.get("backend")).startswith("sglang"))


def _is_vllm(fields: Fields) -> bool:
    return "duration" in fields and ("ttfts" in fields or "mean_ttft_ms" in fields or "median_ttft_ms" in fields)


SGLANG = Reader(
    tool="sglang",
    is_it=_is_sglang,
    read=_sglang,
    reads="summaries; with --output-details the requests; a run a line, --benchmark chooses",
    unit="ms in summaries, s in arrays",
)
VLLM = Reader(
    tool="vllm bench serve",
    is_it=_is_vllm,
    read=read,
    reads="summaries; with --save-detailed the requests (phasewise replay and export write the same)",
    leaves="generated texts",
    unit="ms in summaries, s in arrays",
)
