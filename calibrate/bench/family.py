"""What is measured: operators, the axes along which they vary, and the points that they are measured at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from statistics import median, quantiles
from typing import Any, NamedTuple

Point = Mapping[str, int]
"""Where on the axes: {"tokens": 16}."""


class Runs(NamedTuple):
    """An operator ready to run at one point.

    ``run(i)`` runs it once on the ``i``-th of ``sets`` buffers and returns the tensors that it wrote. ``outputs``:
    buffers that it is to overwrite. ``capturable``: a CUDA graph can hold it. ``host``: what counts is
    the processor's time, not the device's. ``timed``: takes the repeats itself, within so many seconds, in place of
    ``run`` (other processes run it).
    """

    run: Callable[[int], Any]
    sets: int = 1
    outputs: tuple[Any, ...] = ()
    capturable: bool = True
    host: bool = False
    timed: Callable[[float], tuple[float, ...]] | None = None


def _unknown(_point: Point) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One operator. ``times``: how often the whole that its family adds up to runs it.

    ``need_bytes``: device memory that ``prepare`` takes. ``flops``, ``bytes``: arithmetic and least traffic of a run.
    """

    operator: str
    prepare: Callable[[Point], Runs]
    need_bytes: Callable[[Point], int]
    flops: Callable[[Point], float | None] = _unknown
    bytes: Callable[[Point], float | None] = _unknown
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Operators measured at the same points.

    ``axes``: the coarse grid, which the fit is made of; ``refined``: the axes that get more values; ``looks``: how
    often the coarse grid is measured. Points that the fit does not see: ``checks`` of them within the refined grid,
    and those of the grid ``held``.
    """

    name: str
    tp: int
    dtype: str
    axes: Mapping[str, tuple[int, ...]]
    parts: tuple[Part, ...]
    refined: tuple[str, ...] = ()
    looks: int = 1
    checks: int = 0
    held: Mapping[str, tuple[int, ...]] | None = None


class Key(NamedTuple):
    """Names one measured point."""

    operator: str
    tp: int
    dtype: str
    point: tuple[tuple[str, int], ...]


class Measurement(NamedTuple):
    """Repeats of one point, or why there are none; ``spent_s`` is what it took of the budget."""

    seconds: tuple[float, ...]
    spent_s: float
    skipped: str | None = None

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def noise(self) -> float:
        """Half the interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, middle, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / middle


def key(family: Family, part: Part, point: Point) -> Key:
    return Key(part.operator, family.tp, family.dtype, tuple(point.items()))


def points(axes: Mapping[str, tuple[int, ...]]) -> Iterator[Point]:
    """Every point of a grid, the last axis fastest."""
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
