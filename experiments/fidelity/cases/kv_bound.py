"""vLLM 0.19, Llama-3.1-8B on one RTX 4090: 300 requests in half a minute, which it takes three to serve."""

from __future__ import annotations

from pathlib import Path

from experiments.fidelity import unseen
from experiments.fidelity.recorded import read_run
from experiments.fidelity.table import Bar, Row, Study
from sim import Result

STUDY = "llmservingsim-4090"
FOLDER = "llmservingsim/rtx4090-llama-3.1-8b-run"
MUST = {"TTFT mean": 0.025, "TPOT mean": 0.02, "TTFT p90": 0.04, "TTFT p99": 0.04, "TPOT p90": 0.04, "TPOT p99": 0.04}
MUST_MAKESPAN = 0.01
NAMES = {"Mean": "mean", "Median": "p50", "P90": "p90", "P95": "p95", "P99": "p99"}


def study(measured: Path) -> Study:
    """``measured``: the folder of real runs."""
    folder = measured / FOLDER
    recorded = read_run(folder)
    rows = tuple(unseen.rows(recorded, unseen.predict(recorded), STUDY))
    aims = upstream_errors(folder / "upstream_simulator_error.txt")
    return Study(
        title="vLLM 0.19, Llama-3.1-8B, RTX 4090, 300 requests far over capacity",
        rows=rows,
        bars=tuple(_bar(row, aims) for row in rows if row.metric in MUST or row.metric == "makespan"),
        notes=(
            "settings from meta.json: 2588 blocks of 16 tokens, 2048 tokens a step, 256 sequences, prefix caching, "
            "scheduler_reserve_full_isl; arrivals are the engine's (queued_ts)",
            "nothing is fitted; asynchronous scheduling: the processor's time is hidden behind every step, and what "
            "comes or ends counts a step later; TTFT and E2E count from when the scheduler knew of a request",
            "the aim is the upstream simulator's error on the same run (makespan, which it lacks: 0.5 %)",
        ),
    )


def simulate_run(folder: Path, *, step_by_step: bool = False) -> Result:
    """The same requests under the settings of the run's own metadata."""
    return unseen.predict(read_run(folder), step_by_step=step_by_step)


def upstream_errors(path: Path) -> dict[str, float]:
    """The upstream simulator's own errors on this run, as shares by metric."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) == 5 and words[0] in ("TTFT", "TPOT") and words[1] in NAMES:
            found[f"{words[0]} {NAMES[words[1]]}"] = abs(float(words[4].rstrip("%"))) / 100
    return found


def _bar(row: Row, aims: dict[str, float]) -> Bar:
    must = MUST.get(row.metric, MUST_MAKESPAN)
    return Bar(
        study=STUDY, name=row.metric, value=abs(row.error), must=must, aim=aims.get(row.metric, must / 2), points=1
    )
