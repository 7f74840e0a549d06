"""How fast the engine is: requests per second of whole process and of engine, against its own step-by-step mode.

``python -m experiments.benchmarks.bench_engine [TRACE]`` replays a trace (the Azure conversation CSV, or as many
requests resampled from the shipped sample) on Llama-2-70B over 4 prefill and 4 decode replicas of 4 H100 each, at low
load and near saturation. Every figure comes from this one run; the ratios are the sturdier ones on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOADS = {"low": 2.0, "near saturation": 16.0}
"""Requests per second over the four decode replicas."""
REQUESTS = 19_366
"""Of the Azure conversation trace."""


def measure(trace: Path | None, rate_per_s: float, step_by_step: bool) -> dict[str, Any]:
    """One run in this process: the figures of the table's row."""
    started_s = time.perf_counter()
    from dataclasses import replace

    import numpy as np

    from calibrate.profile.file import read_profile, shipped_profiles
    from sim import SYSTEMS, Cluster, Problem, Slo, Workload, simulate
    from sim.cost import Fitted, Roofline
    from sim.metrics import summarise
    from sim.model import model
    from sim.record import StepRow
    from traces import TraceSource, read, resample, sample_path, with_rate

    rng = np.random.default_rng(0)
    if trace is not None:
        requests = list(with_rate(read(trace), rate_per_s, rng=rng))
    else:
        requests = list(resample(read(sample_path()), REQUESTS, rate_per_s, arrivals="poisson", cv=None, seed=0))
    profile = read_profile(shipped_profiles()["splitwise-2023"])
    problem = Problem(
        cluster=Cluster.of(
            nodes=[{"gpu": "H100-SXM", "count": 4, "nodes": 8}], links={"inter_node": {"gbps": 400, "latency_us": 10}}
        ),
        model=replace(model("llama-2-70b"), max_position_embeddings=16384),  # the trace is longer than 4096
        cost=Fitted(profiles=(profile,), fallback=Roofline()),
        workload=Workload(
            rate_per_s=rate_per_s, lengths=tuple((r.input_tokens, r.output_tokens) for r in requests[:500])
        ),
    )
    pools = {"prefill": {"replicas": 4, "tp": 4}, "decode": {"replicas": 4, "tp": 4}}
    system = SYSTEMS["vllm"](**pools)
    system = system.with_limits(replace(system.limits, max_num_batched_tokens=8192))
    result = simulate(problem, system, TraceSource(requests), step_by_step=step_by_step)
    summary = summarise(result, slo=Slo(ttft_s=2.5, tpot_s=0.15), usd_per_hour=problem.cluster.usd_per_hour())
    wall_s = time.perf_counter() - started_s
    steps = dict(zip(StepRow._fields, zip(*result.rows.step_fields, strict=True), strict=True))
    iterations, decode_seqs = np.array(steps["iterations"]), np.array(steps["decode_seqs"])
    return {
        "requests": len(requests),
        "completed": summary["completed"],
        "wall_s": wall_s,
        "cpu_s": time.process_time(),
        "engine_s": result.wall_s,
        "requests_per_s": len(requests) / wall_s,
        "engine_requests_per_s": len(requests) / result.wall_s,
        "iterations_per_request": result.iterations / len(requests),
        "segments_per_request": result.segments / len(requests),
        "events_per_request": result.events / len(requests),
        "mean_decode_batch": float((iterations * decode_seqs).sum() / iterations[decode_seqs > 0].sum()),
        "preemptions": summary["preemptions"],
        "p99_ttft_s": summary["ttft_s"]["p99"],
        "p99_tpot_s": summary["tpot_s"]["p99"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_own_process(trace: Path | None, rate_per_s: float, step_by_step: bool) -> dict[str, Any]:
    """``measure`` in a fresh interpreter, so that imports and memory count; ``process_s`` is timed from outside."""
    command = [sys.executable, "-m", "experiments.benchmarks.bench_engine", "--one", str(rate_per_s)]
    command += ["--step-by-step"] if step_by_step else []
    command += [str(trace)] if trace is not None else []
    started_s = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: dict[str, Any] = json.loads(output)
    row["process_s"] = time.perf_counter() - started_s
    row["process_requests_per_s"] = row["requests"] / row["process_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "trace", nargs="?", type=Path, help="Azure conversation CSV; default: resampled from the shipped sample"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs per cell; the fastest counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--one", type=float, metavar="RATE", help="one run at this rate in this process, as JSON")
    parser.add_argument("--step-by-step", action="store_true", help="with --one: without collapsing")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.trace, arguments.one, arguments.step_by_step)))
        return
    table: dict[str, Any] = {}
    for load, rate_per_s in LOADS.items():
        for mode, step_by_step in (("collapsed", False), ("step by step", True)):
            runs = [in_own_process(arguments.trace, rate_per_s, step_by_step) for _ in range(arguments.repeat)]
            table[f"{load}, {mode}"] = min(runs, key=lambda row: row["process_s"])
    for load in LOADS:
        fast, slow = table[f"{load}, collapsed"], table[f"{load}, step by step"]
        table[f"{load}, ratio"] = {
            "engine": slow["engine_s"] / fast["engine_s"],
            "process": slow["process_s"] / fast["process_s"],
        }
    if arguments.json:
        print(json.dumps(table, indent=2))
        return
    for name, row in table.items():
        print(name)
        for key, value in row.items():
            print(f"  {key:24} {value:,.2f}" if isinstance(value, float) else f"  {key:24} {value:,}")


if __name__ == "__main__":
    main()
