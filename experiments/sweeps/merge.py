"""The shards of a sweep, put together from their journals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.jobs.content import key_of
from experiments.jobs.journal import Entry, read
from experiments.scenario.file import Scenario
from experiments.sweeps.sweep import Asked, points, run_point
from sim.types import ConfigError


def merged(folders: Sequence[Path]) -> tuple[Asked, dict[str, Entry]]:
    """What was asked for and every answer. ``ConfigError`` if the folders are of different studies, or points lack."""
    first, entries = read(folders[0])
    for folder in folders[1:]:
        study, more = read(folder)
        if study.get("hash") != first.get("hash"):
            raise ConfigError(
                f"{folder}: of another study ({study.get('name')}, {str(study.get('hash'))[:8]}) than {folders[0]} "
                f"({first.get('name')}, {str(first.get('hash'))[:8]}); merge shards of one sweep"
            )
        entries |= {key: entry for key, entry in more.items() if key not in entries or entries[key].failed is not None}
    asked = _asked(folders[0], first)
    keys = [key_of(run_point, point) for point in points(asked)]
    missing = sum(key not in entries for key in keys)
    if missing:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: {missing:,} of {len(keys):,} points are missing; run the shards that are "
            "not there, or again those that were stopped (or a file of the scenario has changed since)"
        )
    return asked, entries


def _asked(folder: Path, study: dict[str, object]) -> Asked:
    asked = study.get("asked")
    if not isinstance(asked, dict):
        raise ConfigError(f"{folder}: its journal is not of a sweep; only those are merged")
    return Asked(
        scenario=Scenario.of(asked["scenario"], where=asked["where"]), rates_per_s=tuple(asked["rates_per_s"]),
        seeds=asked["seeds"], systems=asked["systems"], changes=tuple(asked["changes"]),
    )  # fmt: skip
