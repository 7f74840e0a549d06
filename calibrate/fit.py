"""Fitting: repeated measurements to monotone tables, and their error on measurements left out of the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.cost import HeldOut
from sim.types import ConfigError

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
"""Row numbers."""


def medians(counts: ArrayLike, seconds: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Distinct counts in rising order, the median of each one's repeats, and how many repeats there are."""
    x, y = np.asarray(counts, float), np.asarray(seconds, float)
    if x.size == 0 or x.shape != y.shape:
        raise ConfigError(f"fit: {x.size} counts and {y.size} seconds; they must be equally many, and not none")
    distinct, repeats = np.unique(x, return_counts=True)
    return distinct, np.array([np.median(y[x == value]) for value in distinct]), repeats.astype(float)


def rising(values: Floats, weights: Floats | None = None) -> Floats:
    """The nearest sequence in (weighted) least squares that never falls."""
    from scipy.optimize import isotonic_regression

    return np.array(isotonic_regression(values, weights=weights).x, dtype=np.float64)


def thinned(counts: ArrayLike, seconds: ArrayLike, tolerance: float) -> tuple[Floats, Floats]:
    """The knots that are needed: between them, lines miss no dropped point by more than ``tolerance`` (a share).

    Splits at the worst point until none is worse (Douglas and Peucker, 1973). The ends stay.
    """
    x, y = np.asarray(counts, float), np.asarray(seconds, float)
    keep, open_ranges = {0, len(x) - 1}, [(0, len(x) - 1)]
    while open_ranges:
        low, high = open_ranges.pop()
        inner = slice(low + 1, high)
        line = np.interp(x[inner], x[[low, high]], y[[low, high]])
        miss = np.abs(line - y[inner]) / np.maximum(y[inner], 1e-30)
        if miss.size and miss.max() > tolerance:
            worst = low + 1 + int(miss.argmax())
            keep.add(worst)
            open_ranges += [(low, worst), (worst, high)]
    order = sorted(keep)
    return x[order], y[order]


def errors(predicted: ArrayLike, measured: ArrayLike) -> Floats:
    """Absolute errors as shares of what was measured."""
    truth = np.asarray(measured, float)
    shares: Floats = np.abs(np.asarray(predicted, float) - truth) / truth
    return shares


def held_out(shares: ArrayLike) -> HeldOut:
    """Summary of errors (as from ``errors``) on measurements the fit did not see."""
    values = np.asarray(shares, float)
    if values.size == 0:
        raise ConfigError("fit: no measurement was left out; give more measurements")
    return HeldOut(mape=round(float(values.mean()), 5), largest=round(float(values.max()), 5), points=values.size)


def splits(size: int, *, share: float, repeats: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Random (train, test) row numbers; ``share`` of the rows is tested in each of ``repeats`` splits."""
    for stream in np.random.SeedSequence(seed).spawn(repeats):
        order = np.random.default_rng(stream).permutation(size)
        cut = round(size * share)
        yield np.sort(order[cut:]), np.sort(order[:cut])


def left_out(groups: Sequence[object]) -> Iterator[tuple[Rows, Rows]]:
    """(train, test) row numbers that leave out all rows of one group at a time: the error at shapes never seen."""
    labels = np.array([repr(group) for group in groups])
    for label in sorted(set(labels)):
        yield np.flatnonzero(labels != label), np.flatnonzero(labels == label)


Predict = Callable[[NDArray[np.intp], Rows], Floats]
"""(train rows, test rows) -> errors on the test rows."""


def validated(predict: Predict, folds: Iterator[tuple[Rows, Rows]]) -> HeldOut:
    """Errors of all folds together."""
    return held_out(np.concatenate([predict(train, test) for train, test in folds]))
