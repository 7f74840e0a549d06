"""Shares of the traffic that load everything evenly, and how far the rate could grow: an LP with the links.

Variables: the share of each (prefill, decode) pair and of each replica that does both, and the largest load of any
replica or link, which is made as small as possible; behind it, with small weight, the largest load of each sort by
itself. What that load leaves is the headroom; what is loaded that far binds first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sim.planners.thunderserve.replay import Floats

BY_ITSELF = 1e-3
"""Weight of the largest load of one sort (prefill, decode, both, links) against the largest of all."""
ALIKE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resource:
    """What pairs share: the part of it that each takes per unit of its share of the traffic (1: all there is)."""

    name: str
    usage: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Balance:
    """``pairs``: shares by (prefill, decode); ``mixed``: shares of those that do both; all add up to 1.

    ``headroom``: how many times the rate could flow. ``loads``: by name, of what is there at the rate asked for.
    """

    pairs: Floats
    mixed: Floats
    headroom: float
    loads: Mapping[str, float] = field(default_factory=dict)

    @property
    def binds(self) -> str:
        return max(self.loads, key=lambda name: self.loads[name])


def balanced(
    prefill: Floats, decode: Floats, mixed: Floats, linked: NDArray[np.bool_], shared: Sequence[Resource] = ()
) -> Balance | None:
    """None if nothing can be served. Capacities are in units of the rate; ``linked``: which pairs have a link (bool).

    Names of ``loads``: prefill 0, decode 0, mixed 0 ... and the resources'.
    """
    from scipy.optimize import linprog

    m, n, k = len(prefill), len(decode), len(mixed)
    if not (linked.any() or k):
        return None
    size = m * n + k
    rows = [np.concatenate((np.repeat(np.arange(m) == i, n) / cap, np.zeros(k))) for i, cap in enumerate(prefill)]
    rows += [np.concatenate((np.tile(np.arange(n) == j, m) / cap, np.zeros(k))) for j, cap in enumerate(decode)]
    rows += [np.concatenate((np.zeros(m * n), (np.arange(k) == i) / cap)) for i, cap in enumerate(mixed)]
    rows += [np.concatenate((one.usage.ravel(), np.zeros(k))) for one in shared]
    sorts = [0] * m + [1] * n + [2] * k + [3] * len(shared)
    matrix = np.zeros((len(rows) + 4, size + 5))
    matrix[: len(rows), :size] = rows
    matrix[np.arange(len(rows)), size + 1 + np.array(sorts)] = -1  # within its sort's largest load
    for sort in range(4):
        matrix[len(rows) + sort, [size + 1 + sort, size]] = 1, -1  # which is within the largest of all
    cost = np.concatenate((np.zeros(size), [1.0], np.full(4, BY_ITSELF)))
    total = np.concatenate((np.ones(size), np.zeros(5)))[None]
    bounds = [(0.0, 1.0 if ok else 0.0) for ok in linked.ravel().tolist()] + [(0.0, 1.0)] * k + [(0.0, None)] * 5
    solved = linprog(
        cost, A_ub=matrix, b_ub=np.zeros(len(matrix)), A_eq=total, b_eq=[1.0], bounds=bounds, method="highs"
    )
    if solved.x is None:
        return None
    shares = np.clip(solved.x[:size], 0.0, None)
    shares = np.where(shares < ALIKE, 0.0, shares)
    shares /= shares.sum()
    loads = np.array(rows) @ shares
    names = [f"{role} {i}" for role, count in (("prefill", m), ("decode", n), ("mixed", k)) for i in range(count)]
    names += [one.name for one in shared]
    return Balance(
        pairs=shares[: m * n].reshape(m, n),
        mixed=shares[m * n :],
        headroom=1 / float(loads.max()),
        loads=dict(zip(names, loads.tolist(), strict=True)),
    )
