"""The journal of a job: every finished point as one line of JSON, on disk before the next is begun.

Lines are written whole and synced; a line that was cut off by a crash is dropped when the journal is opened again. The
first line says which study it is, so that another one in the same folder is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs.rundir import JOURNAL
from sim.types import ConfigError

FILE = JOURNAL
MARK = "phasewise-journal"


class JobLostError(ConfigError):
    """The job cannot go on: there is nobody to ask, or nowhere to keep the answers. No point is at fault."""


class Entry(NamedTuple):
    """``failed``: why there is no answer, else None."""

    answer: Any
    failed: str | None


class Journal:
    """Answers by key. ``study``: what is done in this folder (its name and a hash); None of it: in memory alone."""

    def __init__(self, entries: dict[str, Entry], descriptor: int | None = None) -> None:
        self.entries = entries
        self._descriptor = descriptor

    def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    def add(self, key: str, answer: Any, failed: str | None = None) -> None:
        """Keep an answer (JSON data). It is on disk when this returns; ``JobLostError`` if it cannot be."""
        if self._descriptor is not None:
            try:
                _append(self._descriptor, {"key": key, "answer": answer, "failed": failed})
            except OSError as error:
                raise JobLostError(
                    f"the journal cannot be written: {error.strerror}; what was finished is kept: make room, and run "
                    "the same command again"
                ) from None
        self.entries[key] = Entry(answer, failed)

    def forget_failures(self) -> None:
        """So that they are tried again."""
        self.entries = {key: entry for key, entry in self.entries.items() if entry.failed is None}


@contextmanager
def opened(folder: Path | None, study: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a folder, continued if it is of the same study.

    ``ConfigError`` if the folder cannot be used, holds another study, or is being written to by another process.
    """
    if folder is None:
        yield Journal({})
        return
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose another folder with --out") from None
    try:
        _lock(descriptor, path)
        try:
            entries = _continued(descriptor, path, study)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}; choose another folder with --out"
            ) from None
        yield Journal(entries, descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """A folder's study and its answers, without opening it to write. ``ConfigError`` if there is no journal."""
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError:
        raise ConfigError(f"{folder}: no job was run there (it has no {FILE})") from None
    lines = _lines(data, path)
    if not lines:
        raise ConfigError(f"{path}: empty; run the job again")
    return lines[0].get("study", {}), _entries(lines[1:])


def _continued(descriptor: int, path: Path, study: Mapping[str, Any]) -> dict[str, Entry]:
    data = b""
    while part := os.read(descriptor, 1 << 20):
        data += part
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.ftruncate(descriptor, whole)
    lines = _lines(data[:whole], path)
    if not lines:
        _append(descriptor, {"journal": MARK, "study": dict(study)})
        return {}
    found = lines[0].get("study", {})
    if found.get("hash") != study.get("hash"):
        raise ConfigError(
            f"{path.parent}: another job was run there ({_called(found)}; this one: {_called(study)}); choose another "
            "folder with --out, or remove it"
        )
    return _entries(lines[1:])


def _called(study: Mapping[str, Any]) -> str:
    return f"{study.get('name', 'unnamed')}, {str(study.get('hash', ''))[:8]}"


def _lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError:
        raise ConfigError(f"{path}: damaged: a line is not JSON; remove it to begin anew") from None
    if lines and (not isinstance(lines[0], dict) or lines[0].get("journal") != MARK):
        raise ConfigError(f"{path}: not a journal of ours; choose another folder with --out")
    return lines


def _entries(lines: list[dict[str, Any]]) -> dict[str, Entry]:
    """The last word on a key counts: a failure may have been tried again."""
    return {line["key"]: Entry(line["answer"], line["failed"]) for line in lines}


def _append(descriptor: int, value: Mapping[str, Any]) -> None:
    data = json.dumps(value, separators=(",", ":"), allow_nan=True).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """One process at a time; the system lets go of the lock when its holder dies, however it does."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path.parent}: a job is being run there by another process; wait, or choose another --out"
        ) from None
