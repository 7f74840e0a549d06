"""What pydantic finds wrong, as one line: field, value and mend."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sim.cluster import did_you_mean

MENDS = {
    "truth_value": "must be a number, not true or false",
    "too_tiny": "must be > 0, and at least 1e-12",
    "too_slow": "must be 0 (no connection) or at least 1e-06",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than_equal": "must be <= {le:g}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "too_short": "must have at least {min_length} entry",
}


def first_fault(error: ValidationError) -> str:
    """The first fault in one line, and how many more there are."""
    faults = error.errors(include_url=False)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return describe(faults[0]) + more


def nested_fault(error: ValidationError) -> str:
    """As ``first_fault``, to be put behind the place of the mapping that holds the field."""
    text = first_fault(error)
    return f": {text.removeprefix(': ')}" if text.startswith(": ") else f".{text}"


def describe(fault: ErrorDetails) -> str:
    """``cluster.nodes[0].count: -1 must be >= 1``."""
    context: dict[str, Any] = dict(fault.get("ctx") or {})
    place = _place(fault["loc"])
    kind = fault["type"]
    if isinstance(fault["input"], float) and not isfinite(fault["input"]):
        kind = "finite_number"
    if kind == "unknown_key":
        dot = "." if place else ""
        if context["inside"]:
            home = f"{place}{dot}{context['inside']}.{context['key']}"
            return f"{place}{dot}{context['key']}: the key {context['key']!r} is unknown here; did you mean {home}?"
        return f"{place}{dot}{context['key']}: the key {did_you_mean(context['key'], context['known'])}"
    if kind == "nested":
        return f"{place}{context['text']}"
    if kind == "missing":
        return f"{place}: missing; it is required"
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", context["expected"])
        return f"{place}: {did_you_mean(fault['input'], choices)}"
    if kind in MENDS:
        return f"{place}: {_clip(fault['input'])} {MENDS[kind].format(**context)}"
    message = str(context["error"]) if "error" in context else fault["msg"]
    return f"{place}: {message}" if kind == "value_error" else f"{place}: {_clip(fault['input'])}: {message}"


def _place(location: tuple[int | str, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def _clip(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + " ..."
