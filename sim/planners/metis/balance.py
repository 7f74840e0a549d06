"""Layers over the stages of a pipeline, and samples over the replicas of a stage.

Source: Metis (USENIX ATC 2024). Ours: the layers are cut by an exact dynamic programme, not by its heuristic, which can
leave stages empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ATTEMPTS, MARGIN = 3, 0.9
"""Repairs of a cut that memory does not hold, and what a repair aims at."""


def cut(worths: Sequence[Floats]) -> tuple[int, ...] | None:
    """Where each stage begins and the last one ends, so that the worst stage is as little as can be.

    ``worths``: by stage, of having the layers ``first <= layer < end`` at [first, end]; infinite: it cannot, as of no
    layer at all. None if there is no way. Of equal cuts the one whose last stages have most layers.
    """
    count = len(worths[0]) - 1
    best = np.full(count + 1, inf)
    best[0] = 0.0
    firsts = []
    for worth in worths:
        ways = np.maximum(best[:, None], worth)
        firsts.append(ways.argmin(axis=0))
        best = ways.min(axis=0)
    if best[-1] == inf:
        return None
    bounds = [count]
    for first in reversed(firsts):
        bounds.append(int(first[bounds[-1]]))
    return tuple(reversed(bounds))


def balanced(loads: Sequence[float], capacities: Sequence[float]) -> tuple[int, ...] | None:
    """The cut with the least load over capacity of the worst stage; None if there are more stages than layers."""
    ends = np.concatenate(([0.0], np.cumsum(loads)))
    places = np.arange(len(ends))
    spans = np.where(places[:, None] < places, ends - ends[:, None], inf)
    return cut([spans / capacity for capacity in capacities])


class Balanced(NamedTuple):
    """``slack``: memory that a stage has over what it needs. ``attempts``: cuts tried; ``fits``: the last one does."""

    bounds: tuple[int, ...]
    slack: tuple[float, ...]
    attempts: int
    fits: bool


def repaired(
    loads: Sequence[float], capacities: Sequence[float], needs: Sequence[Sequence[float]], memory: Sequence[float]
) -> Balanced | None:
    """Balanced, with less for stages that overflow, and what they lose for those that have room.

    ``needs``: by stage, the memory of each layer there; ``memory``: what the stage has. None: no cut at all.
    """
    shares = list(capacities)
    for attempt in range(1, ATTEMPTS + 1):
        bounds = balanced(loads, shares)
        if bounds is None:
            return None
        needed = [sum(need[a:b]) for need, a, b in zip(needs, bounds, bounds[1:], strict=False)]
        slack = tuple(has - need for has, need in zip(memory, needed, strict=True))
        if min(slack) >= 0 or attempt == ATTEMPTS:
            return Balanced(bounds, slack, attempt, min(slack) >= 0)
        shares = _shifted(shares, needed, memory)
    return None


def _shifted(shares: Sequence[float], needed: Sequence[float], memory: Sequence[float]) -> list[float]:
    """Capacity goes from stages that overflow to the others, in proportion to theirs and within their memory."""
    ratios = [has / need if need else inf for has, need in zip(memory, needed, strict=True)]
    less = [share * MARGIN * ratio if ratio < 1 else share for share, ratio in zip(shares, ratios, strict=True)]
    short = sum(shares) - sum(less)
    takers = sum(share for share, ratio in zip(shares, ratios, strict=True) if ratio >= 1)
    return [
        share + min(short * share / takers, share * (ratio - 1)) if ratio >= 1 else share
        for share, ratio in zip(less, ratios, strict=True)
    ]


def shares(total: int, times: Sequence[float]) -> tuple[int, ...]:
    """Whole samples in proportion to speed, which sum to ``total``: rounded down, the rest to the largest remainders.

    Ties go to the faster, then to the first.
    """
    speeds = [1 / time for time in times]
    exact = [total * speed / sum(speeds) for speed in speeds]
    whole = [floor(share + 1e-9) for share in exact]
    order = sorted(range(len(times)), key=lambda i: (round(whole[i] - exact[i], 9), -speeds[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return tuple(whole)
