"""Routers: which replica prefills and which decodes a request, chosen once on arrival.

A router may read the view and its own counts; it must not look into queues behind the view, nor keep requests.
Ties go to the replica that the plan names first, so equal runs stay equal.
"""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter

from sim.policy import RequestView, View
from sim.types import Reject, Route


class LeastRequests:
    """Colocated: the replica with the fewest requests waiting or running."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        best = min(view.replicas, key=lambda replica: replica.num_waiting + replica.num_running)
        return Route(best.leg, best.leg)

    def finished(self, request: RequestView) -> None:
        pass


class RoundRobin:
    """Colocated: replicas in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        replica = view.replicas[self._turn % len(view.replicas)]
        self._turn += 1
        return Route(replica.leg, replica.leg)

    def finished(self, request: RequestView) -> None:
        pass


class LeastLoadedPair:
    """Split: the prefill replica with the fewest prompt tokens pending, the decode replica with the fewest
    requests assigned (those not there yet included). ``mixed`` replicas can serve either leg."""

    def __init__(self) -> None:
        self._assigned: dict[str, int] = defaultdict(int)
        self._place: dict[int, str] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills, decodes = view.with_role("prefill", "mixed"), view.with_role("decode", "mixed")
        if not prefills or not decodes:
            return Reject(f"no {'prefill' if not prefills else 'decode'} replica is up")
        prefill = min(prefills, key=attrgetter("pending_prefill_tokens"))
        assigned = self._assigned
        decode = min(decodes, key=lambda replica: assigned[replica.name])
        assigned[decode.name] += 1
        self._place[request.id] = decode.name
        return Route(prefill.leg, decode.leg)

    def finished(self, request: RequestView) -> None:
        self._assigned[self._place.pop(request.id)] -= 1
