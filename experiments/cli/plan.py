"""``phasewise plan``: which GPUs hold the model, in which phase, and who sends to whom."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experiments.planning.plan import Found, Option
    from experiments.scenario.file import Scenario

INFEASIBLE = 3


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    system: Annotated[
        str | None, typer.Option(help="whose planner; a system or an entry of 'compare'; default: the scenario's own")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="stop a search then, with the best so far; default: the system's own rule")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="candidates to simulate, print and write")] = 5,
    requests: Annotated[
        int, typer.Option(min=1, help="the first requests of the workload on which candidates are simulated")
    ] = 1000,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="also find each candidate's highest rate within the SLO, and rank by it")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(metavar="USD_PER_HOUR", help="choose the machines too, in place of the scenario's cluster.nodes"),
    ] = None,
    machines: Annotated[
        str | None,
        typer.Option(help="what --budget may choose, e.g. 8xA100-80G-SXM,4xL40S; default: the priced catalogue"),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="PLAN", help="plan file to go on from: only phases and shares change"),
    ] = None,
    lost: Annotated[
        str | None, typer.Option(help="with --from: machines and GPUs that are gone, e.g. node3,n0.g1")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="with --from: plan all that is left anew")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    seed: Annotated[int | None, typer.Option(help="seed, in place of the scenario's")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="directory for plans, tables and drawings")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no log on stderr")] = False,
) -> None:
    """Lay the model out over the GPUs: candidates of the system's planner, simulated and ranked.

    Plans are written with --out; 'phasewise run --plan' takes one. Exit code 3 if nothing meets the SLO, with what is
    missing.
    """
    from experiments.planning.plan import shortfall, too_brief, under
    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable
    from experiments.scenario.file import Scenario
    from sim.types import InfeasibleError

    _check(seconds, budget, machines, from_, lost, full)
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else ())]
    experiment = under(Scenario.load(scenario, overrides), system)
    if out is not None:
        check_writable(out)
    log = Log(quiet)
    try:
        if budget is not None:
            found = _bought(experiment, budget, machines, seconds, top, quiet, log)
        else:
            found = _planned(experiment, seconds, top, from_, lost, full, quiet, log)
        best = _judged(found.options[:top], requests, goodput, quiet, by_price=budget is not None)
    except InfeasibleError as error:
        _fail(f"{scenario}: {error}")
    brief = too_brief(best[0], requests)
    if brief is not None and shortfall(best[0]) is None:
        log.say(brief)
    _report(best, found, scenario.stem, out, json_, log)


def _check(
    seconds: float | None, budget: float | None, machines: str | None, from_: Path | None, lost: str | None, full: bool
) -> None:
    from sim.types import ConfigError

    for name, value in (("seconds", seconds), ("budget", budget)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g}: must be a number > 0")
    if from_ is None and (lost is not None or full):
        raise ConfigError("--lost and --full go on from a plan; name it with --from PLAN.yaml")
    if budget is not None and from_ is not None:
        raise ConfigError("--budget chooses GPUs, --from keeps them; drop one")
    if machines is not None and budget is None:
        raise ConfigError("--machines is what --budget may choose; give --budget, or change cluster.nodes")


# ---------------------------------------------------------------- the search


def _planned(
    experiment: Scenario, seconds: float | None, top: int, from_: Path | None, lost: str | None, full: bool,
    quiet: bool, log: Any,
) -> Found:  # fmt: skip
    from experiments.planning.plan import climbed, climbs, found, reloaded, replanned, search_seconds
    from experiments.scenario.planfile import read_plan
    from experiments.scenario.resolve import resolve

    setup = resolve(experiment)
    if from_ is None:
        with _bar("searching", quiet) as progress:
            offers = found(setup, seconds=search_seconds(setup, seconds), progress=progress)
        if not climbs(setup):
            return offers
        with _bar("trials in the engine, requests/s", quiet) as progress:
            return climbed(setup, offers, top=top, seconds=seconds, progress=progress)
    names = [name.strip() for name in (lost or "").split(",") if name.strip()]
    again = replanned(setup, from_, names, full=full, seconds=seconds)
    loading = reloaded(read_plan(from_, setup.problem), again.options[0].plan)
    what = f"weights are loaded by {', '.join(loading)}" if loading else "no weights are loaded"
    log.say(f"{len(again.log)} plans in {again.log[-1].elapsed_s:.1f} s; {what}")
    return again


def _bought(
    experiment: Scenario, budget: float, machines: str | None, seconds: float | None, top: int, quiet: bool, log: Any
) -> Found:
    from experiments.planning.budget import offered, unknown, within

    market = offered(experiment, budget, machines)
    if market.unpriced:
        log.say(unknown(market.unpriced))
    with _bar("purchases", quiet) as progress:
        return within(experiment, market, budget, top=top, seconds=seconds, progress=progress)


def _judged(options: Sequence[Option], requests: int, goodput: bool, quiet: bool, *, by_price: bool) -> list[Option]:
    """Simulated, with goodput if asked for, best first."""
    from experiments.planning.goodput import Settings
    from experiments.planning.plan import TOLERANCE, ranked, rated, tried

    judged: list[Option] = []
    with _bar("simulating", quiet) as progress:
        for option in options:
            one = tried(option, requests)
            known = one.goodput_per_s is not None or not goodput
            judged.append(one if known else rated(one, Settings(seeds=1, tolerance=TOLERANCE)))
            progress(len(judged), max(other.simulated or 0.0 for other in judged))
    return ranked(judged, by_price=by_price)


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """A line on stderr, where that is a terminal, with the steps and the best value so far."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def show(step: int, best: float) -> None:
            progress.update(task, description=f"{what}: {step}, best so far {best:.3f}")

        yield show


# ---------------------------------------------------------------- what is shown


def _report(best: list[Option], found: Found, title: str, out: Path | None, json_: bool, log: Any) -> None:
    from experiments.planning.plan import shortfall
    from experiments.planning.saved import save_plans
    from experiments.planning.told import told, told_json

    if out is not None:
        save_plans(out, title, best, found)
        log.say(
            f"plans and drawings are in {out} (start with cluster.png; phasewise run ... --plan {out / 'plan.yaml'})"
        )
    if json_:
        print(json.dumps(told_json(best, found), indent=2, allow_nan=False))
    else:
        for line in told(best[0], found):
            print(line)
        _print(best, title)
        for note in found.notes:
            print(note)
    unknown = sorted({kind for option in best for kind in option.unpriced})
    if unknown:
        log.say(f"no price is known of {', '.join(unknown)}; set usd_per_hour on the nodes")
    lacking = shortfall(best[0])
    if lacking is not None:
        _fail(lacking)


def _print(best: list[Option], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from experiments.planning.saved import file_names

    rated = any(option.goodput_per_s is not None for option in best)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"plans of {title}, best first (%: of the requests within the SLO)",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("replicas", no_wrap=True)
    rates = ("goodput (1/s)", "requests/$") if rated else ()
    for name in ("GPUs", "planner %", "engine %", *rates, "$/h", "$/1M tokens"):
        table.add_column(name, justify="right")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    notes = []
    for name, option in zip(file_names(), best, strict=False):
        row = option.row()
        shares = [_percent(row["predicted_attainment"]), _percent(row["simulated_attainment"])]
        figures = [_figure(row[key]) for key in (*(("goodput_per_s", "requests_per_usd") if rated else ()),
                                                 "usd_per_hour", "usd_per_million_tokens")]  # fmt: skip
        table.add_row(name.removesuffix(".yaml"), row["replicas"], str(len(option.gpus)), *shares, *figures)
        gpus = ", ".join(f"{count} {kind}" for kind, count in row["gpus"].items())
        idle = f" ({row['idle_gpus']} of the cluster idle)" if row["idle_gpus"] else ""
        binds = "" if row["bottleneck"] is None else f"; bottleneck: {row['bottleneck']}"
        source = "" if option.label is None else f"; found by: {option.label}"
        under = "" if option.setup.system.name == best[0].setup.system.name else f" under {option.setup.system.name}"
        notes.append(f"{name.removesuffix('.yaml')}: {gpus}{idle}{under}{binds}{source}")
    console.print(table)
    console.print("\n".join(notes), highlight=False, markup=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _fail(text: str) -> None:
    print(f"phasewise: {' '.join(text.split())}", file=sys.stderr)
    raise typer.Exit(INFEASIBLE)
