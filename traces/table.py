"""Rows of a CSV, JSON-lines or Parquet file, one at a time, and the errors that name file, line and field.

A ``Column`` says where one field of a record is found and how its text is read; ``csv_rows``,
``jsonl_rows`` and ``parquet_rows`` yield ``(line, record)`` with memory for one line (Parquet: one row
group), and tell a ``Progress`` how far they are. Nothing here knows what a request is: trace formats and event
files share it.
"""

from __future__ import annotations

import csv
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sim.types import ConfigError
from traces.wrapping import (
    COMMENT,
    LONGEST_CELL,
    Progress,
    json_items,
    open_text,
    separator_of,
    skip_comments,
    wrapping_of,
)

Record = dict[str, Any]


class Column(NamedTuple):
    """One field of a record: its name there, its name in the file, and how its cell is read.

    ``parse`` takes text (CSV) or a typed value (JSON, Parquet; None where absent) and raises ValueError.
    """

    field: str
    name: str
    parse: Callable[[Any], Any]
    expected: str
    required: bool = True


class Rows(Protocol):
    """How the records of one kind of file are read: ``(line, record)``, in the file's order."""

    def __call__(
        self, path: Path, columns: Sequence[Column], progress: Progress | None = None, /
    ) -> Iterator[tuple[int, Record]]: ...


def rows(path: Path, columns: Sequence[Column], progress: Progress | None = None) -> Iterator[tuple[int, Record]]:
    """Records of a file however its text is wrapped."""
    with reading(path):
        kind = wrapping_of(path)
    return {"table": csv_rows, "lines": jsonl_rows, "array": array_rows, "parquet": parquet_rows}[kind](
        path, columns, progress
    )


def csv_rows(path: Path, columns: Sequence[Column], progress: Progress | None = None) -> Iterator[tuple[int, Record]]:
    """Records of a table with a header line, separated by commas, semicolons, tabs or bars; blank lines, and comments
    (``#``), are passed over."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with reading(path), open_text(path, progress, newline="") as file:
        first, above = skip_comments(file)
        separator = separator_of(first)
        header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        present = present_columns(path, columns, header)
        pick = itemgetter(*(header.index(column.name) for column in present))
        single = len(present) == 1
        reader = csv.reader(file, delimiter=separator)
        for cells in reader:
            if len(cells) == len(header) and cells[0][:1] != COMMENT:
                picked = pick(cells)
                line = reader.line_num + above + 1
                yield line, _record(path, line, present, (picked,) if single else picked)
            elif cells and cells[0].lstrip()[:1] != COMMENT and any(map(str.strip, cells)):
                raise ConfigError(
                    f"{path}:{reader.line_num + above + 1}: the line has {len(cells)} cells; "
                    f"expected {len(header)}, as in the header"
                )


def jsonl_rows(path: Path, columns: Sequence[Column], progress: Progress | None = None) -> Iterator[tuple[int, Record]]:
    """Records of a file with one JSON object a line; blank lines are passed over."""
    names = [column.name for column in columns]
    with reading(path), open_text(path, progress) as file:
        for line, text in enumerate(iter(lambda: file.readline(LONGEST_CELL), ""), start=1):
            if text.strip():
                found = json_object(path, line, text)
                yield line, _record(path, line, columns, [found.get(name) for name in names])


def array_rows(path: Path, columns: Sequence[Column], progress: Progress | None = None) -> Iterator[tuple[int, Record]]:
    """Records of one JSON array of objects; the line is the number of the item."""
    names = [column.name for column in columns]
    with reading(path), open_text(path, progress) as file:
        for number, item in enumerate(json_items(path, file), start=1):
            if not isinstance(item, dict):
                raise ConfigError(f"{path}: item {number} is {clip(item)}; expected an object")
            yield number, _record(path, number, columns, [item.get(name) for name in names])


def parquet_rows(
    path: Path, columns: Sequence[Column], progress: Progress | None = None
) -> Iterator[tuple[int, Record]]:
    """Records of a Parquet file, read by row groups; the line is the row's number from 1.

    Its bytes are not read in order: progress is the share of the rows.
    """
    import pyarrow.parquet as pq

    with reading(path), pq.ParquetFile(path) as file:
        present = present_columns(path, columns, file.schema_arrow.names)
        names = [column.name for column in present]
        line, rows, size = 0, file.metadata.num_rows, path.stat().st_size
        for batch in file.iter_batches(batch_size=8192, columns=names):
            for cells in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                line += 1
                yield line, _record(path, line, present, cells)
            if progress is not None:
                progress(size * line // rows, size)


def json_object(path: Path, line: int, text: str) -> Record:
    """The object on one line of a JSON-lines file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}:{line}: the line is {clip(text.strip())}; expected one JSON object")
    return found


def present_columns(path: Path, columns: Sequence[Column], names: Sequence[str]) -> list[Column]:
    """The columns a file has. ConfigError where a required one is absent or an optional one looks misspelt."""
    absent = [column for column in columns if column.name not in names]
    unknown = [name for name in names if name not in {column.name for column in columns}]
    for column in absent:
        close = get_close_matches(column.name, unknown, n=1, cutoff=0.8)
        if column.required or close:
            mend = f"rename '{close[0]}'" if close else f"found {', '.join(names) or 'an empty file'}"
            raise ConfigError(f"{path}:1: column '{column.name}' is absent; {mend}")
    return [column for column in columns if column.name in names]


def _record(path: Path, line: int, columns: Sequence[Column], cells: Sequence[Any]) -> Record:
    try:
        return {column[0]: column[2](cell) for column, cell in zip(columns, cells)}  # noqa: B905
    except (ValueError, TypeError, OverflowError):
        raise _blame(path, line, columns, cells) from None


def _blame(path: Path, line: int, columns: Sequence[Column], cells: Sequence[Any]) -> ConfigError:
    """The error for the first cell that cannot be read."""
    for column, cell in zip(columns, cells, strict=True):
        try:
            column.parse(cell)
        except (ValueError, TypeError, OverflowError):
            return field_error(path, line, column, cell)
    raise AssertionError("every cell could be read the second time")


def field_error(path: Path, line: int, column: Column, cell: object, expected: str | None = None) -> ConfigError:
    """``FILE:LINE: field X is 'y'; expected ...``."""
    found = "absent" if cell is None else clip(cell)
    return ConfigError(f"{path}:{line}: field {column.name} is {found}; expected {expected or column.expected}")


def clip(value: object) -> str:
    """The value as Python writes it, cut where it would flood the screen."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:76] + " ..."


def nearest(name: object, choices: Iterable[str]) -> str:
    """The mend for an unknown name: the nearest valid one if any, and all of them."""
    known = list(choices)
    close = get_close_matches(str(name), known, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"known: {', '.join(known)}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system says about an unreadable file into a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except EOFError:
        raise ConfigError(f"{path}: cannot be read: the compressed file is cut short; copy it anew") from None
    except (
        ValueError,
        csv.Error,
        zlib.error,
        lzma.LZMAError,
    ) as error:  # not UTF-8, not CSV, or pyarrow's "not Parquet"
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


# ---------------------------------------------------------------- how a cell is read


def count(cell: Any) -> int:
    """A whole number >= 0; ``374.0`` counts as whole."""
    if type(cell) is str and cell.isdecimal() and cell.isascii():
        return int(cell)
    number = seconds(cell)
    if number < 0 or not number.is_integer():
        raise ValueError
    return int(cell) if type(cell) is int else int(number)


def whole(cell: Any) -> int:
    """A whole number of any sign and size."""
    if isinstance(cell, bool | float):
        raise ValueError
    return int(cell)


def seconds(cell: Any) -> float:
    """A finite number, in whatever unit the column has."""
    if isinstance(cell, bool) or (isinstance(cell, str) and "_" in cell):
        raise ValueError
    number = float(cell)
    if not isfinite(number):
        raise ValueError
    return number


def truth(cell: Any) -> bool:
    """true or false."""
    text = str(cell).lower()
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def label(cell: Any) -> str:
    """Any text that is not empty; a number becomes its text."""
    if cell is None or cell == "":
        raise ValueError
    return str(cell)


def hashes(cell: Any) -> tuple[int, ...]:
    """Whole numbers separated by spaces, or a list of them."""
    cells: list[Any] = cell.strip("[] ").replace(",", " ").split() if isinstance(cell, str) else cell
    return tuple(cells) if set(map(type, cells)) == {int} else tuple(map(whole, cells))


def optional(parse: Callable[[Any], Any], default: Any = None) -> Callable[[Any], Any]:
    """As ``parse``, but an absent or empty cell gives ``default``."""

    def parse_if_there(cell: Any) -> Any:
        return default if cell is None or cell == "" else parse(cell)

    return parse_if_there
