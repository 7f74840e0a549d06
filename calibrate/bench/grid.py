"""Which value an axis should get next: the middle of the interval where straight lines miss most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from math import log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NARROWEST = 1.2
"""Intervals whose ends differ by no more than this factor stay whole."""
UNSEEN = 1.0
"""The miss of an axis of two values, where nothing tells the curve from a line."""


class Refinement(NamedTuple):
    """A value to add, and the error that is to be expected there without it (a share of the time)."""

    error: float
    value: int


def refinement(axis: Sequence[int], seconds: NDArray[np.float64], noise: NDArray[np.float64]) -> Refinement | None:
    """The value that the axis needs most; None if every interval is narrow.

    ``seconds``, ``noise``: one row per value of the axis, a column per point beside it; NaN where unmeasured.
    An interval's error is what a line through the neighbours misses at its ends, more than noise explains. A curve
    bends a quarter as much over half the width; the wider of two equal intervals (in ratio) goes first.
    """
    miss = knot_misses(np.asarray(axis, float), seconds, noise)
    best: tuple[float, Refinement] | None = None
    for j, (low, high) in enumerate(pairwise(axis)):
        value = middle(low, high)
        ratio = (high + 1) / (low + 1)
        if ratio <= NARROWEST or not low < value < high:
            continue
        error = max(miss[j], miss[j + 1]) / 4
        rank = error * log(ratio)
        if best is None or rank > best[0]:
            best = rank, Refinement(error, value)
    return None if best is None else best[1]


def middle(low: int, high: int) -> int:
    """The geometric middle (of the values and one each, so that 0 has one)."""
    return round(sqrt((low + 1) * (high + 1)) - 1)


def checks(axes: Mapping[str, tuple[int, ...]], count: int, seed: int) -> list[dict[str, int]]:
    """Up to ``count`` points within cells of a grid, drawn at random: at the quarters of their sides."""
    sides = [[at for low, high in pairwise(axis) for at in _quarters(low, high)] for axis in axes.values()]
    inner = list(product(*sides))
    order = np.random.default_rng(seed).permutation(len(inner))[:count]
    return [dict(zip(axes, inner[place], strict=True)) for place in sorted(order)]


def _quarters(low: int, high: int) -> list[int]:
    half = middle(low, high)
    return sorted({middle(low, half), half, middle(half, high)} - {low, high})


def knot_misses(axis: NDArray[np.float64], seconds: NDArray[np.float64], noise: NDArray[np.float64]) -> list[float]:
    """What a line between its neighbours misses at each value, beyond the noise; ends take after their neighbour.

    Beside a value that is one less or more there may be a jump, which no value between them can show better.
    """
    if len(axis) < 3:
        return [UNSEEN] * len(axis)
    part = ((axis[1:-1] - axis[:-2]) / (axis[2:] - axis[:-2]))[:, None]
    line = seconds[:-2] + part * (seconds[2:] - seconds[:-2])
    inner = np.abs(line - seconds[1:-1]) / seconds[1:-1] - noise[1:-1]
    apart = np.diff(axis) > 1
    seen = np.isfinite(inner) & (apart[:-1] & apart[1:])[:, None]
    misses = np.where(seen, np.maximum(inner, 0), 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return [float(misses[0]), *(float(value) for value in misses), float(misses[-1])]
