"""``read``: a trace file as a stream of requests."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sim.types import ConfigError, Request
from traces.formats import FORMATS, Format, guess_format
from traces.table import Progress, Record, clip, nearest, parquet_rows


class TraceReader:
    """The requests of one file, in order of arrival; every iteration reads the file anew.

    ``skipped``: how many requests without input or output tokens the last iteration left out.
    """

    __slots__ = ("format", "limit", "path", "progress", "skipped", "sort")

    def __init__(
        self,
        path: Path,
        format: Format,  # noqa: A002
        *,
        limit: int | None = None,
        sort: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.limit = limit
        self.sort = sort
        self.progress = progress
        self.skipped = 0

    def __iter__(self) -> Iterator[Request]:
        self.skipped = 0
        return islice(self._requests(), self.limit)

    def _requests(self) -> Iterator[Request]:
        path, per_s = self.path, self.format.per_s
        origin = None if self.format.foreign else 0.0
        number, last = 0, float("-inf")
        for number, (line, record) in enumerate(self._kept(), start=1):
            time = record.get("arrival_s", 0)
            if time < last:
                raise ConfigError(
                    f"{path}:{line}: arrives before the line above it; sort the file or read with sort=True"
                )
            last = time
            if origin is None:
                origin = time
            record["arrival_s"] = (time - origin) / per_s
            try:
                request = Request(id=number - 1, **record)
            except ConfigError as error:
                raise ConfigError(f"{path}:{line}: {error}") from None
            yield request
        if number == 0:
            raise ConfigError(f"{path}: no request in the file ({self.skipped} without tokens left out)")

    def _kept(self) -> Iterable[tuple[int, Record]]:
        if self.sort:
            return sorted(self._usable(), key=lambda numbered: numbered[1].get("arrival_s", 0))
        return self._usable()

    def _usable(self) -> Iterator[tuple[int, Record]]:
        rows = parquet_rows if self.path.suffix == ".parquet" else self.format.rows
        foreign, block_tokens = self.format.foreign, self.format.block_tokens
        for line, record in rows(self.path, self.format.columns, self.progress):
            if foreign and not (record["input_tokens"] and record["output_tokens"]):
                self.skipped += 1
                continue
            if block_tokens and (prefix := record.get("prefix")):
                full = record["input_tokens"] // block_tokens
                record["prefix"] = prefix[:full]
                record["prefix_block_tokens"] = block_tokens if full else None
            yield line, record


def read(
    path: str | Path,
    format: str | None = None,  # noqa: A002
    *,
    limit: int | None = None,
    sort: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TraceReader:
    """Opens a trace. ``format``: a name in ``FORMATS``, guessed if None; ``options`` are that format's.

    ``limit``: the first so many requests only. ``sort``: hold the whole file in memory and order it by
    arrival; without it a file that is not in order is an error. ``progress``: called while iterating
    with the bytes read and the file's size. Errors (ConfigError): here for an unknown format or option, while
    iterating for the file's content, naming file, line, field and value.
    """
    path = Path(path)
    name = guess_format(path) if format is None else format
    if name not in FORMATS:
        raise ConfigError(f"{path}: format is {clip(name)}; {nearest(name, FORMATS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"{path}: limit is {limit}; expected a whole number >= 1, or None for all")
    known = inspect.signature(FORMATS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{path}: format {name} has no option '{option}'; {nearest(option, known) if known else 'it has none'}"
            )
    return TraceReader(path, FORMATS[name](**options), limit=limit, sort=sort, progress=progress)
