"""Which points a sweep has: any fields of a scenario, as a grid, a list, or a random sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sim.outside import read_yaml
from sim.types import ConfigError

Changes = Mapping[str, Any]
"""Field (``system.engine.max_num_seqs``) -> value."""
STREAM = 0x5EED
"""Names the stream of random samples."""
MOST_POINTS = 1_000_000
KINDS = ("grid", "list", "random")


def grid_of(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``KEY=V1,V2,...``, each value in YAML: ``cluster.nodes[0].count=2,4``. ``ConfigError`` if it reads otherwise."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            found = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            found = None
        if not equals or not key.strip() or not isinstance(found, list) or not found:
            raise ConfigError(f"--grid {text}: it must read KEY=VALUE,VALUE, such as system.tp=1,2,4")
        if key.strip() in grid:
            raise ConfigError(f"--grid {text}: {key.strip()} is given twice; put all its values in one")
        grid[key.strip()] = list(found)
    return grid


def changes_of(grid: Mapping[str, Sequence[Any]], study: Path | None) -> list[dict[str, Any]]:
    """What each point changes: the product of the grid, times the points of a study file; without both, one nothing."""
    outer = list(_product(grid))
    if study is None:
        return outer
    return [{**a, **b} for a in outer for b in read_study(study)]


def read_study(path: Path) -> list[dict[str, Any]]:
    """A study file: ``grid`` (field: values), ``list`` (mappings), ``random`` (samples, seed, fields), one or several.

    Several are put one after the other. A random field is ``{uniform: [a, b]}``, ``{log_uniform: [a, b]}``,
    ``{integers: [a, b]}`` (both ends may come) or ``{choice: [...]}``.
    """
    data = read_yaml(path, "study")
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(f"{path}: a study is a mapping with {', '.join(KINDS)}")
    unknown = [str(name) for name in data if name not in KINDS]
    if unknown:
        raise ConfigError(f"{path}: the key '{unknown[0]}' is unknown; known: {', '.join(KINDS)}")
    found: list[dict[str, Any]] = []
    for kind, part in data.items():
        if kind == "grid":
            found += _product(_mapping(part, f"{path}: grid", listed=True))
        elif kind == "list":
            if not isinstance(part, list) or not part:
                raise ConfigError(f"{path}: list: give a list of mappings from field to value")
            found += [dict(_mapping(item, f"{path}: list[{place}]")) for place, item in enumerate(part)]
        else:
            found += _sampled(_mapping(part, f"{path}: random"), f"{path}: random")
    return found


def _product(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise ConfigError(f"--grid: {count:,} points are more than {MOST_POINTS:,}; take fewer values")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _mapping(value: Any, place: str, *, listed: bool = False) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{place}: it must be a mapping from field to {'values' if listed else 'value'}")
    for name, part in value.items():
        if listed and (not isinstance(part, list) or not part):
            raise ConfigError(f"{place}.{name}: {part!r} is not a list of values; put it in brackets")
    return {str(name): part for name, part in value.items()}


def _sampled(spec: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    known = {"samples", "seed", "fields"}
    if set(spec) - known:
        raise ConfigError(f"{place}: the key '{min(set(spec) - known)}' is unknown; known: {', '.join(sorted(known))}")
    samples, seed = spec.get("samples"), spec.get("seed", 0)
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= MOST_POINTS:
        raise ConfigError(f"{place}.samples: {samples!r} must be a whole number from 1 to {MOST_POINTS:,}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"{place}.seed: {seed!r} must be a whole number from 0")
    fields = _mapping(spec.get("fields"), f"{place}.fields")
    random = np.random.default_rng(np.random.SeedSequence([seed, STREAM]))
    return [
        {name: _drawn(law, f"{place}.fields.{name}", random) for name, law in fields.items()} for _ in range(samples)
    ]


def _drawn(law: Any, place: str, random: np.random.Generator) -> Any:
    if not isinstance(law, Mapping) or len(law) != 1:
        raise ConfigError(f"{place}: give one of uniform, log_uniform, integers, choice")
    ((kind, values),) = law.items()
    if kind == "choice" and isinstance(values, list) and values:
        return values[int(random.integers(len(values)))]
    if kind in ("uniform", "log_uniform", "integers") and _are_bounds(values, positive=kind == "log_uniform"):
        low, high = values
        if kind == "integers":
            return int(random.integers(int(low), int(high) + 1))
        return float(random.uniform(low, high)) if kind == "uniform" else exp(random.uniform(log(low), log(high)))
    raise ConfigError(f"{place}.{kind}: {values!r}: give [low, high], or for choice a list")


def _are_bounds(values: Any, *, positive: bool) -> bool:
    if not isinstance(values, list) or len(values) != 2:
        return False
    if any(isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) for value in values):
        return False
    return values[0] <= values[1] and (not positive or values[0] > 0)
