"""Integer piecewise-linear functions of absolute token counts: what makes a step's price exact.

A step's price is integer picoseconds. Every operator is either fixed along a run of equal steps (a
``Curve`` of the step's tokens or sequences) or a ``Row``: for a fixed batch or chunk, pieces
in the absolute context, so that the price of iteration ``i`` is the price of the first one plus ``i`` times an
integer. Between two knots values never fall, and a knot continues the piece before it exactly.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

UNBOUNDED = 1 << 30
"""Iterations of a line whose price never changes its slope."""


Segment = tuple[int, int, int, bool]
"""A row's price at one place: its value in ps, growth per iteration in ps, for how many iterations that holds, and
whether it lies outside the measured range."""


class Row(NamedTuple):
    """Pieces over the absolute context ``x``: ``values[j] + slopes[j] * (x - knots[j]) // unit`` from ``knots[j]`` on.

    ``unit`` divides the context gained per iteration, so the floor moves by a whole number of slopes. Pieces from
    ``beyond`` on lie outside the measured range (None: no piece does).
    """

    knots: tuple[int, ...]
    values: tuple[int, ...]
    slopes: tuple[int, ...]
    unit: int = 1
    beyond: int | None = None

    def segment(self, x: int, step: int) -> Segment:
        """The price at context ``x`` when every iteration adds ``step`` (a multiple of ``unit``)."""
        knots, values, slopes, unit, beyond = self
        last = len(knots) - 1
        j = last if x >= knots[last] else bisect_right(knots, x) - 1
        value = values[j] + slopes[j] * (x - knots[j]) // unit
        slope = slopes[j] * (step // unit)
        iterations = UNBOUNDED if j == last else -((x - knots[j + 1]) // step)
        return value, slope, iterations, beyond is not None and j >= beyond

    def capped(self, x: int) -> Row:
        """The same up to context ``x``, and no more from there on."""
        pieces = [j for j, knot in enumerate(self.knots) if knot < x]
        values = (*(self.values[j] for j in pieces), self.segment(x, self.unit)[0])
        slopes = (*(self.slopes[j] for j in pieces), 0)
        return Row((*(self.knots[j] for j in pieces), x), values, slopes, self.unit)


def chained(knots: Sequence[int], first_value: int, slopes: Sequence[int], unit: int, beyond: int) -> Row:
    """A row whose values follow from its first value and its slopes, each piece continuing the last one.

    Knots must be multiples of ``unit`` apart.
    """
    values = [first_value]
    for (left, right), slope in zip(pairwise(knots), slopes[:-1], strict=True):
        values.append(values[-1] + slope * ((right - left) // unit))
    return Row(tuple(knots), tuple(values), tuple(slopes), unit, beyond)


def steeper(first: tuple[int, int], second: tuple[int, int]) -> Row:
    """The larger of two lines ``(value at 0, slope)``, slopes >= 0, at every integer."""
    low, high = sorted((first, second), key=lambda line: (line[1], line[0]))
    if low[0] <= high[0]:
        return Row((0,), (high[0],), (high[1],))
    knot = -((high[0] - low[0]) // (high[1] - low[1]))
    return Row((0, knot), (low[0], high[0] + high[1] * knot), (low[1], high[1]))


class Curve(NamedTuple):
    """A monotone integer function of a count (tokens or sequences): held before its first point, linear between.

    ``tail_ps``: growth per count beyond the last point, a function of nothing else.
    """

    at: tuple[int, ...]
    values_ps: tuple[int, ...]
    tail_ps: int

    def price(self, count: int) -> tuple[int, bool]:
        """(picoseconds, whether ``count`` lies beyond the measured range)."""
        at, values, tail = self
        j = bisect_right(at, count) - 1
        if j < 0:
            return values[0], False
        if j == len(at) - 1:
            return values[j] + tail * (count - at[j]), count > at[j]
        rise, run = values[j + 1] - values[j], at[j + 1] - at[j]
        return values[j] + rise * (count - at[j]) // run, False


Increment = tuple[float, tuple[float, ...]]
"""(value at context 0, slope after every knot)."""


class Surface(NamedTuple):
    """A table over (count, context) in picoseconds, held as increments that never fall.

    ``rows[0]`` is the price at ``counts[0]`` (and below); ``rows[k]`` the growth per count between ``counts[k - 1]``
    and ``counts[k]``. Each is (value at context 0, slope after every knot) with all slopes >= 0: the
    sum rises in count and in context, whatever the table held, and meets the table where that did the same.
    Beyond the table it grows by the last increments or ``pair_ps`` per (count x context), whichever is more;
    ``causal``: the counted tokens attend to one another as well. ``sums[k]`` is the price at ``counts[k]``.
    """

    counts: tuple[int, ...]
    knots: tuple[int, ...]
    rows: tuple[Increment, ...]
    sums: tuple[Increment, ...]
    pair_ps: float
    causal: bool

    def at(self, count: int) -> Increment:
        """(value at context 0, slopes after every knot) for one count: picoseconds, and picoseconds per context."""
        k = bisect_left(self.counts, count)
        if k == 0:
            return self.sums[0]
        growth = self.rows[k] if k < len(self.counts) else self._growth_beyond(count)
        return _add(self.sums[k - 1], count - self.counts[k - 1], growth)

    def beyond(self, count: int) -> int:
        """The first piece outside the table, for ``Row.beyond``."""
        return 0 if count > self.counts[-1] else len(self.knots) - 1

    def _growth_beyond(self, count: int) -> Increment:
        value, slopes = self.rows[-1]
        among_themselves = self.pair_ps * (count + self.counts[-1]) / 2 if self.causal else 0.0
        return max(value, among_themselves), tuple(max(slope, self.pair_ps) for slope in slopes)


def surface(
    counts: Sequence[int],
    contexts: Sequence[int],
    table_ps: Sequence[Sequence[float]],
    *,
    pair_ps: float,
    causal: bool,
) -> Surface:
    """The surface through a table of picoseconds, one row per count; where the table falls, it is levelled."""
    if contexts[0] > 0:
        contexts, table_ps = (0, *contexts), [(row[0], *row) for row in table_ps]
    below = [0.0] * len(contexts)
    rows = []
    for k, (count, values) in enumerate(zip(counts, table_ps, strict=True)):
        width = count - counts[k - 1] if k else 1
        growth = _rising([(value - floor) / width for value, floor in zip(values, below, strict=True)])
        slopes = [(b - a) / (y - x) for (x, y), (a, b) in zip(pairwise(contexts), pairwise(growth), strict=True)]
        tail = max(slopes[-1], pair_ps * (1 if k else count))
        rows.append((growth[0], (*slopes, tail)))
        below = [floor + width * value for floor, value in zip(below, growth, strict=True)]
    sums = [rows[0]]
    for (low, high), row in zip(pairwise(counts), rows[1:], strict=True):
        sums.append(_add(sums[-1], high - low, row))
    knots = (0, *contexts[1:-1], contexts[-1] + 1)
    return Surface(tuple(counts), knots, tuple(rows), tuple(sums), pair_ps, causal)


def _add(price: Increment, width: int, growth: Increment) -> Increment:
    slopes = tuple([slope + width * more for slope, more in zip(price[1], growth[1], strict=True)])
    return price[0] + width * growth[0], slopes


def _rising(values: Sequence[float]) -> list[float]:
    return list(accumulate((max(0.0, value) for value in values), max))
