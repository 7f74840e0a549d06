"""A quick replay of Poisson arrivals on replicas, from the cost model alone: what a partition's goodput would be.

Each replica serves up to as many requests at once as keep its steps within bounds; the next request goes where fewest
wait for their share of it (the least loaded). As AlpaServe's simulator, which HexGen's paper takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.types import Slo


class Server(NamedTuple):
    """``slots`` requests at once, each for ``busy_s``; the first token comes ``prefill_s`` after the start, the others
    ``step_s`` apart in the mean."""

    slots: int
    prefill_s: float
    step_s: float
    busy_s: float


def attained(servers: Sequence[Server], arrivals_s: NDArray[np.float64], slo: Slo) -> tuple[float, float]:
    """Share of the requests that keep all bounds, and the mean seconds until they end."""
    ttft_s, tpot_s, e2e_s = (inf if bound is None else bound for bound in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    free = [[0.0] * server.slots for server in servers]
    for slots in free:
        heapify(slots)
    kept, total_s = 0, 0.0
    for now_s in arrivals_s.tolist():
        starts = [max(now_s, slots[0]) for slots in free]
        ends = [start + server.busy_s for start, server in zip(starts, servers, strict=True)]
        best = min(range(len(servers)), key=ends.__getitem__)
        heapreplace(free[best], ends[best])
        first_s, end_s = starts[best] - now_s + servers[best].prefill_s, ends[best] - now_s
        kept += first_s <= ttft_s and servers[best].step_s <= tpot_s and end_s <= e2e_s
        total_s += ends[best] - now_s
    return kept / len(arrivals_s), total_s / len(arrivals_s)
