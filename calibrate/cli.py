"""``phasewise calibrate``: measure operators on the device at hand and write a latency profile.

stdout is the result, stderr the log. The simulator, torch and pydantic are loaded when a command needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrate import commands_import

if TYPE_CHECKING:
    from calibrate.bench.runner import Progress
    from calibrate.bench.shapes import Limits
    from calibrate.measure import Outcome, Settings

app = typer.Typer(
    help="Measure this machine's operators and write a latency profile; report on profiles, import public ones.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
commands_import.register(app)


@app.callback(invoke_without_command=True)
def calibrate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="catalogue name, or the path of a Hugging Face config.json")
    ] = None,
    tp: Annotated[
        str, typer.Option(help="tensor-parallel degrees, comma-separated; one shard of each is measured")
    ] = "1",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32, comma-separated; default: the model's own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu")] = "auto",
    minutes: Annotated[
        float, typer.Option(help="time to measure; the coarse grid is measured whole in any case")
    ] = 10.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the profile; default: measured-DEVICE-MODEL.json here")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="forget what an interrupted run measured")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="write the profile even if its error is above --max-error")
    ] = False,
    max_error: Annotated[float, typer.Option(help="largest mean held-out error of an operator, as a share")] = 0.15,
    max_tokens: Annotated[int | None, typer.Option(help="most tokens of a step; default: 8192, cpu 512")] = None,
    max_seqs: Annotated[int | None, typer.Option(help="most decoding sequences; default: 256, cpu 64")] = None,
    max_context: Annotated[int | None, typer.Option(help="longest context; default: 32768, cpu 2048")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="the device's name in 'phasewise gpus', where it is not found")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="threads of the CPU; default: torch's choice")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no log on stderr")] = False,
) -> None:
    """Measure a model operator by operator and in steps of few layers, and write a latency profile.

    Each point is kept in a journal beside the profile: the same command continues after an interruption.
    """
    if context.invoked_subcommand is not None:
        return

    if model is None:
        from sim.types import ConfigError

        raise ConfigError("calibrate: --model is missing; give a catalogue name ('phasewise models') or a config.json")
    from calibrate.measure import Settings

    settings = Settings(
        model=model,
        tp=_degrees(tp),
        dtypes=tuple(dtype.split(",")) if dtype else (),
        device=device,
        minutes=minutes,
        max_error=max_error,
        limits=_limits(device, max_tokens, max_seqs, max_context),
        gpu=gpu,
        threads=threads,
    )
    target = out or Path(f"measured-{device.replace(':', '')}-{settings.specs()[0].name}.json")
    _measure(settings, target, restart=restart, force=force, quiet=quiet)


def _measure(settings: Settings, out: Path, *, restart: bool, force: bool, quiet: bool) -> None:
    from calibrate.measure import calibrate as measured
    from calibrate.measure import check, finish, journal_path
    from calibrate.profile.file import write_profile

    if journal_path(out).exists() and not restart:
        _say(f"continues with what {journal_path(out)} holds", quiet)
    try:
        with _bar(quiet) as progress:
            outcome = measured(settings, out, restart=restart, progress=progress)
    except KeyboardInterrupt:
        _say(f"interrupted; what was measured is kept in {journal_path(out)}, the same command continues", quiet)
        raise typer.Exit(130) from None
    for reason in outcome.skipped:
        _say(f"skipped {reason}", quiet)
    _print(outcome)
    if not force:
        check(outcome.profile, settings.max_error)
    write_profile(outcome.profile, out, outcome.samples)
    finish(out)
    print(f"wrote {out}")


def _print(outcome: Outcome) -> None:
    """A line per operator of every entry."""
    from calibrate.measure_fit import noise

    noises = {(part.tp, part.operator): noise(part) for part in outcome.samples}
    print(f"{'operator':<26}{'TP':>3}{'points':>8}{'held-out':>10}{'largest':>9}{'noise':>7}")
    for entry in outcome.profile.entries:
        for name, held in entry.held_out.items():
            spread = noises.get((entry.tp, name))
            shown = f"{'-' if spread is None else f'{spread:.1%}':>7}"
            print(f"{name:<26}{entry.tp:>3}{held.points:>8}{held.mape:>10.1%}{held.largest:>9.1%}{shown}")


def _degrees(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        from sim.types import ConfigError

        raise ConfigError(f"--tp: {text!r} must be whole numbers with commas between, such as 1,2") from None


def _limits(device: str, tokens: int | None, sequences: int | None, context: int | None) -> Limits | None:
    """What is given, on top of the device's own; None: nothing is."""
    if (tokens, sequences, context) == (None, None, None):
        return None
    from calibrate.measure import default_limits, require_torch

    require_torch()
    own = default_limits(device)
    return type(own)(
        tokens=own.tokens if tokens is None else tokens,
        sequences=own.sequences if sequences is None else sequences,
        context_tokens=own.context_tokens if context is None else context,
    )


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.fields[points]} points, {task.fields[left]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=1.0, points=0, left="")

        def show(progress: Progress) -> None:
            left = f"{progress.left_s / 60:.0f} min left" if progress.left_s > 90 else f"{progress.left_s:.0f} s left"
            share = progress.spent_s / max(1e-9, progress.spent_s + progress.left_s)
            bar.update(task, description=progress.operator, completed=share, points=progress.measured, left=left)

        yield show


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(f"phasewise: {text}", file=sys.stderr)
