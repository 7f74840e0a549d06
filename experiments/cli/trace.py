"""``phasewise trace stats | convert | generate | workload | fetch``: traces without a simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from experiments.scenario.requests import RequestStream

app = typer.Typer(
    help="Describe, convert, generate and download request traces.", no_args_is_help=True, rich_markup_mode=None
)

Trace = Annotated[str, typer.Argument(metavar="TRACE", help="a trace file, or 'sample'")]
FormatName = Annotated[str | None, typer.Option("--format", help="trace format; guessed where unambiguous")]
BlockTokens = Annotated[int | None, typer.Option(help="tokens per prefix hash, for formats that do not say")]
TimeUnit = Annotated[str | None, typer.Option(help="s, ms, us or ns, for formats that do not say")]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD=NAME,...", help="any table: arrival_s=ts_ms/1000,input_tokens=prompt,output_tokens=completion"
    ),
]
Characters = Annotated[float | None, typer.Option(help="count the tokens of a text so (4 is usual for English)")]
Tokenizer = Annotated[str | None, typer.Option(metavar="FILE", help="count them with a tokenizer.json")]
Turns = Annotated[str | None, typer.Option(help="of conversations: the 'first' turn of each, or 'all'")]
Sort = Annotated[bool, typer.Option("--sort", help="order by arrival (holds the trace in memory)")]
Limit = Annotated[int | None, typer.Option(help="the first N requests")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log on stderr")]
Seed = Annotated[int, typer.Option(help="seed of drawn arrivals and lengths")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="file to write: .csv or .parquet")]
Arrivals = Annotated[str, typer.Option(help="poisson, constant, gamma, bursts or ramp")]
Cv = Annotated[float | None, typer.Option(help="coefficient of variation of gamma arrivals")]
TokenSeconds = Annotated[
    float, typer.Option(help="of turns and clients that wait: how long an answer takes, per output token")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--arrival", metavar="KEY=SECONDS", help="of bursts: on_s, off_s; of ramp: start_rate_per_s, ramp_s"),
]


@app.command()
def stats(
    trace: Trace,
    format_: FormatName = None,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    columns: Columns = None,
    characters_per_token: Characters = None,
    tokenizer: Tokenizer = None,
    turns: Turns = None,
    sort: Sort = False,
    limit: Limit = None,
    json_: Json = False,
    plot: Annotated[Path | None, typer.Option(help="draw the figures to this .png; .svg and .csv beside it")] = None,
) -> None:
    """Size, rate, lengths, burstiness and prefix reuse of a trace."""
    from sim.types import ConfigError
    from traces import survey

    options = _options(
        block_tokens=block_tokens, time_unit=time_unit, columns=columns, characters_per_token=characters_per_token,
        tokenizer=tokenizer, turns=turns,
    )  # fmt: skip
    stream = _stream(trace, format=format_, sort=sort, limit=limit, **options)
    _say_remarks(stream)
    surveyed = survey(stream)
    figures = {**surveyed.statistics, "skipped": stream.skipped}
    if plot is not None:
        if not plot.parent.is_dir():
            raise ConfigError(f"--plot {plot}: there is no folder {plot.parent}; make it first")
        from experiments.plots.style import save
        from experiments.plots.trace import draw_trace

        save(draw_trace(surveyed, Path(trace).name), plot.parent, plot.stem)
    if json_:
        print(json.dumps(figures, indent=2, allow_nan=False))
        return
    for name, value in figures.items():
        print(f"{name:<20} {'-' if value is None else f'{value:,.6g}' if isinstance(value, float) else f'{value:,}'}")


@app.command()
def convert(
    trace: Trace,
    out: Target,
    format_: FormatName = None,
    block_tokens: BlockTokens = None,
    time_unit: TimeUnit = None,
    columns: Columns = None,
    characters_per_token: Characters = None,
    tokenizer: Tokenizer = None,
    turns: Turns = None,
    sort: Sort = False,
    limit: Limit = None,
    start_s: Annotated[float, typer.Option(help="leave out what arrives before")] = 0.0,
    end_s: Annotated[float | None, typer.Option(help="leave out what arrives from then on")] = None,
    time_scale: Annotated[float | None, typer.Option(help="stretch every interval: 2 halves the rate")] = None,
    rate: Annotated[float | None, typer.Option(help="draw arrivals anew, requests/s")] = None,
    arrivals: Arrivals = "poisson",
    cv: Cv = None,
    arrival: Setting = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Read any known format, slice and rescale it, and write our own format."""
    options = _options(
        block_tokens=block_tokens, time_unit=time_unit, columns=columns, characters_per_token=characters_per_token,
        tokenizer=tokenizer, turns=turns,
    )  # fmt: skip
    stream = _stream(
        trace, seed=seed, format=format_, sort=sort, limit=limit, start_s=start_s, end_s=end_s, time_scale=time_scale,
        rate=rate, arrivals=arrivals, cv=cv, arrival_options=_settings(arrival), **options,
    )  # fmt: skip
    _write(out, stream, quiet)


@app.command()
def generate(
    out: Target,
    requests: Annotated[int, typer.Option(help="how many")] = 1000,
    rate: Annotated[float, typer.Option(help="requests/s")] = 1.0,
    arrivals: Arrivals = "poisson",
    cv: Cv = None,
    arrival: Setting = None,
    input_: Annotated[
        str,
        typer.Option("--input", metavar="LENGTHS", help="input tokens, as in a scenario: {mean: 1155, median: 1020}"),
    ] = "{mean: 1155, median: 1020}",
    output: Annotated[
        str, typer.Option(metavar="LENGTHS", help="output tokens: {fixed: 128}, {uniform: [1, 256]} ...")
    ] = "{mean: 211, median: 129}",
    rank_correlation: Annotated[float, typer.Option(help="of input and output tokens")] = 0.0,
    turns: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS",
            help="draw conversations of so many turns, {uniform: [1, 8]}: "
            "--requests and --rate then count conversations, --input a turn's new text",
        ),
    ] = None,
    think_s: Annotated[float, typer.Option(help="mean time between an answer and the next turn")] = 0.0,
    token_s: TokenSeconds = 0.03,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Draw a trace from distributions; the defaults have the mean and median of Azure's conversations (2023)."""
    spec = {
        "requests": requests,
        "input": _yaml("--input", input_),
        "output": _yaml("--output", output),
        "turns": None if turns is None else _yaml("--turns", turns),
        "rank_correlation": rank_correlation,
    }
    stream = _stream(
        None, seed=seed, generate=spec, rate=rate, arrivals=arrivals, cv=cv, arrival_options=_settings(arrival),
        sessions=None if turns is None else {"think_s": think_s},
    )  # fmt: skip
    _write(out, stream, quiet, token_s)


@app.command()
def workload(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="scenario file (YAML)")],
    out: Target,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a field")] = None,
    token_s: TokenSeconds = 0.03,
    quiet: Quiet = False,
) -> None:
    """Write what a scenario's workload asks: a mix of classes, sessions, bursts, whatever it says."""
    from experiments.scenario.file import Scenario
    from experiments.scenario.requests import RequestStream

    spec = Scenario.load(scenario, set_ or ())
    _write(out, RequestStream(spec.workload, seed=spec.seed, max_model_len=None), quiet, token_s)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="azure-conv, azure-code, mooncake or burstgpt")],
    folder: Annotated[Path, typer.Option("--out", help="folder to keep it in")] = Path(),
    quiet: Quiet = False,
) -> None:
    """Download a public trace, checked by its SHA-256; an interrupted download goes on where it stopped."""
    from experiments.runs.progress import Log
    from traces import fetch as download

    log = Log(quiet)
    with log.counting(f"{name} (bytes)") as show:
        path = download(name, folder, None if show is None else lambda done, total: show(done))
    log.say(f"{name} is in {path}")


def _stream(trace: str | None, *, seed: int = 0, **fields: Any) -> RequestStream:
    """The same stream that a scenario with this workload would replay."""
    from pydantic import ValidationError

    from experiments.scenario.complaints import first_fault
    from experiments.scenario.requests import RequestStream
    from experiments.scenario.workload import WorkloadSpec
    from sim.types import ConfigError

    try:
        workload = WorkloadSpec(trace=trace, **fields)
    except ValidationError as error:
        raise ConfigError(f"trace: {first_fault(error)}") from None
    return RequestStream(workload, seed=seed, max_model_len=None)


def _write(out: Path, stream: RequestStream, quiet: bool, token_s: float = 0.03) -> None:
    """Requests that wait for answers arrive as if each answer took ``token_s`` per token."""
    from experiments.runs.progress import Log
    from traces import unroll, write

    spec = stream.workload
    waits = spec.closed_loop is not None or spec.sessions is not None
    _say_remarks(stream, quiet)
    written = write(out, unroll(stream.source(), token_s) if waits else stream)
    Log(quiet).say(f"wrote {written:,} requests to {out} ({stream.skipped:,} without tokens left out)")


def _say_remarks(stream: RequestStream, quiet: bool = False) -> None:
    from experiments.runs.progress import Log

    for remark in stream.remarks:
        Log(quiet).say(remark)


def _options(**options: Any) -> dict[str, Any]:
    return {"format_options": {name: value for name, value in options.items() if value is not None}}


def _settings(arrival: list[str] | None) -> dict[str, Any]:
    pairs = [item.partition("=") for item in arrival or ()]
    return {key: _yaml("--arrival", value) for key, _, value in pairs}


def _yaml(option: str, text: str) -> Any:
    from sim.outside import parse_yaml

    return parse_yaml(text, f"{option} {text!r}", "value; write it like '{fixed: 128}'")
