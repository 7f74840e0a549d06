"""``phasewise sweep | merge``: one scenario over rates, fields and seeds, here or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experiments.sweeps.sweep import Asked

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Workers = Annotated[int | None, typer.Option(min=1, max=4096, help="processes; default: one per processor")]
Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="run on a Dask cluster: its scheduler's address, or 'local'"),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="run points again that failed")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log on stderr")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="directory to write; the same command there goes on")]


def register(app: typer.Typer) -> None:
    for command in (sweep, merge):
        app.command()(command)


def sweep(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    out: Out,
    rates: Annotated[
        str | None, typer.Option(help="arrival rates in requests/s, comma-separated, e.g. 1,2,4,8; default: as it is")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="vary any field: system.engine.max_num_seqs=64,128; repeatable"),
    ] = None,
    study: Annotated[
        Path | None, typer.Option(metavar="FILE", help="points as YAML: grid, list, or random samples of fields")
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(help="comma-separated; default: the scenario's 'compare' entries, else its own system"),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="runs of each point, with the scenario's seed and the next ones")
    ] = 3,
    workers: Workers = None,
    dask: Dask = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="only part I of N; 'phasewise merge' puts the parts together")
    ] = None,
    retry_failed: RetryFailed = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    seed: Annotated[int | None, typer.Option(help="first seed, in place of the scenario's")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a scenario over rates, any fields, systems and seeds; means with 95 % intervals, curves, Pareto, heat maps.

    Every finished point is on disk at once: after Ctrl-C, a crash or a reboot the same command goes on. Exit code 1 if
    a point failed, or if no system reaches the SLO's target at any rate; 130 or 143 if it was stopped.
    """
    from experiments.jobs.run import Where, jobs, shard_of
    from experiments.runs.rundir import check_writable
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve
    from experiments.sweeps.grid import changes_of, grid_of
    from experiments.sweeps.sweep import Asked, bar, points, run_points

    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else ())]
    asked = Asked(
        scenario=Scenario.load(scenario, overrides),
        rates_per_s=tuple(_numbers(rates)) if rates is not None else (),
        seeds=seeds,
        systems=systems,
        changes=tuple(changes_of(grid_of(grid or ()), study)),
    )
    where = Where(workers=workers, dask=dask, shard=shard_of(shard), retry_failed=retry_failed)
    todo = points(asked)
    check_writable(out)
    for first in {point.system: point for point in todo}.values():
        resolve(first.scenario)  # a mistake is found before anything runs
    if where.shard is not None:
        todo = todo[where.shard[0] - 1 :: where.shard[1]]
    with bar(len(todo), "runs", quiet=quiet) as done, jobs(out, asked.study(), where, done) as executor:
        rows = run_points(todo, executor)
    _report(out, asked, rows, partial=where.shard, json_=json_, quiet=quiet)


def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="what the shards of one sweep wrote")],
    out: Out,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put the shards of a sweep together: the same files as if it had run in one place.

    Exit code 2 if the folders are of different studies, or if points are missing: it says how many.
    """
    from experiments.jobs.executor import Jobs
    from experiments.jobs.journal import Journal, opened
    from experiments.jobs.workers import local
    from experiments.runs.rundir import check_writable
    from experiments.sweeps.merge import merged
    from experiments.sweeps.sweep import points, run_points

    asked, entries = merged(folders)
    check_writable(out)
    with opened(out, asked.study()) as journal:
        for key, entry in entries.items():
            if journal.get(key) is None:
                journal.add(key, entry.answer, entry.failed)
    rows = run_points(points(asked), Jobs(local(1), Journal(entries)))
    _report(out, asked, rows, partial=None, json_=json_, quiet=quiet)


def _report(
    out: Path, asked: Asked, rows: list[dict[str, Any]], *, partial: tuple[int, int] | None, json_: bool, quiet: bool
) -> None:
    """Write, print, and end with what became of it."""
    from experiments.runs.progress import Log
    from experiments.sweeps.sweep import FAILURE, frame, save_sweep

    fields = list(dict.fromkeys(name for changes in asked.changes for name in changes))
    failed = {_named(row): row[FAILURE] for row in rows if row[FAILURE] is not None}
    best = save_sweep(out, asked.scenario, frame(rows), fields)
    if json_:
        print(json.dumps({"best_rates": best, "runs": rows, "failed": failed}, indent=2, allow_nan=False))
    else:
        _print_best(best)
        for point, reason in failed.items():
            print(f"{point} has no figures: {reason}")
    log = Log(quiet)
    if partial is not None:
        log.say(f"part {partial[0]} of {partial[1]} is in {out}; 'phasewise merge' puts the parts together")
    log.say(f"figures and tables are in {out} (start with rates.png)")
    reached = any(row["rate_per_s"] is not None for row in best)
    raise typer.Exit(0 if reached and not failed else 1)


def _named(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {value}" for name, value in row.items() if name not in ("system", "failure")]
    return ", ".join([str(row["system"]), *parts])


def _numbers(text: str) -> list[float]:
    from sim.types import ConfigError

    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ConfigError(f"--rates {text}: must be numbers with commas between them, such as 1,2,4,8")
    return numbers


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
