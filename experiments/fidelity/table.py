"""Rows of the error table, and the bars that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Use = Literal["judged", "fitted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure and its prediction, in ``unit``.

    ``load``: share of the time that the busiest replica computes in the simulation, or, above 1, time to serve over
    time to arrive. ``use``: a fitted row helped to choose a constant and does not count in any bar.
    """

    study: str
    case: str
    metric: str
    unit: str
    measured: float
    predicted: float
    load: float | None
    use: Use = "judged"

    @property
    def error(self) -> float:
        """Signed, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure that a study must reach; ``value`` and the two limits are shares. ``floor``: larger is better."""

    study: str
    name: str
    value: float
    must: float
    aim: float
    points: int
    floor: bool = False

    @property
    def reached(self) -> bool:
        return self.value >= self.must if self.floor else self.value <= self.must

    @property
    def aimed(self) -> bool:
        return self.value >= self.aim if self.floor else self.value <= self.aim


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What one group of runs shows. ``notes``: settings, and what was fitted on what. ``summary``: a table that the
    page shows in place of the rows."""

    title: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    notes: tuple[str, ...]
    summary: tuple[Mapping[str, object], ...] = ()


def judged(rows: Iterable[Row], metric: str) -> list[Row]:
    return [row for row in rows if row.metric == metric and row.use == "judged"]


def errors(rows: Sequence[Row]) -> list[float]:
    return [abs(row.error) for row in rows]


def median_bar(study: str, rows: Sequence[Row], must: float, aim: float) -> Bar:
    name = f"{rows[0].metric}, median error"
    return Bar(study=study, name=name, value=float(np.median(errors(rows))), must=must, aim=aim, points=len(rows))


def mean_bar(study: str, rows: Sequence[Row], must: float, aim: float) -> Bar:
    name = f"{rows[0].metric}, mean error"
    return Bar(study=study, name=name, value=float(np.mean(errors(rows))), must=must, aim=aim, points=len(rows))


def largest_bar(study: str, rows: Sequence[Row], must: float, aim: float) -> Bar:
    name = f"{rows[0].metric}, largest error"
    return Bar(study=study, name=name, value=max(errors(rows)), must=must, aim=aim, points=len(rows))
