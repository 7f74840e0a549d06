"""The command ``phasewise``. stdout is the result, stderr the log; bad input is one line and exit code 2.

Commands import what they need when they are called, so that ``--help`` is quick and ``run`` loads no plots.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrate import cli as calibrate_cli
from experiments.cli import calibrate as commands_calibrate
from experiments.cli import goodput as commands_goodput
from experiments.cli import lists as commands_lists
from experiments.cli import plan as commands_plan
from experiments.cli import replay as commands_replay
from experiments.cli import report as commands_report
from experiments.cli import results as commands_results
from experiments.cli import sweep as commands_sweep
from experiments.cli import trace as commands_trace
from experiments.cli import validate as commands_validate
from experiments.cli.guard import guarded

if TYPE_CHECKING:
    from experiments.scenario.file import Scenario

app = typer.Typer(
    name="phasewise",
    help="Simulate LLM serving on heterogeneous GPUs whose prefill and decode may run on different machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(commands_trace.app, name="trace")
app.add_typer(calibrate_cli.app, name="calibrate")
commands_calibrate.register(calibrate_cli.app)
commands_lists.register(app)
commands_results.register(app)
commands_sweep.register(app)
commands_report.register(app)
commands_goodput.register(app)
commands_plan.register(app)
commands_replay.register(app)
commands_validate.register(app)

ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a field, e.g. workload.rate=5; repeatable"),
]
Seed = Annotated[int | None, typer.Option(help="seed, in place of the scenario's")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="directory to write")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log on stderr")]
StepByStep = Annotated[bool, typer.Option("--step-by-step", help="one event per iteration: slower, equal times")]


@app.command()
def run(
    scenario: ScenarioFile,
    set_: Overrides = None,
    seed: Seed = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="plan file of 'phasewise plan', in place of the planner")
    ] = None,
    out: Out = None,
    json_: Json = False,
    quiet: Quiet = False,
    step_by_step: StepByStep = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="keep every token's time in --out (for 'export')")] = False,
) -> None:
    """Simulate one scenario; --out keeps it as a run directory. Exit code 1 if no request completed."""
    from experiments.runs import tables as report
    from experiments.runs.progress import Log
    from experiments.runs.rundir import Run, check_writable, write_run
    from experiments.scenario.resolve import resolve

    log = Log(quiet)
    experiment = _scenario(
        scenario, [*(set_ or ()), *([f"plan={json.dumps(str(plan.resolve()))}"] if plan is not None else ())], seed
    )
    if out is not None:
        check_writable(out)
    setup = resolve(experiment)
    for remark in setup.requests.remarks:
        log.say(remark)
    with log.counting(experiment.system.name) as progress:
        result = setup.run(step_by_step=step_by_step, progress=progress)
    summary = {"name": scenario.stem, **setup.summary(result)}
    if out is not None:
        write_run(out, Run.of(scenario.stem, result, summary, tokens=tokens), experiment.to_yaml())
        log.say(f"wrote {out}")
    if json_:
        _print_json(summary)
    else:
        report.print_run(summary)
    raise typer.Exit(0 if summary["completed"] else 1)


@app.command()
def compare(
    scenario: ScenarioFile,
    systems: Annotated[
        str | None, typer.Option(help="comma-separated; default: the scenario's 'compare' entries, else every system")
    ] = None,
    set_: Overrides = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="default: runs/<scenario>-compare")] = None,
    json_: Json = False,
    quiet: Quiet = False,
    step_by_step: StepByStep = False,
) -> None:
    """Run one scenario under several systems; print a table with the winners, save plots, CSVs and run directories."""
    from experiments.runs import tables as report
    from experiments.runs.comparison import run_all, save_comparison, variants
    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable

    log = Log(quiet)
    experiment = _scenario(scenario, set_, seed)
    chosen = variants(experiment, systems)
    folder = out or Path("runs") / f"{scenario.stem}-compare"
    check_writable(folder)
    runs, left_out = run_all(chosen, log, step_by_step=step_by_step)
    save_comparison(folder, scenario.stem, chosen, runs, left_out)
    summaries = {label: finished.summary for label, finished in runs.items()}
    if json_:
        _print_json(report.comparison_json(summaries, left_out))
    else:
        report.print_comparison(summaries, left_out, title=scenario.stem)
    log.say(f"figures, tables and runs are in {folder} (start with overview.png)")
    raise typer.Exit(0 if any(summary["completed"] for summary in summaries.values()) else 1)


@app.command()
def plot(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="of 'run --out' or of 'compare'")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="default: RUN_DIR/plots, or RUN_DIR of 'compare'")
    ] = None,
    from_s: Annotated[float | None, typer.Option("--from", help="start of the timelines (s)")] = None,
    to_s: Annotated[float | None, typer.Option("--to", help="end of the timelines (s)")] = None,
) -> None:
    """Draw every figure of a run or a comparison (PNG, SVG, CSV) and print their paths."""
    from experiments.runs.comparison import draw

    for path in draw(run_dir, out, from_s, to_s):
        print(path)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="a page that lists every key, instead")] = False,
) -> None:
    """Print the JSON schema of scenario files."""
    from experiments.scenario.file import Scenario

    if markdown:
        from experiments.pages.schema_page import page

        print(page(), end="")
        return
    _print_json(Scenario.model_json_schema())


def _scenario(path: Path, overrides: list[str] | None, seed: int | None) -> Scenario:
    from experiments.scenario.file import Scenario

    return Scenario.load(path, [*(overrides or ()), *([f"seed={seed}"] if seed is not None else ())])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show where a defect arose (after any command)")
    ] = False,
) -> None:
    """Simulate LLM serving on heterogeneous GPUs whose prefill and decode may run on different machines."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; see ``experiments.cli.guard`` for exit codes."""
    guarded(app, sys.argv[1:] if arguments is None else arguments)
