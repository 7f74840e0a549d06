"""The read-only sight of the whole system that routers, transfers and reschedulers get."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from sim.engine.clock import Clock
from sim.engine.replica.state import ReplicaState
from sim.policy import Problem, Workload
from sim.types import Plan, PolicyError, Role, to_ps, to_s


class SystemView:
    """Fits ``sim.policy.View``. ``replicas`` are those that are up and not retiring, in the plan's order."""

    def __init__(self, problem: Problem, plan: Plan, clock: Clock, rng: np.random.Generator) -> None:
        self.problem = problem
        self.plan = plan
        self.replicas: Sequence[ReplicaState] = ()
        self.rng = rng
        self._clock = clock
        self._by_name: dict[str, ReplicaState] = {}
        self._by_role: dict[tuple[Role, ...], Sequence[ReplicaState]] = {}
        self.arrivals: deque[int] = deque()  # ps
        self.completions: deque[tuple[int, tuple[int, int]]] = deque()  # ps, (input tokens, output tokens)

    def show(self, plan: Plan, replicas: Sequence[ReplicaState]) -> None:
        """The engine's word on what is up now."""
        self.plan = plan
        self.replicas = tuple(replicas)
        self._by_name = {replica.name: replica for replica in replicas}
        self._by_role = {}

    def with_role(self, *roles: Role) -> Sequence[ReplicaState]:
        if roles not in self._by_role:
            self._by_role[roles] = tuple(replica for replica in self.replicas if replica.role in roles)
        return self._by_role[roles]

    @property
    def now_s(self) -> float:
        return to_s(self._clock.now_ps)

    def replica(self, name: str) -> ReplicaState:
        if name not in self._by_name:
            raise PolicyError(f"a policy asks for replica {name!r}; up are {', '.join(self._by_name) or 'none'}")
        return self._by_name[name]

    def observed(self, window_s: float) -> Workload | None:
        start_ps = self._clock.now_ps - to_ps(window_s)
        while self.arrivals and self.arrivals[0] < start_ps:
            self.arrivals.popleft()
        while self.completions and self.completions[0][0] < start_ps:
            self.completions.popleft()
        if not self.arrivals or not self.completions:
            return None
        rate_per_s = len(self.arrivals) / min(window_s, self.now_s)
        return Workload(rate_per_s=rate_per_s, lengths=tuple(lengths for _, lengths in self.completions))

    def seconds_to_move(self, source: str, target: str, kv_bytes: float) -> float:
        cluster = self.problem.cluster
        path = cluster.path(self.replica(source).gpus, self.replica(target).gpus)
        if not path.usage:
            return path.latency_s
        return path.latency_s + kv_bytes / path.bytes_per_s(cluster.capacity_bytes_per_s)
