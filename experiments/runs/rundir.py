"""Run directories: a finished run as files, written whole or not at all, and read back for plots and studies.

A directory holds scenario.yaml (resolved, so that it can be run again), summary.json, the tables
requests, steps, links, memory, replicas and notes as Parquet, environment.json, and on request tokens: per request
the list of gaps between its tokens.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.outside import clip, is_file, read_json
from sim.record import Result
from sim.types import ConfigError

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("requests", "steps", "links", "memory", "replicas")
OPTIONAL_TABLES = ("notes", "tokens")
MARK = "summary.json"
"""The file by which a directory of ours is known."""
NEW = ".new-"
"""Begins the names of folders whose files are not yet in their places."""
JOURNAL = "journal.jsonl"
"""Of a job that is under way, or was: what is finished of it."""
PACKAGES = ("phasewise", "numpy", "scipy", "pandas", "pyarrow", "simpy", "pydantic", "matplotlib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run as plots see it: its summary and its tables (columns as in ``Result``)."""

    name: str
    summary: Mapping[str, Any]
    requests: pd.DataFrame
    steps: pd.DataFrame
    links: pd.DataFrame
    memory: pd.DataFrame
    replicas: pd.DataFrame
    notes: pd.DataFrame | None = None
    tokens: pd.DataFrame | None = None
    """Columns request, gaps_s: a list of the seconds between its consecutive tokens."""

    @classmethod
    def of(cls, name: str, result: Result, summary: Mapping[str, Any], *, tokens: bool = False) -> Run:
        """``tokens`` keeps the time of every token, which takes eight bytes each."""
        tables = {table: getattr(result, table) for table in (*TABLES, "notes")}
        return cls(name=name, summary=summary, **tables, tokens=_token_table(result) if tokens else None)


def write_run(folder: Path, run: Run, scenario_yaml: str) -> Path:
    """Write a run directory; one that is there is replaced. ``ConfigError`` if the folder cannot be used."""
    with whole_folder(folder) as new:
        write_run_files(new, run, scenario_yaml)
    return folder


def write_run_files(folder: Path, run: Run, scenario_yaml: str) -> None:
    """The files of a run directory, into a folder that is there."""
    folder.joinpath("scenario.yaml").write_text(scenario_yaml, encoding="utf-8")
    write_json(folder / MARK, run.summary)
    write_json(folder / "environment.json", environment())
    for name in (*TABLES, *OPTIONAL_TABLES):
        table = getattr(run, name)
        if table is None:
            continue
        listed = {column: table[column].map(list) for column in table.columns if _holds_tuples(table[column])}
        table.assign(**listed).to_parquet(folder / f"{name}.parquet", index=False)


def read_run(folder: Path) -> Run:
    """Read a run directory back. ``ConfigError`` names what is missing or damaged."""
    import pandas as pd

    try:
        summary = read_summary(folder)
        there = [name for name in OPTIONAL_TABLES if folder.joinpath(f"{name}.parquet").is_file()]
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in (*TABLES, *there)}
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder}: the run directory is damaged: {reason}; run the scenario again") from None
    return Run(name=summary.get("name") or folder.name, summary=summary, **tables)


def read_summary(folder: Path) -> dict[str, Any]:
    """What a run directory says of itself."""
    check_run(folder)
    summary = read_json(folder / MARK, "summary", mend="the run directory is damaged; run the scenario again")
    if not isinstance(summary, dict):
        raise ConfigError(f"{folder / MARK}: it must hold an object; run the scenario again")
    return summary


def check_run(folder: Path) -> None:
    if not is_file(folder / MARK):
        raise ConfigError(
            f"{clip(str(folder))}: not a run directory (it has no {MARK}); make one with 'phasewise run --out'"
        )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Refuse, before any work is done, a target that is not ours to replace or that cannot be made."""
    try:
        folder.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be a path"
        raise ConfigError(f"--out {clip(str(folder))}: {reason}; name another folder") from None
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--out {folder}: it is not a directory; name a new one")
    ours = any(folder.joinpath(name).is_file() for name in (MARK, JOURNAL))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ConfigError(f"--out {folder}: it is not empty and not a run directory; name a new one")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {folder}: {parent} cannot be written to; name another folder")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place if the block succeeds, and vanishes if not."""
    check_writable(folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name another folder") from None
    try:
        yield new
        new.chmod(0o755)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ConfigError(f"--out {folder}: {error.strerror or error}; name another folder") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _take_place(new, folder)


def _take_place(new: Path, folder: Path) -> None:
    """What is finished is under one name or the other at every instant, and stays if the last step fails."""
    try:
        if not folder.exists():
            new.rename(folder)
            return
        if not _exchange(new, folder):
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=new.parent))
            folder.rename(aside)
            try:
                new.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            new = aside
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror or error}; the finished result is in {new}") from None
    shutil.rmtree(new, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system can (Linux: renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block has succeeded; else nothing is there."""
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".phasewise-", dir=folder))
    except OSError as error:
        raise ConfigError(f"{clip(str(folder))}: {error.strerror}; name another folder with --out") from None
    try:
        yield new
        for path in sorted(new.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to: {error.strerror}; name another with --out") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()


@contextmanager
def into_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside ``folder`` whose files go there, each whole, if the block succeeds; others stay."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{NEW}*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=NEW, dir=folder) as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir(), key=lambda file: file.name == MARK):
                file.replace(folder / file.name)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror or error}; name another folder") from None


def environment() -> dict[str, Any]:
    """What a result depends on beside the scenario: interpreter, machine, package versions, commit if any."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "packages": versions,
        "git_commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree, where it is one."""
    here = Path(__file__).resolve().parents[2]
    if not here.joinpath(".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _token_table(result: Result) -> pd.DataFrame:
    import pandas as pd

    gaps = pd.Series([gaps.tolist() for gaps in result.token_gaps_s()], dtype=object)
    return pd.DataFrame({"request": result.columns["request"], "gaps_s": gaps})


def _holds_tuples(column: pd.Series[Any]) -> bool:
    return len(column) > 0 and isinstance(column.iloc[0], tuple)
