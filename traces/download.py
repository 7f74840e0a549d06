"""``download``: a file over HTTP into a partial file, continued where an earlier answer was cut off."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.types import ConfigError
from traces.public import PublicTrace
from traces.wrapping import Progress

ATTEMPTS = 5  # requests to the server in one call, of which each must bring bytes
CHUNK_BYTES = 2**16


def download(trace: PublicTrace, partial: Path, progress: Progress | None, timeout_s: float) -> None:
    """Ask for what is missing until the file has its size; give up when an answer brings nothing."""
    best = -1
    for _ in range(ATTEMPTS):
        have = partial.stat().st_size if partial.exists() else 0
        if have >= trace.size_bytes or have <= best:
            break
        best = have
        try:
            resumed = _receive(trace, partial, have, progress, timeout_s)
            why = "the connection was cut" + ("" if resumed else ", and the server cannot continue (it ignores Range)")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.unlink()
            raise ConfigError(f"{trace.url}: the server answers {error.code} {error.reason}; try again later") from None
        except urllib.error.URLError as error:
            why = str(error.reason) or type(error.reason).__name__
    have = partial.stat().st_size if partial.exists() else 0
    if have < trace.size_bytes:
        kept = f"{have:,} of {trace.size_bytes:,} bytes are kept"
        raise ConfigError(f"{trace.url}: {why} ({kept}); check the network and try again")


def _receive(trace: PublicTrace, partial: Path, have: int, progress: Progress | None, timeout_s: float) -> bool:
    """One answer, appended; False if the server began anew where a part was asked for."""
    request = urllib.request.Request(trace.url, headers={"User-Agent": "phasewise"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _network(lambda: urllib.request.urlopen(request, timeout=timeout_s)) as answer:
        resumed = answer.status == http.client.PARTIAL_CONTENT
        done = have if resumed else 0
        size = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length")
        if size not in (None, "*", str(trace.size_bytes)):
            raise ConfigError(f"{trace.url} has {size} bytes, expected {trace.size_bytes}; it is not the file it was")
        with partial.open("ab" if resumed else "wb") as file:
            while done < trace.size_bytes and (chunk := _network(lambda: answer.read(CHUNK_BYTES))):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, trace.size_bytes)
    return resumed or not have


def _network(act: Callable[[], Any]) -> Any:
    """What can go wrong on the way, as URLError, so that it is told from what can go wrong on the disk."""
    try:
        return act()
    except urllib.error.URLError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise urllib.error.URLError(error) from None
