"""Any table or JSON lines, by the names of its columns: ``arrival_s=ts_ms/1000,input_tokens=prompt``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sim.types import ConfigError
from traces.formats.base import TOKENS, Format, moment
from traces.table import Column, clip, count, hashes, label, nearest, optional, seconds, whole

FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "arrival_s": (moment, "a number, or a date"),
    "input_tokens": (count, TOKENS),
    "output_tokens": (count, TOKENS),
    "session": (optional(label), "a text"),
    "klass": (optional(label), "a text"),
    "priority": (optional(whole, 0), "a whole number"),
    "prefix": (optional(hashes, ()), "whole numbers"),
    "think_s": (optional(seconds), "a number"),
}
TERM = re.compile(r"\s*(.+?)\s*(?:([*/])\s*([0-9.eE+-]+)\s*)?")
ALIASES = {
    "arrival_s": ("arrival_time", "arrival", "arrived", "timestamp", "time", "start_time", "created_at", "ts", "sent"),
    "input_tokens": ("input", "prompt", "context", "isl", "prefill"),
    "output_tokens": ("output", "completion", "generated", "response", "osl", "decode"),
}
"""What others call them, for the suggestion in an error."""


def columns(*, columns: str | Mapping[str, str], block_tokens: int | None = None) -> Format:
    """The columns that the user names. ``NAME/1000`` or ``NAME*60`` brings a number into seconds or tokens."""
    pairs = _pairs(columns)
    for field in ("input_tokens", "output_tokens"):
        if field not in pairs:
            raise ConfigError(f"columns: {field} is missing; name its column, as in {field}=NAME")
    if "prefix" in pairs and block_tokens is None:
        raise ConfigError("columns: prefix needs the tokens of a block; give block_tokens")
    return Format(columns=tuple(_column(field, text) for field, text in pairs.items()), block_tokens=block_tokens)


def _pairs(given: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        given = {field.strip(): text.strip() for field, _, text in parts}
        if len(given) < len(parts):
            raise ConfigError(f"columns: {clip(','.join(given))}: a field is named twice; name each once")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"columns is {clip(given)}; write it like arrival_s=ts_ms/1000,input_tokens=prompt")
    for field, text in given.items():
        if field not in FIELDS:
            raise ConfigError(f"columns: {clip(field)}: {nearest(field, FIELDS)}")
        if not isinstance(text, str) or not text:
            raise ConfigError(f"columns: {field} is {clip(text)}; expected the name of a column")
    return dict(given)


def _column(field: str, text: str) -> Column:
    parse, expected = FIELDS[field]
    match = TERM.fullmatch(text)
    if match is None or match[2] is None:
        return Column(field, text.strip(), parse, expected)
    try:
        factor = float(match[3])
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise ConfigError(f"columns: {field}={text}: {match[3]!r} must be a number > 0")
    if field not in ("arrival_s", "think_s", "input_tokens", "output_tokens"):
        raise ConfigError(f"columns: {field}={text}: {field} is no quantity; drop the factor")
    return Column(field, match[1], _scaled(parse, factor, divides=match[2] == "/"), "a number")


def _scaled(parse: Callable[[Any], Any], factor: float, *, divides: bool) -> Callable[[Any], Any]:
    def scaled(cell: Any) -> Any:
        number = seconds(cell)
        return parse(number / factor if divides else number * factor)

    return scaled


def suggestion(names: set[str]) -> str:
    """What ``--columns`` could be for a file with these names; empty if it is not evident."""
    found = {}
    for field, words in ALIASES.items():
        close = [name for word in words for name in sorted(names) if name.lower().startswith(word)]
        if not close:
            return ""
        found[field] = close[0]
    return ",".join(f"{field}={name}" for field, name in found.items())
