"""``write``: a stream of requests into our own CSV or Parquet file, complete or not there at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sim.types import ConfigError, Request

COLUMNS = (
    "arrival_s",
    "input_tokens",
    "output_tokens",
    "session",
    "klass",
    "priority",
    "prefix",
    "prefix_block_tokens",
    "samples",
    "beam_search",
    "think_s",
)
ROWS_PER_GROUP = 65536


def write(path: str | Path, requests: Iterable[Request]) -> int:
    """Writes ``.csv`` or ``.parquet`` (by the suffix) and returns the number of requests.

    Requests must be in order of arrival; ids are not written: they are running numbers when read back.
    Streams: memory for one row group. ConfigError for another suffix, an empty stream, or a request
    that cannot be written; an earlier file of that name then stays as it was.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ConfigError(f"{path}: suffix '{path.suffix}' is unknown; use {' or '.join(WRITERS)}")
    with replacing(path) as partial:
        written = WRITERS[path.suffix](partial, _rows(path, requests))
        if not written:
            raise ConfigError(f"{path}: no request to write")
    return written


def _rows(path: Path, requests: Iterable[Request]) -> Iterator[tuple[Any, ...]]:
    last_s = 0.0
    for request in requests:
        if request.arrival_s < last_s:
            raise ConfigError(
                f"{path}: request {request.id} arrives at {request.arrival_s} s, before the one ahead of it"
            )
        for label in (request.session, request.klass):
            if label is not None and label.splitlines() != [label]:
                raise ConfigError(
                    f"{path}: request {request.id}: {label!r} is no session or klass; expected one line of text"
                )
        last_s = request.arrival_s
        yield (
            request.arrival_s,
            request.input_tokens,
            request.output_tokens,
            request.session,
            request.klass,
            request.priority or None,
            " ".join(map(str, request.prefix)) or None,
            request.prefix_block_tokens,
            None if request.samples == 1 else request.samples,
            "true" if request.beam_search else None,
            request.think_s,
        )


def _write_csv(path: Path, rows: Iterator[tuple[Any, ...]]) -> int:
    number = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(row)
            number += 1
    return number


def _write_parquet(path: Path, rows: Iterator[tuple[Any, ...]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, text = pa.int64(), pa.string()
    types = (pa.float64(), whole, whole, text, text, whole, text, whole, whole, text, pa.float64())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    number = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            columns = [pa.array(cells, kind) for cells, kind in zip(zip(*group, strict=True), types, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            number += len(group)
    return number


WRITERS = {".csv": _write_csv, ".parquet": _write_parquet}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place at the end, or is removed after an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
