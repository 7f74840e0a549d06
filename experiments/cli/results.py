"""``phasewise export``: results for other tools."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experiments.runs.rundir import Run
    from sim.types import Slo

Goodput = Annotated[
    list[str] | None,
    typer.Option("--goodput", metavar="NAME:MS", help="ttft:200, tpot:50 or e2el:5000 (ms); repeatable"),
]


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="of 'run --out'")],
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Chrome trace (.json), for ui.perfetto.dev")
    ] = None,
    vllm_bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the JSON of 'vllm bench serve'; needs 'run --tokens'")
    ] = None,
    goodput: Goodput = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="its requests as a trace (.csv, .parquet): replayed, it gives the same run"),
    ] = None,
) -> None:
    """Write a saved run in the formats of other tools, or as a trace."""
    from experiments.plots.run.gallery import slo_of
    from experiments.runs import vllm_bench as bench
    from experiments.runs.perfetto import write_trace
    from experiments.runs.request_log import requests_of
    from experiments.runs.rundir import read_run
    from sim.types import ConfigError
    from traces import write

    if perfetto is None and vllm_bench is None and trace is None:
        raise ConfigError("export: nothing to write; give --perfetto FILE, --vllm-bench FILE or --trace FILE")
    slo = bench.goodput_slo(goodput) if goodput else None
    run = read_run(run_dir)
    kept = bench.of_run(run) if vllm_bench is not None else None
    if trace is not None:
        write(trace, requests_of(run))
        print(trace)
    if perfetto is not None:
        write_trace(perfetto, run)
        print(perfetto)
    if vllm_bench is not None and kept is not None:
        bench.write_bench(
            vllm_bench, kept, slo=slo or _if_bounded(slo_of(run)), backend="phasewise", endpoint_type="phasewise",
            model_id=run.summary["model"], num_prompts=len(run.requests), **_about(run_dir, run),
        )  # fmt: skip
        print(vllm_bench)


def _about(run_dir: Path, run: Run) -> dict[str, Any]:
    """When the run was, and what its scenario says of arrivals and clients, in vLLM's terms."""
    from datetime import datetime

    from experiments.runs.rundir import MARK
    from experiments.runs.vllm_bench import DATE
    from sim.outside import is_file, read_yaml

    scenario = read_yaml(run_dir / "scenario.yaml", "scenario") if is_file(run_dir / "scenario.yaml") else {}
    workload = scenario.get("workload") or {} if isinstance(scenario, dict) else {}
    cv = workload.get("cv") if workload.get("arrivals") == "gamma" else None
    rate = (run.summary.get("workload") or {}).get("rate_per_s")
    return {
        "date": f"{datetime.fromtimestamp((run_dir / MARK).stat().st_mtime):{DATE}}",
        "request_rate": rate if rate and isfinite(rate) else "inf",
        "burstiness": 1 / cv**2 if cv else 1.0,
        "max_concurrency": (workload.get("closed_loop") or {}).get("clients"),
    }


def _if_bounded(slo: Slo) -> Slo | None:
    return slo if (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None) else None
