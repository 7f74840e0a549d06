"""What every format says: where a request's fields stand in a line, and in which units."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sim.types import ConfigError
from traces.table import Column, Rows, count, nearest, optional, rows, seconds

TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
TOKENS = "a whole number >= 0"
TICKS_PER_S = 10**7  # .NET ticks: the resolution of the 2023 Azure traces
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How one format's lines become requests.

    ``per_s``: time units per second. ``block_tokens``: tokens each prefix hash stands for, where the
    file does not say. ``foreign``: a recording of somebody else's system, so the first arrival becomes 0 and
    requests without input or output tokens (failed or cancelled ones) are left out and counted; our
    own files are taken as they are. ``open_unit`` and ``open_block``: nobody has said the unit, or the block, so the
    file's content may decide. ``more``: sets of names one of which a file must have beside the required ones.
    ``texts``: names under which text stands whose tokens are counted. ``texts_only``: everything in the file is text.
    ``parent``: the column that names the turn before, where sessions are chains.
    """

    columns: tuple[Column, ...]
    rows: Rows = rows
    per_s: int = 1
    block_tokens: int | None = None
    foreign: bool = True
    open_unit: bool = False
    open_block: bool = False
    more: tuple[frozenset[str], ...] = (frozenset(),)
    parent: bool = False
    texts: frozenset[str] = frozenset()
    texts_only: bool = False

    @property
    def required(self) -> frozenset[str]:
        """Names a file must have to be in this format."""
        return frozenset(column.name for column in self.columns if column.required)

    def explains(self, names: set[str]) -> frozenset[str]:
        """The names by which a file is in this format; none if it is not."""
        fitting = [self.required | more for more in self.more if self.required | more <= names]
        return max(fitting, key=len, default=frozenset())


def lengths(input_name: str, output_name: str) -> tuple[Column, Column]:
    return (
        Column("input_tokens", input_name, count, TOKENS),
        Column("output_tokens", output_name, count, TOKENS),
    )


def unit_per_s(time_unit: str | None, default: str) -> int:
    """Units per second; ConfigError for a unit that is none."""
    if time_unit is not None and time_unit not in TIME_UNITS:
        raise ConfigError(f"format option time_unit is '{time_unit}'; {nearest(time_unit, TIME_UNITS)}")
    return TIME_UNITS[time_unit or default]


def a_block(block_tokens: int | None, default: int) -> int:
    if block_tokens is not None and (isinstance(block_tokens, bool) or block_tokens < 1):
        raise ConfigError(f"format option block_tokens is {block_tokens}; expected a whole number >= 1")
    return block_tokens or default


def time_column(name: str, unit: str, *, required: bool = True) -> Column:
    parse = seconds if required else optional(seconds)
    return Column("arrival_s", name, parse, f"a number, in {unit}", required=required)


def moment(cell: Any) -> float:
    """A number as it is, a date as seconds since 1970 (no zone means UTC)."""
    if isinstance(cell, datetime):
        return _since_1970(cell) / timedelta(seconds=1)
    if isinstance(cell, str) and re.match(r"\d{4}-\d\d-\d\d[ T]", cell):
        return _since_1970(datetime.fromisoformat(cell)) / timedelta(seconds=1)
    return seconds(cell)


def date_clock() -> Callable[[Any], int]:
    """Reads dates with up to nine decimals and an optional zone as 100 ns ticks since 1970.

    Lines follow each other within a minute, so what the minute starts at is kept; the shape of the
    2023 files (seven decimals, no zone) then costs one comparison and one ``int``.
    """
    shape = r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:)([0-5]\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?"
    split = re.compile(shape, re.ASCII).fullmatch
    minute, zone, start = "", None, 0

    def ticks(text: Any) -> int:
        nonlocal minute, zone, start
        if isinstance(text, datetime):
            return _since_1970(text) // timedelta(microseconds=1) * 10 + getattr(text, "nanosecond", 0) // 100
        if text[:17] == minute and zone is None and len(text) == 27 and text[19] == "." and text[17] < "6":
            digits = text[17:19] + text[20:]
            if digits.isdecimal() and digits.isascii():
                return start + int(digits)
        match = split(text)
        if match is None:
            raise ValueError
        if match.group(1, 4) != (minute, zone):
            start = _minute_ticks(*match.group(1, 4))
            minute, zone = match.group(1, 4)
        return start + int(match[2] + (match[3] or "").ljust(7, "0")[:7])

    return ticks


def _since_1970(moment: datetime) -> timedelta:
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)) - EPOCH


def _minute_ticks(minute: str, zone: str | None) -> int:
    """100 ns ticks from 1970 to the start of a minute; no zone means UTC."""
    date = datetime.fromisoformat(minute + "00" + (zone or "Z"))
    return round(date.timestamp()) * TICKS_PER_S
