"""vLLM 0.19, Llama-3.1-8B on one RTX 4090: 300 requests in half a minute, which it takes three to serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.fidelity.setup import Recorded, run, shipped
from experiments.fidelity.table import Bar, Row, Study
from sim import Limits, Request, Result
from sim.cluster import Cluster
from sim.systems.vllm import vllm

STUDY = "llmservingsim-4090"
FOLDER = "llmservingsim/rtx4090-llama-3.1-8b-run"
QUANTILES = (50, 90, 95, 99)
MUST = {"TTFT mean": 0.025, "TPOT mean": 0.02, "TTFT p90": 0.04, "TTFT p99": 0.04, "TPOT p90": 0.04, "TPOT p99": 0.04}
MUST_MAKESPAN = 0.01
NAMES = {"Mean": "mean", "Median": "p50", "P90": "p90", "P95": "p95", "P99": "p99"}


def study(measured: Path) -> Study:
    """``measured``: the folder of real runs."""
    folder = measured / FOLDER
    truth, result = read_run(folder), simulate_run(folder)
    predicted = result.requests.sort_values("request")
    load = result.makespan_s / float(truth.arrival_s.max())
    rows = []
    for metric, column in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")):
        pair = zip(summary(truth[column].to_numpy()), summary(predicted[column].to_numpy()), strict=True)
        for (name, real_s), (_, guess_s) in pair:
            rows.append(_row(f"{metric} {name}", real_s, guess_s, load))
    rows.append(_row("makespan", float(truth.finish_s.max()), result.makespan_s, load))
    aims = upstream_errors(folder / "upstream_simulator_error.txt")
    return Study(
        title="vLLM 0.19, Llama-3.1-8B, RTX 4090, 300 requests far over capacity",
        rows=tuple(rows),
        bars=tuple(_bar(row, aims) for row in rows if row.metric in MUST or row.metric == "makespan"),
        notes=(
            "settings from meta.json: 2588 blocks of 16 tokens, 2048 tokens a step, 256 sequences, prefix caching, "
            "scheduler_reserve_full_isl; arrivals are the engine's (queued_ts)",
            "nothing is fitted; overhead between steps is 0 (async_scheduling)",
            "the aim is the upstream simulator's error on the same run (makespan, which it lacks: 0.5 %)",
        ),
    )


def read_run(folder: Path) -> pd.DataFrame:
    """Columns arrival_s, ttft_s, tpot_s, finish_s; time 0 is the first arrival."""
    lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines])
    start_s = rows.queued_ts.min()
    return pd.DataFrame(
        {
            "arrival_s": rows.queued_ts - start_s,
            "ttft_s": rows.first_token_ts - rows.queued_ts,
            "tpot_s": (rows.last_token_ts - rows.first_token_ts) / (rows.output_toks - 1),
            "finish_s": rows.last_token_ts - start_s,
        }
    )


def simulate_run(folder: Path, *, step_by_step: bool = False) -> Result:
    """The same requests under the settings of the run's own metadata."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    scheduler, cache = meta["resolved_config"]["scheduler_config"], meta["kv_cache"]
    limits = Limits(
        max_num_seqs=scheduler["max_num_seqs"],
        max_num_batched_tokens=scheduler["max_num_batched_tokens"],
        max_model_len=meta["engine_kwargs"]["max_model_len"],
        block_size=cache["block_size"],
        num_kv_blocks=cache["num_gpu_blocks"],
        prefix_caching=cache["enable_prefix_caching"],
    )
    system = vllm(
        chunked_prefill=scheduler["enable_chunked_prefill"],
        long_prefill_token_threshold=scheduler["long_prefill_token_threshold"],
        reserve_full_prompt=scheduler["scheduler_reserve_full_isl"],
    )
    cluster = Cluster.of(nodes=[{"gpu": "RTX-4090", "count": 1}])
    source, profiles = Recorded(_requests(folder, limits.block_size)), [shipped("vllm-0.19-rtx-4090")]
    return run(cluster, system, source, profiles, limits, step_by_step=step_by_step)


def _requests(folder: Path, block_tokens: int) -> list[Request]:
    lines = (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        Request(
            id=number,
            arrival_s=row["timestamp"] / 1e3,
            input_tokens=row["input_length"],
            output_tokens=row["output_length"],
            prefix=tuple(row["hash_ids"]),
            prefix_block_tokens=block_tokens,
        )
        for number, row in enumerate(map(json.loads, lines))
    ]


def summary(values_s: np.ndarray) -> list[tuple[str, float]]:
    return [("mean", float(values_s.mean()))] + [(f"p{q}", float(np.percentile(values_s, q))) for q in QUANTILES]


def upstream_errors(path: Path) -> dict[str, float]:
    """The upstream simulator's own errors on this run, as shares by metric."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) == 5 and words[0] in ("TTFT", "TPOT") and words[1] in NAMES:
            found[f"{words[0]} {NAMES[words[1]]}"] = abs(float(words[4].rstrip("%"))) / 100
    return found


def _row(metric: str, measured_s: float, predicted_s: float, load: float) -> Row:
    return Row(study=STUDY, case="run", metric=metric, unit="s", measured=measured_s, predicted=predicted_s, load=load)


def _bar(row: Row, aims: dict[str, float]) -> Bar:
    must = MUST.get(row.metric, MUST_MAKESPAN)
    return Bar(
        study=STUDY, name=row.metric, value=abs(row.error), must=must, aim=aims.get(row.metric, must / 2), points=1
    )
