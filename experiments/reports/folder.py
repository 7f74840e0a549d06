"""What a command has written into a folder: which kind of result it is, and its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.runs.rundir import MARK, Run, check_run, read_run
from sim.types import ConfigError

Kind = Literal["run", "comparison", "sweep", "goodput", "plan"]
KINDS: Mapping[str, Kind] = {"runs": "comparison", "best_rates": "sweep", "goodput": "goodput", "plans": "plan"}
"""By a key that only this kind's summary has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """``runs`` of a run or a comparison; ``tables`` (CSV, by stem) of the others."""

    path: Path
    kind: Kind
    name: str
    summary: Mapping[str, Any]
    runs: Mapping[str, Run]
    tables: Mapping[str, pd.DataFrame]
    scenario: str
    environment: Mapping[str, Any]

    def picture(self, name: str) -> str | None:
        """A drawing of the folder as SVG text, without what stands before its root."""
        file = self.path / f"{name}.svg"
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
        return text[text.index("<svg") :]


def read_folder(path: Path) -> Folder:
    """``ConfigError`` if no command of ours wrote it, or if a part is missing or damaged."""
    check_run(path)
    summary = _json(path / MARK)
    kind: Kind = next((kind for key, kind in KINDS.items() if key in summary), "run")
    runs: dict[str, Run] = {}
    if kind == "comparison":
        runs = {label: read_run(path / folder) for label, folder in summary["runs"].items()}
    elif kind == "run":
        run = read_run(path)
        runs = {run.summary["system"]: run}
    first = path / next(iter(summary["runs"].values())) if kind == "comparison" else path
    names = {"sweep": ("runs", "means"), "goodput": ("goodput", "curve"), "plan": ("candidates", "search", "cluster")}
    tables = {name: table for name in names.get(kind, ()) if (table := _csv(path / f"{name}.csv")) is not None}
    return Folder(
        path=path, kind=kind, name=summary.get("name") or path.name, summary=summary, runs=runs, tables=tables,
        scenario=_text(first / "scenario.yaml"), environment=_json(path / "environment.json"),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_text(path))
    except ValueError:
        raise ConfigError(f"{path}: damaged: not valid JSON; run the command that made it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: damaged: not a mapping; run the command that made it again")
    return data


def _csv(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: damaged: {reason}; run the command that made it again") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: cannot be read; run the command that made {path.parent} again") from None
