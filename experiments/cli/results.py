"""``phasewise export``: results for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
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
            vllm_bench, kept, slo=slo or _if_bounded(slo_of(run)), backend="phasewise", model_id=run.summary["model"],
            num_prompts=len(run.requests), request_rate=run.summary["workload"]["rate_per_s"],
        )  # fmt: skip
        print(vllm_bench)


def _if_bounded(slo: Slo) -> Slo | None:
    return slo if (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None) else None
