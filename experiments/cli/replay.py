"""``phasewise replay | compare-run``: a trace against a real server, and a real server's result beside a prediction."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experiments.runs.vllm_bench import Bench
    from experiments.validation.dialect import PromptKind
    from experiments.validation.measured import Comparison
    from experiments.validation.replay import Manners, Replay
    from sim.types import Request

INTERRUPTED = 130
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log on stderr")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field of the scenario; repeatable")
]


def register(app: typer.Typer) -> None:
    app.command()(replay)
    app.command("compare-run")(compare_run)


def replay(
    url: Annotated[str, typer.Option(help="of an OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON to write, as 'vllm bench serve' does")],
    trace: Annotated[str | None, typer.Option(metavar="FILE", help="a trace file, or 'sample'")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="trace format; guessed where unambiguous")] = None,
    scenario: Annotated[
        Path | None, typer.Option(metavar="FILE", help="in place of --trace: a scenario file, for its workload")
    ] = None,
    set_: Overrides = None,
    rate: Annotated[float | None, typer.Option(help="draw Poisson arrivals anew, requests/s")] = None,
    limit: Annotated[int | None, typer.Option(help="the first N requests")] = None,
    seed: Annotated[int | None, typer.Option(help="of arrivals; default: the scenario's, or 0")] = None,
    model: Annotated[str | None, typer.Option(help="default: the first one that the server lists")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="ids (of tokens) or words; default: ids if the server takes them")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="ask for whole answer lengths, if the server knows how")] = True,
    concurrency: Annotated[int, typer.Option(min=1, help="most requests under way at a time")] = 256,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="longest time a request may take, in all")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="of a failed request")] = 0,
    give_up_after: Annotated[int, typer.Option(min=0, help="failures in a row that end the replay; 0: never")] = 20,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="environment variable that holds the key, if one is needed")
    ] = "OPENAI_API_KEY",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a trace's requests to a real server at their times, and measure TTFT, ITL and E2E at the client.

    Only the host in --url is contacted. Ctrl-C keeps what was measured so far, marked as partial. Exit code 1 if
    nothing completed or the replay ended early, 130 after Ctrl-C.
    """
    import asyncio

    from experiments.runs.progress import Log
    from experiments.runs.vllm_bench import figures, write_bench
    from experiments.validation.replay import Manners

    log = Log(quiet)
    _check_file(out)
    requests = _requests(trace, format_, scenario, list(set_ or ()), rate, limit, seed)
    manners = Manners(concurrency=concurrency, retries=retries, give_up_after=give_up_after)
    key = os.environ.get(api_key_env) or None
    done = asyncio.run(_measure(url, key, timeout_s, model, _kind(prompt), ignore_eos, requests, manners, quiet))
    bench = done.bench()
    write_bench(out, bench, **done.fields())
    for remark in done.remarks():
        log.say(remark)
    log.say(f"wrote {out}")
    _print_figures(figures(bench), json_)
    if done.stopped == "interrupted":
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if done.stopped is None and any(not row.error for row in done.answers) else 1)


def compare_run(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="what is predicted: a file, or a run directory")],
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="of 'replay', or of a load generator: docs lists them")
    ],
    workload: Annotated[
        str, typer.Option(help="which requests are simulated: 'file', those of RESULT, or 'scenario', its own")
    ] = "file",
    benchmark: Annotated[int | None, typer.Option(help="which one of a file of several, from 0")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="exit code 1 if a metric's error is greater, e.g. 0.15, or if no latency was compared"
        ),
    ] = None,
    despite: Annotated[
        bool, typer.Option("--despite", help="compare although RESULT names another model, GPU or tensor parallelism")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="figures and tables")] = None,
    set_: Overrides = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a real server's result beside its prediction, metric by metric and request by request.

    By default the requests of RESULT that were served are simulated, at the times they were sent, on the scenario's
    cluster and system. A run directory is taken as it is.
    """
    from experiments.runs.progress import Log
    from experiments.runs.rundir import check_writable, read_run
    from experiments.scenario.file import Scenario
    from experiments.validation.measured import (
        compare,
        disagreements,
        facts_of_run,
        facts_of_scenario,
        of_saved,
        predict,
        read_measured,
    )
    from sim.types import ConfigError

    if workload not in ("file", "scenario"):
        raise ConfigError(f"--workload {workload}: must be file or scenario")
    log = Log(quiet)
    if out is not None:
        check_writable(out)
    measured = read_measured(result, benchmark)
    if scenario.is_dir():
        run = read_run(scenario)
        remarks = disagreements(measured, facts_of_run(run), None, despite=despite)
        predicted = of_saved(run)
    else:
        own = workload == "scenario"
        spec = Scenario.load(scenario, set_ or ())
        remarks = disagreements(measured, facts_of_scenario(spec), spec if own else None, despite=despite)
        with log.counting("prediction") as progress:
            predicted = predict(spec, measured, own=own, progress=progress)
    comparison = compare(measured, predicted)
    comparison.remarks.extend(remarks)
    if out is not None:
        _save_comparison(out, measured.bench, predicted, comparison)
        log.say(f"figures and tables are in {out}")
    log.say(f"{result.name}: read as a result of {measured.source}")
    for remark in comparison.remarks:
        log.say(remark)
    _print_comparison(comparison, json_)
    beyond = [] if tolerance is None else comparison.beyond(tolerance)
    if beyond:
        log.say(f"beyond {tolerance:.0%}: {', '.join(beyond)}")
    vacuous = tolerance is not None and not comparison.judged
    if vacuous:
        log.say("no latency was compared: --tolerance has nothing to judge")
    raise typer.Exit(1 if beyond or vacuous else 0)


async def _measure(
    url: str,
    key: str | None,
    timeout_s: float,
    model: str | None,
    prompt: PromptKind | None,
    ignore_eos: bool,
    requests: list[Request],
    manners: Manners,
    quiet: bool,
) -> Replay:
    from experiments.runs.progress import Log
    from experiments.sweeps.sweep import bar
    from experiments.validation.completions import connected
    from experiments.validation.dialect import agree
    from experiments.validation.replay import replay

    async with connected(url, key=key, timeout_s=timeout_s, connections=manners.concurrency) as server:
        dialect = await agree(server, model or await server.first_model(), prompt=prompt, ignore_eos=ignore_eos)
        how = "forced" if dialect.ignore_eos else "not forced"
        Log(quiet).say(f"{dialect.shown}: prompts are {dialect.prompt}, answer lengths are {how}")
        with bar(len(requests), "requests", quiet=quiet) as step:
            return await replay(server, requests, dialect, manners, step)


def _requests(
    trace: str | None,
    format_: str | None,
    scenario: Path | None,
    overrides: list[str],
    rate: float | None,
    limit: int | None,
    seed: int | None,
) -> list[Request]:
    """The workload to send, as a simulation of it would get it."""
    from experiments.scenario.file import Scenario
    from experiments.scenario.resolve import resolve
    from sim.types import ConfigError

    if (trace is None) == (scenario is None):
        raise ConfigError("replay: give either --trace FILE or --scenario FILE")
    given = {"workload.rate": rate, "workload.limit": limit, "seed": seed}
    pairs = [*overrides, *(f"{name}={value}" for name, value in given.items() if value is not None)]
    if scenario is None:
        if overrides:
            raise ConfigError("--set: belongs to --scenario; a trace has --rate, --limit and --seed")
        return _of_trace(trace, format_, rate, limit, seed)
    spec = Scenario.load(scenario, pairs)
    for name in ("closed_loop", "sessions"):
        if getattr(spec.workload, name) is not None:
            raise ConfigError(
                f"{scenario}: workload.{name}: a replay waits for nobody; write the workload as a trace with "
                f"'phasewise trace workload' and replay that"
            )
    return list(resolve(spec).requests)


def _of_trace(
    trace: str | None, format_: str | None, rate: float | None, limit: int | None, seed: int | None
) -> list[Request]:
    from pydantic import ValidationError

    from experiments.scenario.complaints import first_fault
    from experiments.scenario.requests import RequestStream
    from experiments.scenario.workload import WorkloadSpec
    from sim.types import ConfigError

    try:
        workload = WorkloadSpec(trace=trace, format=format_, rate=rate, limit=limit)
    except ValidationError as error:
        raise ConfigError(f"replay: {first_fault(error)}") from None
    requests = list(RequestStream(workload, seed=seed or 0, max_model_len=None))
    if not requests:
        raise ConfigError(f"{trace}: no request to send")
    return requests


def _kind(prompt: str | None) -> PromptKind | None:
    from sim.types import ConfigError

    kinds: dict[str | None, PromptKind | None] = {None: None, "ids": "ids", "words": "words"}
    if prompt not in kinds:
        raise ConfigError(f"--prompt {prompt}: must be ids or words")
    return kinds[prompt]


def _check_file(out: Path) -> None:
    """Before anything is measured: the file can be written."""
    from sim.types import ConfigError

    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: cannot be written there; name a file in a folder that is there")


def _print_figures(found: dict[str, Any], json_: bool) -> None:
    if json_:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{found['completed']} completed, {found['failed']} failed in {found['duration']:.1f} s; "
        f"{_shown(found['request_throughput'])} requests/s, {_shown(found['output_throughput'])} output tokens/s",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("ms")
    words = {"mean": "mean", "median": "p50", "p90": "p90", "p99": "p99"}
    for word in words.values():
        table.add_column(word, justify="right")
    for name in ("ttft", "tpot", "itl", "e2el"):
        table.add_row(name.upper(), *(_shown(found[f"{word}_{name}_ms"]) for word in words))
    console.print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _save_comparison(out: Path, measured: Bench | None, predicted: Bench, comparison: Comparison) -> None:
    import pandas as pd

    from experiments.plots.measured import request_scatter
    from experiments.plots.run.latency import latency_cdfs
    from experiments.plots.style import save
    from experiments.runs.rundir import MARK, whole_folder, write_json
    from sim.types import Slo

    with whole_folder(out) as new:
        pd.DataFrame(comparison.rows).to_csv(new / "metrics.csv", index=False, lineterminator="\n")
        if measured is not None:
            save(latency_cdfs({"measured": measured, "predicted": predicted}, Slo()), new, "latency")
        if comparison.requests is not None:
            save(request_scatter("Requests, measured and predicted", comparison.requests), new, "requests")
        write_json(new / MARK, {"name": out.name, "metrics": comparison.rows, "requests": comparison.per_request()})


def _print_comparison(comparison: Comparison, json_: bool) -> None:
    if json_:
        found = {"metrics": comparison.rows, "requests": comparison.per_request(), "remarks": comparison.remarks}
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("metric", "measured", "predicted", "error"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in comparison.rows:
        error = "-" if row["error"] is None else f"{row['error']:+.1%}"
        table.add_row(row["metric"], _shown(row["measured"]), _shown(row["predicted"]), error)
    console = Console()
    console.print(table)
    for name, spread in comparison.per_request().items():
        if spread["p50"] is not None:
            line = f"{name} of each request: off by {spread['p50']:.1%} (median), {spread['p90']:.1%} (p90)"
            console.print(line, highlight=False)
    if comparison.requests is None:
        console.print("the requests are not the same on both sides: no comparison one by one", highlight=False)
