"""``phasewise export | sweep``: results for other tools, and over rates and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.types import Slo

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Goodput = Annotated[
    list[str] | None,
    typer.Option("--goodput", metavar="NAME:MS", help="ttft:200, tpot:50 or e2el:5000 (ms); repeatable"),
]


def register(app: typer.Typer) -> None:
    for command in (export, sweep):
        app.command()(command)


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


def sweep(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    rates: Annotated[str, typer.Option(help="arrival rates in requests/s, comma-separated, e.g. 1,2,4,8")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="directory to write")],
    systems: Annotated[
        str | None, typer.Option(help="comma-separated; default: the scenario's 'compare' entries, else its own system")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs of each point, with the scenario's seed and the next ones")
    ] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: one per processor")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    seed: Annotated[int | None, typer.Option(help="first seed, in place of the scenario's")] = None,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no log on stderr")] = False,
) -> None:
    """Run systems at several arrival rates and seeds; means with 95 % confidence intervals, curves, Pareto plots.

    Exit code 1 if no system reaches the SLO's target at any rate.
    """
    import pandas as pd

    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve
    from experiments.sweeps.sweep import Here, bar, points, process_pool, run_points, save_sweep

    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else ())]
    experiment = Scenario.load(scenario, overrides)
    todo = points(experiment, rates_per_s=_numbers(rates), seeds=seeds, systems=systems)
    check_writable(out)
    for first in {point.system: point for point in todo}.values():
        resolve(first.scenario)  # a mistake is found before anything runs
    with Here() if workers == 1 else process_pool(workers) as executor, bar(len(todo), "runs", quiet=quiet) as done:
        rows, no_plan = run_points(todo, executor, done)
    best = save_sweep(out, scenario.stem, experiment, pd.DataFrame(rows))
    if json_:
        print(json.dumps({"best_rates": best, "runs": rows, "no_plan": no_plan}, indent=2, allow_nan=False))
    else:
        _print_best(best)
        for point, reason in no_plan.items():
            print(f"no plan for {point}: {reason}")
    Log(quiet).say(f"figures and tables are in {out} (start with rates.png)")
    raise typer.Exit(0 if any(row["rate_per_s"] is not None for row in best) else 1)


def _numbers(text: str) -> list[float]:
    from sim.types import ConfigError

    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"--rates {text}: must be numbers with commas between them, such as 1,2,4,8") from None


def _if_bounded(slo: Slo) -> Slo | None:
    return slo if (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None) else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _print_best(best: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("system")
    for name in (
        f"highest rate tried with {best[0]['target']:.0%} within SLO (requests/s)",
        "per GPU",
        "requests per $",
    ):
        table.add_column(name, justify="right")
    for row in best:
        table.add_row(
            row["system"], *(_figure(row[key]) for key in ("rate_per_s", "rate_per_s_per_gpu", "requests_per_usd"))
        )
    Console().print(table)
