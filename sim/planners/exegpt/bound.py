"""Branch and bound over a grid whose throughput and latency both rise with every coordinate (ExeGPT, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, product
from math import inf, prod
from typing import NamedTuple

Point = tuple[int, ...]
TOLERANCE = 0.05
"""Shares by which throughput and latency may fall where they should rise (the paper looks at 2, 5 and 10 %)."""


class Perf(NamedTuple):
    """Requests/s, and the seconds that a request with the bounded length takes; infinite where memory is short."""

    throughput_per_s: float
    latency_s: float


class Block(NamedTuple):
    """All points from ``low`` to ``high``, both included."""

    low: Point
    high: Point

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in zip(self.low, self.high, strict=True))

    def cut(self, side: int) -> tuple[Block, Block]:
        """Two halves, across a side that has more than one value."""
        middle = (self.low[side] + self.high[side]) // 2
        return Block(self.low, _put(self.high, side, middle)), Block(_put(self.low, side, middle + 1), self.high)


class Found(NamedTuple):
    """The best point within the bound (None: there is none), the points looked at, those there are, and the least
    latency seen."""

    point: Point | None
    perf: Perf
    evaluations: int
    points: int
    least_s: float


NOTHING = Perf(0.0, inf)


@dataclass(slots=True)
class Best:
    """Looks at every point once, and keeps the highest throughput within the bound."""

    price: Callable[[Point], Perf]
    bound_s: float
    point: Point | None = None
    perf: Perf = NOTHING
    known: dict[Point, Perf] = field(default_factory=dict)

    def look(self, point: Point) -> Perf:
        if point not in self.known:
            perf = self.known[point] = self.price(point)
            better = self.point is None or perf.throughput_per_s > self.perf.throughput_per_s
            if better and perf.latency_s <= self.bound_s and perf.latency_s < inf:
                self.point, self.perf = point, perf
        return self.known[point]

    def found(self, sides: Point) -> Found:
        least_s = min((perf.latency_s for perf in self.known.values()), default=inf)
        return Found(self.point, self.perf, len(self.known), prod(sides), least_s)


def exhaustive(price: Callable[[Point], Perf], sides: Point, bound_s: float) -> Found:
    """Every point of a grid with so many values on each side."""
    best = Best(price, bound_s)
    for point in product(*map(range, sides)):
        best.look(point)
    return best.found(sides)


def branch_and_bound(
    price: Callable[[Point], Perf], sides: Point, bound_s: float, tolerance: float = TOLERANCE
) -> Found:
    """The same by cutting blocks in two, the highest upper corner first.

    A half is dropped when its lower corner takes ``1 + tolerance`` times the bound, or its upper corner does not
    surpass the best throughput even times that. With a tolerance of 0 it finds what ``exhaustive`` finds, if both
    figures rise with every coordinate.
    """
    best = Best(price, bound_s)
    whole = Block((0,) * len(sides), tuple(side - 1 for side in sides))
    if best.look(whole.high).latency_s <= bound_s and best.point is not None:
        return best.found(sides)
    turn = count()
    queue: list[tuple[float, int, Block]] = []

    def enqueue(block: Block) -> None:
        lower, upper = best.look(block.low), best.look(block.high)
        hopeful = upper.throughput_per_s * (1 + tolerance) > best.perf.throughput_per_s
        within = lower.latency_s < inf and lower.latency_s <= bound_s * (1 + tolerance)
        if block.low != block.high and hopeful and within:
            heappush(queue, (-upper.throughput_per_s, next(turn), block))

    enqueue(whole)
    while queue:
        negative, _, block = heappop(queue)
        if -negative * (1 + tolerance) <= best.perf.throughput_per_s:
            break  # nor does any behind it surpass the best
        for half in _halves(block, best, bound_s, sides):
            enqueue(half)
    return best.found(sides)


def _halves(block: Block, best: Best, bound_s: float, sides: Point) -> Iterator[Block]:
    """In two dimensions cut as the better of the off-diagonal corners within the bound says; else the longest side."""
    long = [side for side, length in enumerate(block.sides) if length]
    chosen = max(long, key=lambda side: block.sides[side] / sides[side])
    if len(long) == 2:
        across = [_put(block.low, side, block.high[side]) for side in reversed(long)]  # top left, bottom right
        perfs = [best.look(corner) for corner in across]
        within = [perf.throughput_per_s if perf.latency_s <= bound_s else -1.0 for perf in perfs]
        if max(within) >= 0:
            chosen = long[0] if within[0] >= within[1] else long[1]
    yield from block.cut(chosen)


def _put(point: Point, side: int, value: int) -> Point:
    return (*point[:side], value, *point[side + 1 :])
