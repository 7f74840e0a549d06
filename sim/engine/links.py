"""Transfers over shared links: every flow gets its max-min fair share of the resources it crosses.

A flow's path says which fraction of its bytes crosses each resource (GPU port, NIC, region pair). Shares are
recomputed, for the flows that touch each other only, when a flow starts or ends or a resource changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from sim.cluster import Cluster, Path
from sim.engine.clock import Alarm, Clock
from sim.types import PS_PER_S, to_ps


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes under way; ``done`` is called, with an alarm about ``subject``, when the last one has arrived."""

    usage: tuple[tuple[str, float], ...]
    latency_ps: int
    left_bytes: float
    done: Callable[[Alarm], None]
    subject: Any
    since_ps: int
    bytes_per_s: float = 0.0
    alarm: Alarm | None = None

    @property
    def stuck(self) -> bool:
        """A resource on its way is cut: nothing moves until it changes."""
        return self.alarm is None and not self.bytes_per_s


def cut_for_good(source: str, target: str) -> str:
    """Why a request fails whose way is cut when nothing is left that could restore it."""
    return f"the link from {source} to {target} is cut, and nothing restores it"


class Links:
    """The resources of a cluster and the flows on them."""

    def __init__(self, clock: Clock, cluster: Cluster) -> None:
        self._clock = clock
        self._nominal = cluster.capacity_bytes_per_s
        self._capacity = dict(self._nominal)
        self._on: dict[str, dict[Flow, float]] = {resource: {} for resource in self._nominal}

    def start(self, path: Path, size_bytes: float, done: Callable[[Alarm], None], subject: Any = None) -> Flow:
        """Send bytes along a path from now on; at least one tick passes until ``done``."""
        now_ps = self._clock.now_ps
        flow = Flow(path.usage, to_ps(path.latency_s), size_bytes, done, subject, now_ps)
        if not flow.usage or size_bytes <= 0:
            flow.alarm = self._clock.at(now_ps + max(1, flow.latency_ps), done, subject)
            return flow
        shared = False
        alone_bytes_per_s = inf
        for resource, fraction in flow.usage:
            users = self._on[resource]
            if users:
                shared = True
            users[flow] = fraction
            bytes_per_s = self._capacity[resource] / fraction
            if bytes_per_s < alone_bytes_per_s:
                alone_bytes_per_s = bytes_per_s
        if shared:
            self._share(self._touching([flow]))
        else:
            self._set_rate(flow, alone_bytes_per_s)
        return flow

    def cancel(self, flow: Flow) -> None:
        if flow.alarm is not None:
            flow.alarm.cancel()
        self._remove(flow)

    def bytes_per_s(self, path: Path) -> float:
        """Of a path now, for whoever is alone on it."""
        return path.bytes_per_s(self._capacity)

    def scale(self, resource: str, factor: float) -> None:
        """Set a resource's bandwidth to a multiple of its nominal one; 0 cuts it."""
        self._capacity[resource] = self._nominal[resource] * factor
        self._share(self._touching(list(self._on[resource])))

    # ------------------------------------------------------------ inside

    def _remove(self, flow: Flow) -> None:
        beside: dict[Flow, None] = {}
        for resource, _ in flow.usage:
            users = self._on[resource]
            users.pop(flow, None)
            if users:
                beside.update(dict.fromkeys(users))
        if beside:
            self._share(self._touching(list(beside)))

    def _sent(self, alarm: Alarm) -> None:
        flow: Flow = alarm.subject
        self._remove(flow)
        flow.alarm = self._clock.at(self._clock.now_ps + max(1, flow.latency_ps), flow.done, flow.subject)

    def _touching(self, flows: list[Flow]) -> dict[Flow, None]:
        """These flows and all that share a resource with them, directly or through others."""
        found: dict[Flow, None] = dict.fromkeys(flows)
        todo = list(flows)
        while todo:
            for resource, _ in todo.pop().usage:
                for other in self._on[resource]:
                    if other not in found:
                        found[other] = None
                        todo.append(other)
        return found

    def _share(self, flows: dict[Flow, None]) -> None:
        for flow, bytes_per_s in self._fair(flows).items():
            if bytes_per_s != flow.bytes_per_s:
                self._set_rate(flow, bytes_per_s)

    def _set_rate(self, flow: Flow, bytes_per_s: float) -> None:
        now_ps = self._clock.now_ps
        flow.left_bytes -= flow.bytes_per_s * (now_ps - flow.since_ps) / PS_PER_S
        flow.since_ps = now_ps
        flow.bytes_per_s = bytes_per_s
        if flow.alarm is not None:
            flow.alarm.cancel()
        flow.alarm = None
        if bytes_per_s > 0:
            last_ps = now_ps + max(1, ceil(max(0.0, flow.left_bytes) / bytes_per_s * PS_PER_S))
            flow.alarm = self._clock.at(last_ps, self._sent, flow)

    def _fair(self, flows: dict[Flow, None]) -> dict[Flow, float]:
        """Progressive filling: raise all rates together, freeze those that meet a full resource."""
        rates: dict[Flow, float] = {}
        open_flows = dict(flows)
        resources = {resource: self._capacity[resource] for flow in flows for resource, _ in flow.usage}
        while open_flows:
            level, full = float("inf"), ""
            for resource, left in resources.items():
                users = self._on[resource]
                weight = sum(fraction for flow, fraction in users.items() if flow in open_flows)
                if weight and left / weight < level:
                    level, full = left / weight, resource
            level = max(0.0, level)
            for flow in [flow for flow in self._on[full] if flow in open_flows]:
                rates[flow] = level
                del open_flows[flow]
                for resource, fraction in flow.usage:
                    resources[resource] -= fraction * level
        return rates
