"""``phasewise goodput``: the highest rate that a scenario's systems serve within the SLO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from sim.goodput import Criterion


def register(app: typer.Typer) -> None:
    app.command()(goodput)


def goodput(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    systems: Annotated[
        str | None, typer.Option(help="comma-separated, as in 'compare'; default: the scenario's own")
    ] = None,
    target: Annotated[float | None, typer.Option(help="share within the SLO; default: slo.attainment")] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="joint: a request must meet every bound; separate: each bound must be met by the target share"
        ),
    ] = "joint",
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="searches, with the scenario's seed and the next ones")
    ] = 3,
    tolerance: Annotated[float, typer.Option(help="share of the rate to which it is found")] = 0.02,
    max_rate: Annotated[
        float | None, typer.Option(help="highest rate tried (requests/s); default: as high as the SLO is attained")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "--jobs", min=1, help="processes; default: one per processor")
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="run on a Dask cluster: its scheduler's address, or 'local'"),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run replays again that failed")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="directory for tables, curve and scenario")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    seed: Annotated[int | None, typer.Option(help="first seed, in place of the scenario's")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no log on stderr")] = False,
) -> None:
    """Find the highest arrival rate at which the SLO is attained, per GPU and per dollar, and the curve around it.

    Each seed is bisected by itself; the table has the mean and its 95 % interval. Exit code 1 if no system attains the
    SLO at any rate.
    """
    import pandas as pd

    from experiments.jobs.content import digest, plain
    from experiments.jobs.run import Where, jobs
    from experiments.planning import goodput as found_by
    from experiments.runs.comparison import variants
    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable
    from experiments.scenario.file import Scenario
    from experiments.sweeps.sweep import bar

    settings = found_by.Settings(
        target=target,
        criterion=cast("Criterion", criterion),
        seeds=seeds,
        tolerance=tolerance,
        max_rate_per_s=max_rate,
    )
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else ())]
    experiment = Scenario.load(scenario, overrides)
    chosen = variants(experiment, systems or experiment.system.name)
    if out is not None:
        check_writable(out)
    rows, found, around = [], {}, []
    trials = len(chosen) * (found_by.most_trials(settings) + seeds * len(found_by.AROUND))
    study = {"name": scenario.stem, "hash": digest(["goodput", plain(chosen), plain(settings)])}
    where = Where(workers=workers, dask=dask, retry_failed=retry_failed)
    with bar(trials, "replays", quiet=quiet) as done, jobs(out, study, where) as executor:
        for label, variant in chosen.items():
            row, found[label] = found_by.search(variant, settings, executor, done)
            rows.append({"system": label, **row})
            if row["rate_per_s"] is not None:
                points = found_by.curve(variant, row["rate_per_s"], settings, executor, done)
                around += [{"system": label, **point} for point in points]
    if out is not None:
        found_by.save_goodput(out, scenario.stem, experiment, rows, found, pd.DataFrame(around))
        Log(quiet).say(f"figure and tables are in {out}")
    if json_:
        print(json.dumps({"goodput": rows, "curve": around}, indent=2, allow_nan=False))
    else:
        _print(rows, around)
    raise typer.Exit(0 if any(row["rate_per_s"] is not None for row in rows) else 1)


def _print(rows: list[dict[str, Any]], around: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = rows[0]
    title = f"goodput: highest rate with {first['target']:.0%} within the SLO ({first['criterion']})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("system", no_wrap=True)
    for name in ("requests/s", "per GPU", "requests per $"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["system"], _rate(row), *(_figure(row[key]) for key in ("rate_per_s_per_gpu", "requests_per_usd"))
        )
    console.print(table)
    for row in rows:
        for text in (row["reason"], row["remark"]):
            if text is not None:
                console.print(f"{row['system']}: {text}", highlight=False, markup=False, soft_wrap=True)
    if around:
        console.print(_curve(around))


def _curve(around: list[dict[str, Any]]) -> Any:
    """Mean shares over the seeds, by system and rate."""
    import pandas as pd
    from rich import box
    from rich.table import Table

    columns = {
        "attainment": "all bounds",
        "ttft_attainment": "TTFT",
        "tpot_attainment": "TPOT",
        "e2e_attainment": "E2E",
    }
    means = pd.DataFrame(around).groupby(["system", "rate_per_s"], sort=False, as_index=False)[list(columns)].mean()
    table = Table(box=box.SIMPLE_HEAD, title="share within the SLO, mean of the seeds", title_justify="left")
    table.add_column("system", no_wrap=True)
    for name in ("requests/s", *(f"{text} (%)" for text in columns.values())):
        table.add_column(name, justify="right")
    for row in means.to_dict("records"):
        shares = ["-" if pd.isna(row[name]) else f"{100 * row[name]:.1f}" for name in columns]
        table.add_row(row["system"], f"{row['rate_per_s']:.4g}", *shares)
    return table


def _rate(row: dict[str, Any]) -> str:
    if row["rate_per_s"] is None:
        return "none"
    half = "" if row["half_width_per_s"] is None else f" ± {row['half_width_per_s']:.2g}"
    return f"{'at least ' if row['at_least'] else ''}{row['rate_per_s']:.4g}{half}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
