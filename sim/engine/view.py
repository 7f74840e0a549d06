"""The read-only sight of the whole system that routers, transfers and reschedulers get.

A replica that can never hold a request is no choice for it: routers see it among those that are up, and not among
``replicas``. Which ones can is asked here, once for all routers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy

import numpy as np

from sim.engine.clock import Clock
from sim.engine.replica.job import Job
from sim.engine.replica.state import ReplicaState
from sim.policy import Problem, Workload
from sim.types import Plan, PolicyError, Role, to_ps, to_s

LEGS: tuple[tuple[Role, ...], ...] = (("prefill", "mixed"), ("decode", "mixed"))
"""Roles that can take either leg of a request."""


def kind(replica: ReplicaState) -> tuple[Role, int]:
    """Replicas that are alike in this can hold the same requests."""
    return replica.role, replica.total_blocks


class SystemView:
    """Fits ``sim.policy.View``. ``up`` are those that are up and not retiring, in the plan's order."""

    def __init__(self, problem: Problem, plan: Plan, clock: Clock, rng: np.random.Generator) -> None:
        self.problem = problem
        self.plan = plan
        self.up: Sequence[ReplicaState] = ()
        self.replicas: Sequence[ReplicaState] = ()
        self._kinds: list[ReplicaState] = []
        """One of each that differ in what they can hold; none where there is nothing to choose."""
        self._narrowed: dict[tuple[str, ...], SystemView] = {}
        self.rng = rng
        self._clock = clock
        self._by_name: dict[str, ReplicaState] = {}
        self._by_role: dict[tuple[Role, ...], Sequence[ReplicaState]] = {}
        self.arrivals: deque[int] = deque()  # ps
        self.completions: deque[tuple[int, tuple[int, int]]] = deque()  # ps, (input tokens, output tokens)

    def show(self, plan: Plan, replicas: Sequence[ReplicaState]) -> None:
        """The engine's word on what is up now."""
        self.plan = plan
        self.up = self.replicas = tuple(replicas)
        self._by_name = {replica.name: replica for replica in replicas}
        self._by_role = {}
        kinds = {kind(replica): replica for replica in replicas}
        choices = max((sum(one.role in roles for one in kinds.values()) for roles in LEGS), default=0)
        self._kinds = list(kinds.values()) if choices > 1 else []
        self._narrowed = {}

    def of(self, job: Job, tokens: int) -> SystemView:
        """What the router sees of ``replicas`` for a job that ends with so many tokens in the KV cache."""
        if not self._kinds:
            return self
        able = {
            kind(one): one.too_long(job, job.input_tokens if one.role == "prefill" else tokens) is None
            for one in self._kinds
        }
        if all(able.values()):
            return self
        left = tuple([replica for replica in self.up if able[kind(replica)]])
        if any(self.with_role(*roles) and not any(one.role in roles for one in left) for roles in LEGS):
            return self  # whoever is chosen will say why it cannot
        names = tuple([replica.name for replica in left])
        if names not in self._narrowed:
            view = self._narrowed[names] = copy(self)
            view.replicas, view._by_role = left, {}
        return self._narrowed[names]

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
