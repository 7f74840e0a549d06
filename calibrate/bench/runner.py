"""The order of points: every family's coarse grid, then where straight lines miss most, then what no fit may see.

Where they miss by more than noise explains comes first; while time is left, second looks at points whose repeats
differ come next, and then what noise may have hidden.

Where they miss, the points are looked at a second time (a fourth, if it may be noise) before a new one goes between
them: other programs only ever make a kernel slower, so that the quickest look counts, and what was a disturbance is
not taken for a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibrate.bench.family import Family, Key, Measurement, Part, Point, key, points
from calibrate.bench.grid import Refinement, checks, refinement
from calibrate.bench.journal import Journal

TOLERANCE = 0.02
"""Families that lines are expected to miss by less are left as they are."""

CHECK_SHARE = 0.15
"""Of the budget, kept for the points that the fit does not see."""
SEED = 7
LOOKS = 2
"""Times that a point is measured before a new one goes beside it."""
NOISY_LOOKS = 4
"""The same where noise would explain what lines miss."""

Measure = Callable[[Part, Point], Measurement]


class Progress(NamedTuple):
    """Where a run stands. ``left_s``: of the budget, or what the coarse grids still need if that is more."""

    operator: str
    measured: int
    spent_s: float
    left_s: float


class Measured(NamedTuple):
    """What a run gives: every family's refined axes, all measurements, and which of them no fit may see."""

    axes: Mapping[str, Mapping[str, tuple[int, ...]]]
    by_key: Mapping[Key, Measurement]
    held: frozenset[Key]


def run(
    families: Sequence[Family],
    measure: Measure,
    journal: Journal,
    budget_s: float,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Measured:
    """Measure all families within a budget of seconds that counts what the journal holds already.

    The coarse grids are measured whole whatever the budget. Equal measurements lead to equal points, so that a
    run that was broken off goes on where it stood.
    """
    return _Run(families, measure, journal, budget_s, progress).all()


def coarse_looks(family: Family) -> int:
    """Measurements that the coarse grid of a family takes."""
    return family.looks * len(family.parts) * len(list(points(family.axes)))


class _Run:
    def __init__(
        self,
        families: Sequence[Family],
        measure: Measure,
        journal: Journal,
        budget_s: float,
        progress: Callable[[Progress], None],
    ) -> None:
        self.families = families
        self.measure = measure
        self.journal = journal
        self.budget_s = budget_s * (1 - CHECK_SHARE)
        self.progress = progress
        self.axes = {_label(family): dict(family.axes) for family in families}
        self.spent_s = 0.0
        self.used: dict[Key, Measurement] = {}
        self.looks: dict[Key, int] = {}
        self.refining_s = dict.fromkeys(self.axes, 0.0)
        self.coarse_left = sum(map(coarse_looks, families))

    def all(self) -> Measured:
        for family in self.families:
            for point in list(points(family.axes)) * family.looks:
                self._measure(family, point)
        self.coarse_left = 0
        self._refine_all(count_noise=True)
        self._look_at_noisy()
        self._refine_all(count_noise=False)
        held = [(family, point) for family in self.families for point in self._held(family)]
        for family, point in held * LOOKS:
            self._measure(family, point)
        names = frozenset(key(family, part, point) for family, point in held for part in family.parts)
        return Measured(self.axes, self.used, names)

    def _held(self, family: Family) -> list[Point]:
        """The points that the fit is not to see."""
        held = list(points(family.held)) if family.held else []
        return held + checks(self.axes[_label(family)], family.checks, SEED)

    def _refine_all(self, *, count_noise: bool) -> None:
        while self.spent_s < self.budget_s and self._refine(count_noise=count_noise):
            pass

    def _look_at_noisy(self) -> None:
        """Measure points once more whose repeats differ, while there is time."""
        for family in self.families:
            for point in points(self.axes[_label(family)]):
                names = [key(family, part, point) for part in family.parts]
                noisy = any(self.used[name].noise > TOLERANCE for name in names)
                if noisy and min(self.looks[name] for name in names) < LOOKS and self._fits(family, [point]):
                    self._measure(family, point)

    def _refine(self, *, count_noise: bool) -> bool:
        """Better one interval of the family that had the least time so far; False if none is worth it or time is up.

        ``count_noise``: a miss counts as far as noise does not explain it; otherwise all of it does.
        """
        found = [
            (self.refining_s[_label(family)], -better.error, family, name, better.value)
            for family in self.families
            for name in family.refined
            if (better := self._refinement(family, name, count_noise)) is not None and better.error > TOLERANCE
        ]
        for *_, family, name, value in sorted(found, key=lambda row: row[:2]):
            before_s = self.spent_s
            looks = LOOKS if count_noise else NOISY_LOOKS
            if self._look_again(family, name, value, looks) or self._insert(family, name, value):
                self.refining_s[_label(family)] += self.spent_s - before_s
                return True
        return False

    def _refinement(self, family: Family, name: str, count_noise: bool) -> Refinement | None:
        seconds, noise = self._table(family, name)
        return refinement(self.axes[_label(family)][name], seconds, noise if count_noise else np.zeros_like(noise))

    def _look_again(self, family: Family, name: str, value: int, looks: int) -> bool:
        """Measure the neighbours of a value once more; False if all had so many looks or the time is short."""
        axes = self.axes[_label(family)]
        near = [max(at for at in axes[name] if at < value), min(at for at in axes[name] if at > value)]
        short = [
            point
            for point in points({**axes, name: tuple(near)})
            if any(self.looks[key(family, part, point)] < looks for part in family.parts)
        ]
        if not short or not self._fits(family, short):
            return False
        for point in short:
            self._measure(family, point)
        return True

    def _insert(self, family: Family, name: str, value: int) -> bool:
        """Give an axis one more value; False if the time is short."""
        axes = self.axes[_label(family)]
        above = min(at for at in axes[name] if at > value)
        if not self._fits(family, list(points({**axes, name: (above,)}))):
            return False
        for point in points({**axes, name: (value,)}):
            self._measure(family, point)
        axes[name] = tuple(sorted({*axes[name], value}))
        return True

    def _measure(self, family: Family, point: Point) -> None:
        """Look at a point, by the journal where it has the look already."""
        for part in family.parts:
            name = key(family, part, point)
            look = self.looks.get(name, 0)
            if look == len(self.journal.done.get(name, ())):
                coarse_s = self.coarse_left * self.spent_s / len(self.used) if self.used else 0.0
                left_s = max(coarse_s, self.budget_s - self.spent_s)
                self.progress(Progress(part.operator, len(self.used), self.spent_s, left_s))
                self.journal.add(name, self.measure(part, point))
            found = self.journal.done[name][look]
            best = self.used.get(name)
            if best is None or best.skipped or (not found.skipped and found.median_s < best.median_s):
                self.used[name] = found
            self.looks[name] = look + 1
            self.spent_s += found.spent_s
            self.coarse_left -= 1

    def _fits(self, family: Family, line: Sequence[Point]) -> bool:
        """Whether there is time for points that take as long as these did at their last look."""
        took_s = sum(self.used[key(family, part, point)].spent_s for point in line for part in family.parts)
        return self.spent_s + took_s <= self.budget_s

    def _table(self, family: Family, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(seconds of all parts together, their noise) by the values of one axis and all others."""
        axes = self.axes[_label(family)]
        rows = [list(points({**axes, name: (value,)})) for value in axes[name]]
        cells = [[self._sum(family, point) for point in row] for row in rows]
        table = np.array(cells, dtype=float)
        return table[..., 0], table[..., 1]

    def _sum(self, family: Family, point: Point) -> tuple[float, float]:
        seconds = noise_s = 0.0
        for part in family.parts:
            found = self.used[key(family, part, point)]
            if found.skipped:
                return float("nan"), 0.0
            seconds += part.times * found.median_s
            noise_s += part.times * found.median_s * found.noise
        return seconds, noise_s / seconds


def _label(family: Family) -> str:
    return f"{family.name} {family.tp} {family.dtype}"
