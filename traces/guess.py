"""What a trace file is, by evidence: its format, its unit of time, the size of its blocks; and what is not used of it.

Nothing is assumed where two readings are possible: a trace in seconds read as milliseconds runs a thousand times too
fast, and prints a table all the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sim.types import ConfigError
from traces.formats import FORMATS, Format
from traces.formats.base import TIME_UNITS
from traces.formats.columns import suggestion
from traces.table import reading
from traces.wrapping import COMMENT, Wrapping, json_items, open_text, separator_of, skip_comments, wrapping_of

SEEN, SEEN_TEXT = 1000, 2**17
"""Records, and characters of JSON, that are looked at."""
FEW = 10
"""Fewer say nothing about a rate."""
PLAUSIBLE_PER_S = (0.02, 1000.0)
"""Mean rates of the published traces: 0.1 (BurstGPT) to 60 requests/s (Azure 2024), with room on both sides."""
STRANGE_PER_S = (1e-3, 5000.0)
STRANGE_TOKENS = 2_000_000
NOT_SECONDS = 1e11
"""Seconds since 1970 have ten digits until the year 5138."""
SINCE_1970 = {"ns": 1e17, "us": 1e14, "ms": NOT_SECONDS}
BLOCKS = (512, 16, 32, 64, 128, 256, 1024, 2048, 1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """The first records of a file, as they stand there."""

    path: Path
    wrapping: Wrapping
    names: tuple[str, ...]
    records: Sequence[Mapping[str, Any]]

    def cells(self, name: str) -> list[Any]:
        found = [record.get(name) for record in self.records]
        return [cell for cell in found if cell is not None and cell != ""]


def look(path: Path) -> Sight:
    """Reads the first records. ConfigError for a file that cannot be read, or is empty."""
    with reading(path):
        wrapping = wrapping_of(path)
        names, found = {"table": _table, "parquet": _parquet}.get(wrapping, _json)(path)
        records = list(islice(found, SEEN))
    seen = dict.fromkeys([*names, *(name for record in records for name in record)])
    return Sight(path=path, wrapping=wrapping, names=tuple(seen), records=records)


Records = tuple[Sequence[str], Iterator[Mapping[str, Any]]]


def _table(path: Path) -> Records:
    with open_text(path, newline="") as file:
        header, _ = skip_comments(file)
        lines = [header, *islice(file, SEEN)]
    rows = csv.reader(lines, delimiter=separator_of(header))
    names = [name.strip() for name in next(rows, [])]
    usable = (cells for cells in rows if len(cells) == len(names) and cells[0][:1] != COMMENT)
    return names, (dict(zip(names, cells, strict=True)) for cells in usable)


def _parquet(path: Path) -> Records:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        batch = next(file.iter_batches(batch_size=SEEN), None)
        return file.schema_arrow.names, iter([] if batch is None else batch.to_pylist())


def _json(path: Path) -> Records:
    """What stands in the first ``SEEN_TEXT`` characters; of a longer first record that one alone."""
    with open_text(path) as file:
        text = file.read(SEEN_TEXT)
        items: list[Any] = []
        with suppress(ConfigError):  # the last one is cut, or wrong: reading all of it will say so
            for item in islice(json_items(path, io.StringIO(text)), SEEN):
                items.append(item)
        if not items:
            file.seek(0)
            items = list(islice(json_items(path, file), 1))
    return (), (item for item in items if isinstance(item, dict))


def guess_format(path: str | Path) -> str:
    """The one format that explains the file's names, and what stands under them, best.

    A format fits if all names it needs are there; one that explains fewer of them than another that fits
    is set aside. ConfigError where none is left, or several.
    """
    return guess(look(Path(path)))


def guess(sight: Sight) -> str:
    """As ``guess_format``, of a file that was looked at."""
    names = set(sight.names)
    made = {name: make() for name, make in FORMATS.items() if name != "columns"}
    fitting = {name: form.explains(names) for name, form in made.items() if _holds(form, sight)}
    best = [name for name, here in fitting.items() if here and not any(here < other for other in fitting.values())]
    if set(best) == {"aiperf", "guidellm"}:
        unit = _by_rate(_times(made["aiperf"], sight))
        best = {"ms": ["aiperf"], "s": ["guidellm"]}.get(unit or "", best)
    if len(best) == 1:
        return best[0]
    if best:
        readings = _readings(_times(made[best[0]], sight)) if set(best) == {"aiperf", "guidellm"} else ""
        raise ConfigError(f"{sight.path}: the file fits several formats{readings}; name one of: {', '.join(best)}")
    found = ", ".join(sorted(names)[:12]) or "no names"
    hint = suggestion(names) or "arrival_s=NAME/1000,input_tokens=NAME,output_tokens=NAME"
    raise ConfigError(
        f"{sight.path}: the file fits no known format (found {found}); name its columns, as in --columns {hint} "
        f"(times in seconds: divide where they are not), or one of: {', '.join(FORMATS)}"
    )


def _holds(form: Format, sight: Sight) -> bool:
    """Whether what should be text is: a column named prompt may also hold a count."""
    texts = [cell for name in form.texts for cell in sight.cells(name)]
    return not texts or (sight.wrapping != "table" and all(isinstance(cell, str) for cell in texts))


def settle(name: str, form: Format, sight: Sight, *, guessed: bool) -> tuple[Format, tuple[str, ...]]:
    """The format with its unit and block as the content says, and remarks: what was decided, and what is not used.

    ConfigError where the content contradicts a unit or a block, or leaves it open.
    """
    form, decided = _with_unit(form, sight, guessed=guessed)
    form = _with_block(form, sight)
    if form.open_block and sight.cells("hash_ids"):
        decided = [*decided, f"blocks of {form.block_tokens} tokens"]
    remarks = [f"read as {name}, {', '.join(decided)}"] if guessed and decided else []
    used = {column.name for column in form.columns}
    unused = [] if form.texts_only else [column for column in sight.names if column not in used]
    if unused:
        remarks.append(f"columns not used: {', '.join(unused[:20])}{' ...' if len(unused) > 20 else ''}")
    return form, (*remarks, *_strange(form, sight))


def _column_cells(form: Format, sight: Sight, field: str) -> Iterator[Any]:
    """What a column's cells mean, those that mean nothing left out."""
    for column in form.columns:
        for cell in sight.cells(column.name) if column.field == field else ():
            try:
                yield column.parse(cell)
            except (ValueError, TypeError, OverflowError, ConfigError):
                continue


def _times(form: Format, sight: Sight) -> list[float]:
    return [time for time in _column_cells(form, sight, "arrival_s") if time is not None]


def _with_unit(form: Format, sight: Sight, *, guessed: bool) -> tuple[Format, list[str]]:
    times = _times(form, sight)
    if not times:
        return form, []
    units = {per_s: unit for unit, per_s in TIME_UNITS.items()}
    here = units.get(form.per_s)
    dated = next((unit for unit, least in SINCE_1970.items() if max(times) >= least), None)
    if here is None or (dated is None and not form.open_unit):
        return form, [f"times in {here}"] if form.parent else []
    if dated is not None:
        wrong = form.per_s < TIME_UNITS[dated]
        if wrong and not form.open_unit:
            mend = f"divide them by {TIME_UNITS[dated]:g}: --columns arrival_s=NAME/{TIME_UNITS[dated]:g},..."
            raise ConfigError(
                f"{sight.path}: times of {max(times):.4g} are not {here}; as {dated} since 1970 they would be; {mend}"
            )
        return (replace(form, per_s=TIME_UNITS[dated]), [f"times in {dated} since 1970"]) if wrong else (form, [])
    if not guessed:
        return form, []
    unit = _published(form, sight, times) or _by_rate(times) or _as_usual(form, times)
    if unit is None:
        raise ConfigError(f"{sight.path}: the unit of its times is not evident{_readings(times)}; name --time-unit")
    return replace(form, per_s=TIME_UNITS[unit]), [f"times in {unit}"]


def _published(form: Format, sight: Sight, times: Sequence[float]) -> str | None:
    """Milliseconds if it has aiperf's own fields, or looks as Mooncake's: whole numbers, blocks of 512 tokens."""
    if {"delay", "text_input"} & set(sight.names):
        return "ms"
    whole = all(float(time).is_integer() for time in times)
    return "ms" if whole and form.block_tokens == 512 and _fits(sight, form, 512, least=1) else None


def _as_usual(form: Format, times: Sequence[float]) -> str | None:
    """Where somebody states the block, he knows the trace: whole numbers are then Mooncake's milliseconds."""
    stated = form.block_tokens is not None and not form.open_block
    return "ms" if stated and all(float(time).is_integer() for time in times) else None


def _rates(times: Sequence[float]) -> dict[str, float]:
    span = max(times, default=0) - min(times, default=0)
    return {unit: (len(times) - 1) / (span / TIME_UNITS[unit]) for unit in ("s", "ms")} if span > 0 else {}


def _by_rate(times: Sequence[float]) -> str | None:
    """The unit in which the requests come neither once a minute nor by the thousand per second, if only one is."""
    dated = next((unit for unit, least in SINCE_1970.items() if times and max(times) >= least), None)
    if dated is not None or len(times) < FEW:
        return dated
    low, high = PLAUSIBLE_PER_S
    possible = [unit for unit, rate in _rates(times).items() if low <= rate <= high]
    return possible[0] if len(possible) == 1 else None


def _readings(times: Sequence[float]) -> str:
    both = [f"{rate:.3g} requests/s if they are in {unit}" for unit, rate in _rates(times).items()]
    return f" ({', '.join(both)})" if both else ""


def _with_block(form: Format, sight: Sight) -> Format:
    """The block whose size explains how many hashes each prompt has, unless stated. ConfigError if several do."""
    name = next((column.name for column in form.columns if column.field == "prefix"), None)
    if name is None or not form.open_block or not form.block_tokens or not sight.cells(name):
        return form
    if _fits(sight, form, form.block_tokens):
        return form
    fitting = [block for block in BLOCKS if _fits(sight, form, block)]
    if len(fitting) == 1:
        return replace(form, block_tokens=fitting[0])
    what = f"blocks of {' or '.join(map(str, fitting))} tokens" if fitting else "no size of blocks"
    raise ConfigError(f"{sight.path}: the numbers of {name} fit {what}; name --block-tokens")


def _fits(sight: Sight, form: Format, block: int, least: int = 0) -> bool:
    """Whether every prompt has as many hashes as blocks: all it touches, or all it fills."""
    columns = {column.field: column for column in form.columns}
    if "prefix" not in columns:
        return False
    touched = filled = True
    seen = 0
    for record in sight.records:
        try:
            prefix = columns["prefix"].parse(record.get(columns["prefix"].name))
            tokens = columns["input_tokens"].parse(record.get(columns["input_tokens"].name))
        except (ValueError, TypeError, OverflowError, ConfigError):
            continue
        if not prefix or tokens is None:
            continue
        seen += 1
        touched &= len(prefix) == -(-tokens // block)
        filled &= len(prefix) == tokens // block
    return (touched or filled) and seen >= least


def _strange(form: Format, sight: Sight) -> Iterator[str]:
    """What is outside physical sense, and what it would be if another unit was meant."""
    fitting = [block for block in BLOCKS if _fits(sight, form, block, least=FEW)] if form.block_tokens else []
    if fitting and form.block_tokens not in fitting:
        yield f"its prefixes fit blocks of {fitting[0]} tokens rather than the {form.block_tokens} that are stated"
    times = [time / form.per_s for time in _times(form, sight)]
    span = max(times, default=0.0) - min(times, default=0.0)
    if len(times) >= FEW and span > 0:
        rate = (len(times) - 1) / span
        if not STRANGE_PER_S[0] <= rate <= STRANGE_PER_S[1]:
            likely = "in a finer unit (ms?)" if rate < 1 else "in a coarser unit (s?)"
            yield f"a mean rate of {rate:.3g} requests/s is out of the ordinary: are the times {likely}"
    for field in ("input_tokens", "output_tokens"):
        most = max((tokens for tokens in _column_cells(form, sight, field) if tokens is not None), default=0)
        if most > STRANGE_TOKENS:
            yield f"{field} of {most:,} is beyond any context: are they characters or bytes?"
