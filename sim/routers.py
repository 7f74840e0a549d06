"""Routers: which replica prefills and which decodes a request, chosen once on arrival.

A router may read the view and its own counts; it must not look into queues behind the view, nor keep requests.
Ties go to the replica that the plan names first, so equal runs stay equal.
"""

from __future__ import annotations

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
        self._assigned: dict[tuple[str, ...], int] = {}
        self._place: dict[int, tuple[str, ...]] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills, decodes = view.with_role("prefill", "mixed"), view.with_role("decode", "mixed")
        if not prefills or not decodes:
            return Reject(f"no {'prefill' if not prefills else 'decode'} replica is up")
        prefill = min(prefills, key=lambda replica: replica.pending_prefill_tokens)
        decode = min(decodes, key=lambda replica: self._assigned.get(replica.leg, 0))
        self._assigned[decode.leg] = self._assigned.get(decode.leg, 0) + 1
        self._place[request.id] = decode.leg
        return Route(prefill.leg, decode.leg)

    def finished(self, request: RequestView) -> None:
        self._assigned[self._place.pop(request.id)] -= 1
