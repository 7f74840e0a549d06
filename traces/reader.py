"""``read``: a trace file as a stream of requests."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from sim.types import ConfigError, Request
from traces.formats import FORMATS, Format
from traces.guess import Sight, guess, look, settle
from traces.table import Record, clip, nearest
from traces.wrapping import Progress


class TraceReader:
    """The requests of one file, in order of arrival; every iteration reads the file anew.

    ``skipped``: how many requests without input or output tokens the last iteration left out. ``remarks``: what was
    decided about the file, what of it is not used, and what looks wrong. ``delayed``: some turns wait for the one
    before them; their arrivals are the earliest possible (the trace is then held in memory).
    """

    __slots__ = ("delayed", "format", "limit", "path", "progress", "remarks", "skipped", "sort")

    def __init__(
        self,
        path: Path,
        format: Format,  # noqa: A002
        *,
        limit: int | None = None,
        sort: bool = False,
        progress: Progress | None = None,
        delayed: bool = False,
        remarks: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.format = format
        self.limit = limit
        self.sort = sort
        self.progress = progress
        self.delayed = delayed
        self.remarks = remarks
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
        if self.sort or self.delayed:
            return sorted(self._usable(), key=lambda numbered: numbered[1].get("arrival_s", 0))
        return self._usable()

    def _usable(self) -> Iterator[tuple[int, Record]]:
        form = self.format
        last_turn: dict[str | None, float] = {}
        chains: dict[str, str] = {}
        for line, record in form.rows(self.path, form.columns, self.progress):
            self._count_text(line, record)
            if form.parent:
                chat: str = record.pop("chat")
                chains[chat] = chains.get(str(record.pop("parent")), chat)
                record["session"] = chains[chat]
            if "think_s" in record:
                self._set_turn(line, record, last_turn)
            if form.foreign and not (record["input_tokens"] and record["output_tokens"]):
                self.skipped += 1
                continue
            if form.block_tokens and (prefix := record.get("prefix")):
                full = record["input_tokens"] // form.block_tokens
                record["prefix"] = prefix[:full]
                record["prefix_block_tokens"] = form.block_tokens if full else None
            yield line, record

    def _count_text(self, line: int, record: Record) -> None:
        """A text stands in where a length is absent."""
        if "input_text" in record:
            text_tokens = record.pop("input_text")
            if record["input_tokens"] is None:
                record["input_tokens"] = text_tokens
        if record["input_tokens"] is None:
            raise ConfigError(f"{self.path}:{line}: it has neither a length nor a text of its input; add one")

    def _set_turn(self, line: int, record: Record, last_turn: dict[str | None, float]) -> None:
        """When a turn that waits for the one before it could come at the earliest."""
        think, session = record.get("think_s"), record.get("session")
        if record["arrival_s"] is None:
            if think is None or session not in last_turn:
                raise ConfigError(
                    f"{self.path}:{line}: it has no timestamp, and is not the next turn of a session with a delay"
                )
            record["arrival_s"] = last_turn[session] + think
        if session is not None:
            last_turn[session] = record["arrival_s"]
        record["think_s"] = None if think is None else think / self.format.per_s


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
    stated = "columns" if format is None and "columns" in options else format
    if stated is not None and stated not in FORMATS:
        raise ConfigError(f"{path}: format is {clip(stated)}; {nearest(stated, FORMATS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"{path}: limit is {limit}; expected a whole number >= 1, or None for all")
    sight = look(path)
    name = stated or guess(sight)
    _check_options(path, name, options)
    form, remarks = settle(name, FORMATS[name](**options), sight, guessed=stated is None)
    _check_texts(path, form, sight)
    delayed = any(column.field == "think_s" and sight.cells(column.name) for column in form.columns)
    return TraceReader(path, form, limit=limit, sort=sort, progress=progress, delayed=delayed, remarks=remarks)


def _check_options(path: Path, name: str, options: Mapping[str, Any]) -> None:
    known = inspect.signature(FORMATS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{path}: format {name} has no option '{option}'; {nearest(option, known) if known else 'it has none'}"
            )
    if name == "columns" and not options:
        raise ConfigError(
            f"{path}: format columns needs them; give --columns arrival_s=NAME/1000,input_tokens=NAME,..."
        )


def _check_texts(path: Path, form: Format, sight: Sight) -> None:
    """Refuse, before anything runs, a text whose tokens nobody can count."""
    for column in form.columns:
        for cell in sight.cells(column.name)[:1] if column.name in form.texts else ():
            try:
                column.parse(cell)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            except (ValueError, TypeError):
                return  # the row's own error says it better
