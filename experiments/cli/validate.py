"""``phasewise validate``: predict a scenario, execute it, and say how far apart the two are, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from calibrate.execute.how import Execution, Mode
    from experiments.runs.progress import Log
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import Setup


def register(app: typer.Typer) -> None:
    app.command()(validate)


def validate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    mode: Annotated[
        str,
        typer.Option(help="wall-clock: worker processes in real time; measured-step: every step run, virtual clock"),
    ] = "wall-clock",
    device: Annotated[str, typer.Option(help="cpu, cuda (workers take the GPUs in turn) or cuda:N")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="executions; two or more give a noise floor")] = 3,
    profile: Annotated[
        str | None, typer.Option(help="latency profile (name or file), in place of the scenario's")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="measure this device for so long first, and predict with that profile")
    ] = None,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead",
            help="fit what steps take beside the profile to short runs of other requests, between the real ones",
        ),
    ] = False,
    both_modes: Annotated[
        bool,
        typer.Option(
            "--both-modes", help="after each run by the wall clock one with measured steps: do the two modes agree?"
        ),
    ] = False,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SHARE", help="largest error, e.g. 0.1, or tpot=0.06 (ttft, tpot, e2e, makespan, throughput)"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="a Hugging Face model's folder; default: weights drawn from the seed"),
    ] = None,
    real_links: Annotated[
        bool, typer.Option("--real-links", help="KV moves as fast as it can, not at the pace of the scenario's links")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="default: runs/<scenario>-validate")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    seed: Annotated[int | None, typer.Option(help="seed, in place of the scenario's")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no log on stderr")] = False,
) -> None:
    """Predict a scenario, execute it with a real model, and print the error beside the noise of the real runs.

    The error is split into arrivals, step times, scheduling and transfers. Exit code 1 if an error is past --tolerance
    or a worker died; what was done until then is saved.
    """
    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve
    from experiments.validation import validation_report as report
    from experiments.validation.validate import validate as validate_setup
    from sim.types import ConfigError

    log = Log(quiet)
    bounds = tolerances(tolerance or ())
    if profile is not None and minutes is not None:
        raise ConfigError(f"--minutes: {minutes:g} with --profile {profile}; measure a profile or name one, not both")
    overrides = [*(set_ or ()), *([f"seed={seed}"] if seed is not None else ())]
    if profile is not None:
        overrides.append(f"latency={json.dumps(profile)}")
    experiment = Scenario.load(scenario, overrides)
    folder = out or Path("runs") / f"{scenario.stem}-validate"
    check_writable(folder)
    setup = resolve(experiment)
    how = _execution(setup, mode, device, weights, emulate_links=not real_links)
    if minutes is not None:
        setup = _measured_first(experiment, setup, minutes, device, folder, log)
    found = validate_setup(setup, how, repeats, log.say, overhead=overhead, both_modes=both_modes)
    summary = report.summary(found, bounds, scenario.stem)
    report.save(found, summary, folder)
    if json_:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print_report(summary)
    log.say(f"figures and tables are in {folder} (start with requests.png)")
    raise typer.Exit(1 if summary["beyond_tolerance"] or not summary["complete"] else 0)


def tolerances(texts: Sequence[str]) -> dict[str, float]:
    """By metric; a bare number bounds all that are not named."""
    from experiments.validation.validation_report import BOUNDED
    from sim.cluster import did_you_mean
    from sim.types import ConfigError

    found: dict[str, float] = {}
    for text in sorted(texts, key=lambda text: "=" in text):
        name, _, number = text.rpartition("=")
        if name and name not in BOUNDED:
            raise ConfigError(f"--tolerance: {did_you_mean(name, BOUNDED)}")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not (isfinite(share) and share > 0):
            raise ConfigError(f"--tolerance {text}: must be a share > 0, such as 0.1 or tpot=0.06")
        found |= dict.fromkeys([name] if name else BOUNDED, share)
    return found


def _execution(setup: Setup, mode: str, device: str, weights: str | None, *, emulate_links: bool) -> Execution:
    from calibrate.execute.how import Execution
    from sim.types import ConfigError

    if setup.system.limits.num_kv_blocks is None and device == "cpu":
        raise ConfigError(
            f"{setup.scenario.where}: {setup.scenario.system_place}.engine.num_kv_blocks: is not set; a CPU shares its "
            "memory with all else, so say how many KV blocks a replica has"
        )
    blocks = setup.system.limits.num_kv_blocks or 4096
    return Execution(
        mode=cast("Mode", mode), device=device, folder=weights, kv_blocks=blocks, emulate_links=emulate_links
    )


def _measured_first(experiment: Scenario, setup: Setup, minutes: float, device: str, folder: Path, log: Log) -> Setup:
    """The setup with step times of a profile that is measured now, as far as the scenario's shapes go."""
    from calibrate.bench.shapes import Limits
    from calibrate.measure import CPU_LIMITS, Settings, calibrate, finish
    from calibrate.profile.file import write_profile
    from experiments.scenario.resolve import resolve

    limits = setup.system.limits
    longest = max(sum(pair) for pair in setup.problem.workload.lengths)
    settings = Settings(
        model=experiment.model,
        tp=_degrees(setup),
        dtypes=(setup.problem.model.dtype,),
        device=device,
        minutes=minutes,
        limits=Limits(
            tokens=max(64, limits.max_num_batched_tokens or CPU_LIMITS.tokens),
            sequences=max(64, limits.max_num_seqs),
            context_tokens=max(64, longest),
        ),
        gpu=_only_gpu(setup),
        threads=1 if device == "cpu" else None,
    )
    path = folder.with_name(f"{folder.name}-profile.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    log.say(f"measures {device} for {minutes:g} minutes, into {path}")
    outcome = calibrate(settings, path)
    write_profile(outcome.profile, path, outcome.samples)
    finish(path)
    return resolve(experiment.model_copy(update={"latency": str(path)}))


def _degrees(setup: Setup) -> tuple[int, ...]:
    """Tensor-parallel degrees of the plan that will run."""
    from dataclasses import replace

    plan = setup.system.planner.plan(replace(setup.problem, limits=setup.system.limits))
    return tuple(sorted({stage.tp for replica in plan.replicas for stage in replica.stages}))


def _only_gpu(setup: Setup) -> str:
    from sim.types import ConfigError

    cluster = setup.problem.cluster
    kinds = sorted({cluster.gpu(gpu_id).name for gpu_id in cluster.gpu_ids})
    if len(kinds) > 1:
        raise ConfigError(f"--minutes: one device cannot be measured as {', '.join(kinds)}; give profiles in 'latency'")
    return kinds[0]


# ---------------------------------------------------------------- what is printed


def print_report(summary: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = f"{summary['name']}: {summary['system']} ({summary['mirrors']}), {summary['model']} on {summary['device']}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{what}, {summary['mode']}", title_justify="left")
    table.add_column("metric", no_wrap=True)
    both = any(row["measured_steps"] is not None for row in summary["figures"])
    for name in ("predicted", "real (median)", "error", "noise floor", *(("stepped", "apart") if both else ())):
        table.add_column(name, justify="right")
    for row in summary["figures"]:
        table.add_row(
            f"{row['metric']} {row['statistic']}", _figure(row["predicted"]), _figure(row["real"]),
            _signed(row["error"]), _percent(row["noise"]),
            *((_figure(row["measured_steps"]), _signed(row["apart"])) if both else ()),
        )  # fmt: skip
    console.print(table)
    for line in _lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(summary: Mapping[str, Any]) -> list[str]:
    parts = summary["attribution"]
    loads = ", ".join("?" if load is None else f"{load:.1f}" for load in summary["load_average"])
    lines = [
        f"{summary['compared']} of {summary['requests']} requests compared over {summary['runs']} real runs; the "
        f"busiest replica computes {summary['busy_share']:.0%} of the time; the machine's load average: {loads or '-'}",
        "where the error comes from:",
        *(f"  {name.replace('_', ' ')}: {_PARTS[name](parts[name])}" for name in _PARTS),
    ]
    if summary["lost"] is not None:
        lines.append(f"incomplete: {summary['lost']}")
    for name in summary["beyond_tolerance"]:
        lines.append(f"past the tolerance of {summary['tolerance'][name]:.0%}: {name}")
    return lines


def _workload(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "arrivals are on time (virtual clock)"
    return (
        f"requests taken in {part['mean_late_s'] * 1e3:.2f} ms late (mean), {part['max_late_s'] * 1e3:.1f} ms at most"
    )


def _step_time(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "-"
    return "; ".join(
        f"{name} {own['error']:+.1%} of {own['measured_mean_s'] * 1e3:.1f} ms ({own['steps']:,})"
        for name, own in part.items()
    )


def _scheduling(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "-"
    if part["diverged"]:
        return f"{len(part['diverged'])} replays went another way: {part['diverged'][0]}"
    errors = (part["largest_ttft_error"], part["largest_e2e_error"])
    return f"replayed steps give each request's TTFT within {_percent(errors[0])}, its E2E within {_percent(errors[1])}"


def _transfer(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "no KV moved between machines"
    return f"{part['error']:+.1%} of {part['measured_mean_s'] * 1e3:.1f} ms ({part['moves']:,} moves)"


_PARTS = {"workload": _workload, "step_time": _step_time, "scheduling": _scheduling, "transfer": _transfer}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}" if value < 0.01 else f"{value:.1%}"
