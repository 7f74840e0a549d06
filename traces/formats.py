"""The trace formats: for each, where a request's fields stand in a line. All differences are data.

``FORMATS`` maps a name to a function from the format's options to a ``Format``. Adding one is a function
of a few lines and an entry in that dict; reading, checking and guessing need no change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sim.types import ConfigError
from traces.sharegpt import TURNS, ConversationRows, CountTokens, json_items, token_counter
from traces.table import (
    Column,
    Rows,
    count,
    csv_rows,
    hashes,
    jsonl_rows,
    label,
    nearest,
    optional,
    reading,
    seconds,
    truth,
    whole,
)

TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
TOKENS = "a whole number >= 0"
HEAD = 2**16  # characters, enough for any header
TICKS_PER_S = 10**7  # .NET ticks: the resolution of the 2023 Azure traces


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How one format's lines become requests.

    ``per_s``: time units per second. ``block_tokens``: tokens each prefix hash stands for, where the
    file does not say. ``foreign``: a recording of somebody else's system, so the first arrival becomes 0 and
    requests without input or output tokens (failed or cancelled ones) are left out and counted; our
    own files are taken as they are.
    """

    rows: Rows
    columns: tuple[Column, ...]
    per_s: int = 1
    block_tokens: int | None = None
    foreign: bool = True

    @property
    def is_table(self) -> bool:
        """CSV, or Parquet with the same names; else JSON."""
        return self.rows is csv_rows

    @property
    def required(self) -> frozenset[str]:
        """Names a file must have to be in this format."""
        return frozenset(column.name for column in self.columns if column.required)


def _lengths(input_name: str, output_name: str) -> tuple[Column, Column]:
    return (
        Column("input_tokens", input_name, count, TOKENS),
        Column("output_tokens", output_name, count, TOKENS),
    )


def azure() -> Format:
    """Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset)."""
    time = Column("arrival_s", "TIMESTAMP", _date_clock(), "a time such as 2023-11-16 18:17:03.9799600")
    return Format(rows=csv_rows, columns=(time, *_lengths("ContextTokens", "GeneratedTokens")), per_s=TICKS_PER_S)


def mooncake(*, block_tokens: int = 512, time_unit: str = "ms") -> Format:
    """Mooncake traces (kvcache-ai/Mooncake): lengths and a content hash for every prompt block.

    Mooncake itself publishes 512-token blocks, others 16. The hash of a last, partly filled block
    is dropped: a block that is not full cannot be shared.
    """
    if block_tokens < 1:
        raise ConfigError(f"format option block_tokens is {block_tokens}; expected a whole number >= 1")
    prefix = Column("prefix", "hash_ids", optional(hashes, ()), "a list of whole numbers")
    return _replay(time_unit, prefix, block_tokens)


def aiperf(*, block_tokens: int = 512, time_unit: str = "ms") -> Format:
    """aiperf and genai-perf schedules: as Mooncake's, the hashes being optional.

    Lines that carry a ``delay`` instead of a timestamp belong to a closed loop and are refused.
    """
    prefix = Column("prefix", "hash_ids", optional(hashes, ()), "a list of whole numbers", required=False)
    return _replay(time_unit, prefix, block_tokens)


def guidellm(*, time_unit: str = "s") -> Format:
    """guidellm's minimal trace: timestamps in seconds, from any origin, and lengths."""
    return _replay(time_unit)


def _replay(time_unit: str, prefix: Column | None = None, block_tokens: int | None = None) -> Format:
    if time_unit not in TIME_UNITS:
        raise ConfigError(f"format option time_unit is '{time_unit}'; {nearest(time_unit, TIME_UNITS)}")
    time = Column("arrival_s", "timestamp", seconds, f"a number, in {time_unit}")
    session = Column("session", "session_id", optional(label), "a text", required=False)
    columns = (time, *_lengths("input_length", "output_length"), session)
    return Format(
        rows=jsonl_rows,
        columns=(*columns, prefix) if prefix else columns,
        per_s=TIME_UNITS[time_unit],
        block_tokens=block_tokens,
    )


def burstgpt() -> Format:
    """BurstGPT (HPMLL/BurstGPT); the model becomes the class. Releases before v2.0 have no sessions."""
    columns = (
        Column("arrival_s", "Timestamp", seconds, "a number of seconds"),
        *_lengths("Request tokens", "Response tokens"),
        Column("klass", "Model", label, "a model's name"),
        Column("session", "Session ID", optional(label), "a text", required=False),
    )
    return Format(rows=csv_rows, columns=columns)


def splitwise_sim() -> Format:
    """Traces of the Splitwise simulator (Mutinifni/splitwise-sim); the application becomes the class."""
    columns = (
        Column("arrival_s", "arrival_timestamp", seconds, "a number of seconds"),
        *_lengths("prompt_size", "token_size"),
        Column("klass", "application_id", label, "an application's number"),
    )
    return Format(rows=csv_rows, columns=columns)


def vidur() -> Format:
    """Vidur's processed traces (microsoft/vidur)."""
    time = Column("arrival_s", "arrived_at", seconds, "a number of seconds")
    return Format(rows=csv_rows, columns=(time, *_lengths("num_prefill_tokens", "num_decode_tokens")))


def vidur_lengths() -> Format:
    """Vidur's traces without arrivals: every request arrives at 0; ``with_rate`` spreads them."""
    return Format(rows=csv_rows, columns=_lengths("num_prefill_tokens", "num_decode_tokens"))


def sharegpt(
    *,
    tokenizer: CountTokens | str | None = None,
    characters_per_token: float | None = None,
    turns: str = "first",
) -> Format:
    """Conversations of the ShareGPT kind (``traces.sharegpt``): every request arrives at 0, ``with_rate`` spreads them.

    Needs ``tokenizer`` or ``characters_per_token``. ``turns``: the ``first`` of each conversation, as vLLM's
    benchmark takes it, or ``all``, each with its new text only and the conversation as session: ``Sessions`` makes the
    context grow.
    """
    if turns not in TURNS:
        raise ConfigError(f"format option turns is {turns!r}; {nearest(turns, TURNS)}")
    session = Column("session", "id", optional(label), "a text", required=False)
    columns = (*_lengths("conversations", "conversations"), session)
    return Format(
        rows=ConversationRows(count=token_counter(tokenizer, characters_per_token), turns=turns), columns=columns
    )


def phasewise() -> Format:
    """Our own CSV or Parquet: the fields of ``Request``, hashes separated by spaces."""
    columns = (
        Column("arrival_s", "arrival_s", seconds, "a number of seconds"),
        *_lengths("input_tokens", "output_tokens"),
        Column("session", "session", optional(label), "a text", required=False),
        Column("klass", "klass", optional(label), "a text", required=False),
        Column("priority", "priority", optional(whole, 0), "a whole number", required=False),
        Column("prefix", "prefix", optional(hashes, ()), "whole numbers separated by spaces", required=False),
        Column("prefix_block_tokens", "prefix_block_tokens", optional(count), TOKENS, required=False),
        Column("samples", "samples", optional(count, 1), "a whole number >= 1", required=False),
        Column("beam_search", "beam_search", optional(truth, False), "true or false", required=False),
    )
    return Format(rows=csv_rows, columns=columns, foreign=False)


FORMATS: dict[str, Callable[..., Format]] = {
    "phasewise": phasewise,
    "azure": azure,
    "mooncake": mooncake,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "burstgpt": burstgpt,
    "splitwise-sim": splitwise_sim,
    "vidur": vidur,
    "vidur-lengths": vidur_lengths,
    "sharegpt": sharegpt,
}


def guess_format(path: str | Path) -> str:
    """The one format that explains the file's header (or first JSON object) best.

    A format fits if all names it needs are there; one that needs fewer of them than another that fits
    is set aside. ConfigError where none is left, or several.
    """
    table, names = _names(Path(path))
    made = {name: make() for name, make in FORMATS.items()}
    fitting = {name: f.required for name, f in made.items() if f.is_table == table and f.required <= names}
    best = [name for name, required in fitting.items() if not any(required < other for other in fitting.values())]
    if len(best) == 1:
        return best[0]
    found = "fits several formats" if best else f"fits no known format (found {', '.join(sorted(names)[:12])})"
    raise ConfigError(f"{path}: the file {found}; name one of: {', '.join(best or FORMATS)}")


def _names(path: Path) -> tuple[bool, set[str]]:
    """Whether the file is a table, and the names in its header or first JSON object."""
    with reading(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return True, set(pq.read_schema(path).names)
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(HEAD).lstrip()
            if not head:
                raise ConfigError(f"{path}: the file is empty; expected a trace")
            if head[0] not in "[{":
                return True, {name.strip() for name in head.splitlines()[0].split(",")}
            file.seek(0)
            first = next(json_items(path, file), None)
            return False, set(first) if isinstance(first, dict) else set()


def _date_clock() -> Callable[[Any], int]:
    """Reads dates with up to nine decimals and an optional zone as 100 ns ticks since 1970.

    Lines follow each other within a minute, so what the minute starts at is kept; the shape of the
    2023 files (seven decimals, no zone) then costs one comparison and one ``int``.
    """
    shape = r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:)([0-5]\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?"
    split = re.compile(shape, re.ASCII).fullmatch
    minute, zone, start = "", None, 0

    def ticks(text: Any) -> int:
        nonlocal minute, zone, start
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


def _minute_ticks(minute: str, zone: str | None) -> int:
    """100 ns ticks from 1970 to the start of a minute; no zone means UTC."""
    date = datetime.fromisoformat(minute + "00" + (zone or "Z"))
    return round(date.timestamp()) * TICKS_PER_S
