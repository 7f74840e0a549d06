"""``fetch``: public traces from where they are published, checked against known SHA-256 sums.

A download that is cut off leaves a hidden ``.partial`` file, which the next request continues (HTTP Range); the
file appears under its name only when complete and right. ``public.py`` is the table of what there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sim.types import ConfigError
from traces.public import PUBLIC_TRACES, PublicTrace
from traces.table import nearest
from traces.wrapping import Progress

TIMEOUT_S = 30.0


def fetch(
    name: str,
    folder: str | Path,
    progress: Progress | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    table: Mapping[str, PublicTrace] = PUBLIC_TRACES,
) -> Path:
    """The path of a public trace in ``folder``, downloaded unless it is there; ``progress`` gets bytes and total.

    ``timeout_s``: how long the server may be silent. ConfigError for an unknown name, a folder that cannot be
    written, no connection, an answer other than the file, or a file with another checksum: nothing
    is left under the trace's name then, and what was right so far is kept for the next call.
    """
    if name not in table:
        raise ConfigError(f"public trace '{name}' is unknown; {nearest(name, table)}")
    trace = table[name]
    path = Path(folder) / trace.file
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists():
            _check(path, trace, f"{path} is there with other content; move it away")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        from traces.download import download  # it loads Python's HTTP client, which nothing else needs

        download(trace, partial, progress, timeout_s)
        try:
            _check(partial, trace, f"{trace.url} is not the file it was; ask its publisher, or read your own copy")
        except ConfigError:
            partial.unlink()
            raise
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; choose another folder") from None
    return path


def _check(path: Path, trace: PublicTrace, complaint: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != trace.sha256:
        raise ConfigError(f"{complaint} (SHA-256 {found}, expected {trace.sha256})")
