"""What happens to a cluster from outside: event files (YAML or CSV), and seeded faults and spot notices.

A YAML file is a list of mappings, a CSV file has the same names as columns; both need ``at_s``, ``kind`` and
``target``. ``gpu_slow`` needs ``factor`` > 0, ``link_scaled`` needs ``factor`` >= 0, ``spot_notice`` needs
``deadline_s``; the others have neither. See ``sim.types.ClusterEvent``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from sim.outside import read_yaml
from sim.types import LAST_S, ClusterEvent, ConfigError
from traces.arrivals import positive
from traces.table import Column, clip, csv_rows, label, nearest, optional, seconds
from traces.write import replacing

KINDS: tuple[str, ...] = get_args(get_type_hints(ClusterEvent)["kind"])
COLUMNS = (
    Column("at_s", "at_s", seconds, "a number of seconds"),
    Column("kind", "kind", label, f"one of {', '.join(KINDS)}"),
    Column("target", "target", label, "the name of a GPU, node or link"),
    Column("factor", "factor", optional(seconds), "a number", required=False),
    Column("deadline_s", "deadline_s", optional(seconds), "a number of seconds", required=False),
)
FIELDS = tuple(column.field for column in COLUMNS)
NEEDS = {"gpu_slow": "factor", "link_scaled": "factor", "spot_notice": "deadline_s"}


def read_events(path: str | Path) -> tuple[ClusterEvent, ...]:
    """The events of a ``.yaml``, ``.yml`` or ``.csv`` file in order of time; ConfigError where malformed."""
    path = Path(path)
    rows: Iterable[tuple[str, dict[str, Any]]]
    if path.suffix == ".csv":
        rows = ((f"{path}:{line}", record) for line, record in csv_rows(path, COLUMNS))
    elif path.suffix in (".yaml", ".yml"):
        rows = _yaml_rows(path)
    else:
        raise ConfigError(f"{path}: suffix '{path.suffix}' is unknown; use .yaml, .yml or .csv")
    return tuple(sorted((_event(place, record) for place, record in rows), key=attrgetter("at_s")))


def write_events(path: str | Path, events: Iterable[ClusterEvent]) -> None:
    """Writes ``.yaml``, ``.yml`` or ``.csv``, complete or not at all. ConfigError for another suffix."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".csv"):
        raise ConfigError(f"{path}: suffix '{path.suffix}' is unknown; use .yaml, .yml or .csv")
    records = [{field: getattr(event, field) for field in FIELDS} for event in events]
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        else:
            import yaml

            known = [{name: value for name, value in record.items() if value is not None} for record in records]
            yaml.safe_dump(known, file, sort_keys=False)


def _yaml_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    found = read_yaml(path, "events")
    if not isinstance(found, list):
        raise ConfigError(f"{path}: holds {clip(found)}; expected a list of events")
    for number, item in enumerate(found, start=1):
        yield f"{path}: event {number}", _parsed(f"{path}: event {number}", item)


def _parsed(place: str, item: object) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ConfigError(f"{place} is {clip(item)}; expected a mapping with {', '.join(FIELDS)}")
    for name in item:
        if name not in FIELDS:
            raise ConfigError(f"{place}: field {clip(name)} is unknown; {nearest(name, FIELDS)}")
    record = {}
    for column in COLUMNS:
        try:
            record[column.field] = column.parse(item.get(column.name))
        except (ValueError, TypeError):
            found = "absent" if item.get(column.name) is None else clip(item[column.name])
            raise ConfigError(f"{place}: field {column.name} is {found}; expected {column.expected}") from None
    return record


def _event(place: str, record: dict[str, Any]) -> ClusterEvent:
    kind = record["kind"]
    if kind not in KINDS:
        raise ConfigError(f"{place}: field kind is '{kind}'; {nearest(kind, KINDS)}")
    for field in ("factor", "deadline_s"):
        if (record.get(field) is not None) != (NEEDS.get(kind) == field):
            raise ConfigError(f"{place}: {kind} {'needs' if NEEDS.get(kind) == field else 'has no'} field {field}")
    for field in ("at_s", "factor", "deadline_s"):
        most = 1e6 if field == "factor" else LAST_S
        if not 0 <= (record.get(field) or 0) <= most:
            raise ConfigError(f"{place}: field {field} is {record[field]}; expected a number >= 0, at most {most:g}")
    if kind == "gpu_slow" and record["factor"] == 0:
        raise ConfigError(f"{place}: field factor is 0; expected a number > 0 (step times are multiplied by it)")
    return ClusterEvent(**record)


# ---------------------------------------------------------------- seeded generators


def gpu_failures(
    gpus: Sequence[str],
    *,
    mean_time_between_failures_s: float,
    horizon_s: float,
    repair_s: float | None = None,
    seed: int = 0,
) -> tuple[ClusterEvent, ...]:
    """Independent failures with exponential times to failure, before ``horizon_s``.

    A GPU comes back ``repair_s`` after its loss (None: never) and may fail again. Each GPU has its own
    random stream by its place in ``gpus``: more GPUs or a longer horizon keep the events of the others.
    """
    return _losses("gpu_lost", gpus, mean_time_between_failures_s, horizon_s, repair_s, seed, deadline_s=None)


def spot_notices(
    targets: Sequence[str],
    *,
    mean_life_s: float,
    deadline_s: float,
    horizon_s: float,
    replaced_after_s: float | None = None,
    seed: int = 0,
) -> tuple[ClusterEvent, ...]:
    """Reclaims of spot GPUs or nodes: a notice after an exponential life, the loss ``deadline_s`` later.

    ``replaced_after_s``: a replacement under the same name joins so long after the loss (None: never).
    """
    if deadline_s < 0:
        raise ConfigError(f"deadline_s is {deadline_s}; expected a number >= 0")
    return _losses("spot_notice", targets, mean_life_s, horizon_s, replaced_after_s, seed, deadline_s=deadline_s)


def _losses(
    kind: Any,
    targets: Sequence[str],
    mean_life_s: float,
    horizon_s: float,
    back_after_s: float | None,
    seed: int,
    *,
    deadline_s: float | None,
) -> tuple[ClusterEvent, ...]:
    positive("mean life in seconds", mean_life_s)
    positive("horizon_s", horizon_s)
    if back_after_s is not None:
        positive("seconds until a lost GPU is back", back_after_s)
    events: list[ClusterEvent] = []
    for target, stream in zip(targets, np.random.SeedSequence(seed).spawn(len(targets)), strict=True):
        rng = np.random.default_rng(stream)
        time_s = mean_life_s * rng.standard_exponential()
        while time_s < horizon_s:
            events.append(ClusterEvent(at_s=time_s, kind=kind, target=target, deadline_s=deadline_s))
            if back_after_s is None:
                break
            time_s += (deadline_s or 0.0) + back_after_s
            if time_s < horizon_s:
                events.append(ClusterEvent(at_s=time_s, kind="gpu_joined", target=target))
            time_s += mean_life_s * rng.standard_exponential()
    return tuple(sorted(events, key=attrgetter("at_s")))
