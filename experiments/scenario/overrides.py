"""``--set key.sub=value`` on the plain data of a scenario file."""

from __future__ import annotations

import re
from typing import Any

from sim.outside import parse_yaml
from sim.types import ConfigError


def apply(data: Any, override: str) -> None:
    """Set one field of nested mappings and lists, in place; mappings on the way are made as needed.

    A part of the key is a name, or the place in a list: ``cluster.nodes[0].count=8`` (or ``nodes.0.count``).
    """
    key, equals, text = override.partition("=")
    parts = [part for part in re.split(r"[.\[\]]+", key.strip()) if part]
    if not equals or not parts:
        raise ConfigError(f"--set {override}: it must read key=value, such as workload.rate=5")
    value = parse_yaml(text, f"--set {override}", "value; quote it")
    for part in parts[:-1]:
        data = _child(data, part, override)
    if isinstance(data, list):
        data[_place(data, parts[-1], override)] = value
    elif isinstance(data, dict):
        data[parts[-1]] = value
    else:
        raise ConfigError(f"--set {override}: {parts[-1]!r} is inside a plain value; set that as a whole")


def _child(data: Any, part: str, override: str) -> Any:
    if isinstance(data, list):
        return data[_place(data, part, override)]
    if not isinstance(data, dict):
        raise ConfigError(f"--set {override}: {part!r} is inside a plain value; set that as a whole")
    if data.get(part) is None:
        data[part] = {}
    return data[part]


def _place(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"--set {override}: {part!r} is not a place in a list of {len(items)}; count from 0")
    return int(part)
