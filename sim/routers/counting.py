"""Routers that count requests, or deal them out by shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from operator import attrgetter
from typing import Literal

from sim.policy import RequestView, View
from sim.types import Plan, Reject, Route


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


class ByShare:
    """Split: (prefill, decode) pairs by the plan's shares, in a smooth weighted round robin, or drawn at random.

    Shares of pairs that are not up are spread over the others; a request is refused if no pair is up. A plan without
    shares counts every pair alike. The round robin starts anew when the pairs or their shares change.
    """

    def __init__(self, draw: Literal["round-robin", "random"] = "round-robin") -> None:
        self._draw = draw
        self._plan: Plan | None = None
        self._legs: dict[str, tuple[str, ...]] = {}
        self._shares: dict[tuple[str, str], float] = {}
        self._credit: dict[tuple[str, str], float] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        legs = {replica.name: replica.leg for replica in view.up}
        if view.plan is not self._plan or legs != self._legs:
            self._plan, self._legs = view.plan, legs
            self._look(self._up(view, legs))
        if not self._shares:
            return Reject("no (prefill, decode) pair of the plan is up")
        able = self._able(view)
        prefill, decode = self._random(able, view) if self._draw == "random" else self._next(able)
        return Route(legs[prefill], legs[decode])

    def finished(self, request: RequestView) -> None:
        pass

    def _up(self, view: View, legs: Container[str]) -> dict[tuple[str, str], float]:
        planned = view.plan.shares
        if not planned:
            decodes = [one.name for one in view.up if one.role != "prefill"]
            planned = {(one.name, d): 1.0 for one in view.up if one.role != "decode" for d in decodes}
        up = {pair: share for pair, share in planned.items() if share > 0 and pair[0] in legs and pair[1] in legs}
        total = sum(up.values())
        return {pair: share / total for pair, share in up.items()}

    def _look(self, shares: dict[tuple[str, str], float]) -> None:
        if shares != self._shares:
            self._shares, self._credit = shares, dict.fromkeys(shares, 0.0)

    def _able(self, view: View) -> list[tuple[str, str]]:
        """Pairs that can hold the request, if there are any."""
        pairs = list(self._shares)
        if view.replicas is view.up:
            return pairs
        names = {replica.name for replica in view.replicas}
        return [pair for pair in pairs if names.issuperset(pair)] or pairs

    def _random(self, pairs: Sequence[tuple[str, str]], view: View) -> tuple[str, str]:
        total = sum(self._shares[pair] for pair in pairs)
        return pairs[int(view.rng.choice(len(pairs), p=[self._shares[pair] / total for pair in pairs]))]

    def _next(self, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Whoever is owed most; each request owes every pair its share."""
        for pair, share in self._shares.items():
            self._credit[pair] += share
        chosen = max(pairs, key=lambda pair: self._credit[pair])
        self._credit[chosen] -= 1.0
        return chosen
