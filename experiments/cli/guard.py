"""What stands between a command and the terminal: errors are one line, a defect leaves a report, output arrives or
is missed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

OPTION = "--traceback"


def guarded(command: Callable[[list[str]], object], arguments: Sequence[str]) -> None:
    """Run a command. Exit code 2 for input that cannot be used, 1 for what went wrong in a run, be it a defect.

    ``--traceback`` anywhere among the arguments shows a defect's traceback in place of a report file.
    """
    _usable_streams()
    given = [text for text in arguments if text != OPTION]
    try:
        try:
            command(given)
        finally:
            _flushed()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _leave(error, arguments, shown=len(given) < len(arguments))


def _usable_streams() -> None:
    """A stream that the caller closed is one that nobody reads; what cannot be encoded is escaped."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        print("phasewise: stdout is closed; send it to a file, or to /dev/null", file=sys.stderr)
        sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flushed() -> None:
    """Now, so that a full disk is an error of this command; stdout then leads nowhere, lest Python say it again."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"phasewise: stdout cannot be written: {error.strerror}; the result is lost", file=sys.stderr)
        sys.exit(1)


def _leave(error: Exception, arguments: Sequence[str], *, shown: bool) -> None:
    from sim.outside import clip
    from sim.types import ConfigError, SimulationError

    if shown:
        traceback.print_exception(error)
    if isinstance(error, SimulationError):
        _say(" ".join(str(error).split()))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    if isinstance(error, OSError) and error.filename is not None:
        _say(f"{clip(str(error.filename))}: {error.strerror or type(error).__name__}; check the path")
        sys.exit(2)
    if isinstance(error, ValueError) and "null byte" in str(error):
        _say("a path cannot hold a NUL character; check the paths of the command and of its files")
        sys.exit(2)
    if isinstance(error, OSError):
        _say(f"the output cannot be written: {error.strerror or type(error).__name__}")
        sys.exit(1)
    if isinstance(error, MemoryError):
        _say("there is not enough memory for this; ask for less (fewer requests, GPUs or layers)")
        sys.exit(1)
    what = f"this is a defect of phasewise: {type(error).__name__}: {clip(' '.join(str(error).split()), 100)}"
    _say(f"{what}; " + ("see above" if shown else f"{_report(error, arguments)}; {OPTION} shows it here"))
    sys.exit(1)


def _say(text: str) -> None:
    print(f"phasewise: {''.join(letter if letter.isprintable() else '?' for letter in text)}", file=sys.stderr)


def _report(error: Exception, arguments: Sequence[str]) -> str:
    """Write what a defect's report needs into a file of its own, and say where."""
    from experiments.runs.rundir import environment

    try:
        number, name = tempfile.mkstemp(prefix="phasewise-report-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"phasewise {' '.join(map(repr, arguments))}\nin {Path.cwd()}\n{environment()}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError as failed:
        return f"no report could be written ({failed.strerror})"
    return f"the report is in {name}"
