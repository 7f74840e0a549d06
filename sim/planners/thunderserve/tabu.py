"""The upper level: tabu search over groups and phases, and what a search hands back.

Source: ThunderServe (MLSys 2025): clustering for a start, neighbours by flip, split, merge and move, the best one
that is not tabu is next. Ours: the start's phases, patience, aspiration, and that equal groups are priced once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from sim.planners.thunderserve.groups import PHASES, Grouping, flips, neighbour
from sim.planners.thunderserve.orchestrate import NOTHING, Routing
from sim.planners.thunderserve.survey import Survey
from sim.planners.thunderserve.world import Candidate, Survivors, World
from sim.policy import Problem
from sim.transfers import Quantized
from sim.types import InfeasibleError, Plan

State = TypeVar("State")
KEPT = 10
"""Candidates a search hands back."""
ATTEMPTS = 5
"""Random moves tried per neighbour wanted."""


class LogRow(NamedTuple):
    """One evaluation: the ``value`` of this neighbour and the ``best`` so far, with the seconds since the start.

    Values are shares of requests within the SLO (HexGen-2: how many times the rate flows).
    """

    step: int
    evaluation: int
    elapsed_s: float
    move: str
    value: float
    best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Candidates, best first, and how they were found."""

    candidates: tuple[Candidate, ...]
    log: tuple[LogRow, ...]
    elapsed_s: float

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def evaluations_per_s(self) -> float:
        return len(self.log) / self.elapsed_s

    def require(self, attainment: float) -> Candidate:
        """The best candidate; ``InfeasibleError`` if it is predicted to meet the SLO less often."""
        best = self.best
        if best.attainment >= attainment:
            return best
        what = "a lower rate or more GPUs" if best.served < 1 else "a looser slo, a lower rate or faster GPUs"
        raise InfeasibleError(
            f"slo.attainment is {attainment:g}; the best plan of {len(self.log)} reaches {best.attainment:.3f} and "
            f"serves {best.served:.0%} of the rate (bottleneck: {best.bottleneck}); it takes {what}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TabuSearch:
    """ThunderServe's planner.

    ``seconds``: stop then, with the best so far (results then depend on the machine's speed). ``n_steps``,
    ``n_neighbors`` and ``n_memory`` are defaults of ours as the paper's are not verified.
    """

    transfer: Quantized = field(default_factory=Quantized)
    n_steps: int = 100
    n_neighbors: int = 10
    n_memory: int = 5
    patience: int = 100
    seconds: float | None = None

    def plan(self, problem: Problem) -> Plan:
        return self.search(problem).best.plan

    def search(
        self,
        problem: Problem,
        *,
        without: Collection[str] = (),
        progress: Callable[[int, float], None] | None = None,
    ) -> Search:
        """Candidates on the cluster's GPUs, less those named in ``without``.

        ``progress`` gets the step and the best attainment. ``InfeasibleError`` says what is missing.
        """
        world = World(problem, self.transfer, without)
        start = [*world.start(), *self._near_optimal(world, problem, without)]
        rng = np.random.default_rng(np.random.SeedSequence(problem.seed).spawn(4)[3])

        def neighbours(grouping: Grouping) -> Iterable[tuple[str, Grouping]]:
            seen: set[Grouping] = {grouping}
            for _ in range(self.n_neighbors * ATTEMPTS):
                step = neighbour(grouping, rng)
                if step is not None and step.grouping not in seen and world.feasible(step.grouping):
                    seen.add(step.grouping)
                    yield step.move, step.grouping
                if len(seen) > self.n_neighbors:
                    return

        return self._walk(start, neighbours, world.evaluate, world.candidate, progress)

    def _near_optimal(self, world: World, problem: Problem, without: Collection[str]) -> Iterable[Grouping]:
        """Groups and phases of the capacity program's layouts, to start from."""
        survey = Survey(problem, self.transfer, without)
        placed = (survey.placer.of(shape) for shape in survey.shapes(colocated=False))
        groupings = [world.of_plan(one.plan) for one in placed if one is not None]
        return [one for one in dict.fromkeys(groupings) if one is not None and world.feasible(one)]

    def predicted(self, problem: Problem, plan: Plan) -> Candidate | None:
        """What is expected of a plan with its own shares; None if some of its replicas do both phases."""
        by_role = {role: [one for one in plan.replicas if one.role == role] for role in PHASES}
        if len(by_role["prefill"]) + len(by_role["decode"]) < len(plan.replicas) or not plan.shares:
            return None
        world = Survivors(problem, self.transfer, plan.replicas)
        names = {role: [one.name for one in some] for role, some in by_role.items()}
        shares = np.array([[plan.shares.get((a, b), 0.0) for b in names["decode"]] for a in names["prefill"]])
        routing = world.expected(tuple(one.role for one in plan.replicas), shares)
        return None if routing is None else world.candidate(tuple(one.role for one in plan.replicas), routing)

    def routed(self, problem: Problem, plan: Plan) -> Candidate:
        """The plan as it is, with shares by the LP. ``InfeasibleError`` without room, a phase or a link."""
        world = Survivors(problem, self.transfer, plan.replicas)
        roles = tuple(replica.role for replica in plan.replicas)
        routing = world.evaluate(roles) if set(roles) == set(PHASES) else NOTHING
        if not routing.served:
            raise InfeasibleError(
                "plan: nothing can be routed over it; it needs a prefill and a decode replica with a link between "
                "them, each with KV for the longest request"
            )
        return world.candidate(roles, routing)

    def replan(self, problem: Problem, plan: Plan, *, lost: Collection[str] = (), flips_only: bool = True) -> Search:
        """After GPUs were lost or the load has shifted: a plan for what is left.

        ``flips_only`` (lightweight): groups that lost a GPU go, the others keep stages and layers, so no weights are
        loaded; only their phases change, and the LP is solved anew. Otherwise a full search on the GPUs left.
        """
        if not flips_only:
            return self.search(problem, without=lost)
        kept = tuple(replica for replica in plan.replicas if not set(replica.gpus) & set(lost))
        world = Survivors(problem, self.transfer, kept)
        return self._walk(
            world.start(),
            lambda roles: (("flip", other) for other in flips(roles)),
            world.evaluate,
            world.candidate,
            None,
        )

    def _walk(
        self,
        start: Iterable[State],
        neighbours: Callable[[State], Iterable[tuple[str, State]]],
        evaluate: Callable[[State], Routing],
        candidate: Callable[[State, Routing], Candidate],
        progress: Callable[[int, float], None] | None,
    ) -> Search:
        """Tabu search from the best of ``start``; a tabu neighbour counts if it beats the best so far."""
        trace = _Trace(evaluate, inf if self.seconds is None else self.seconds)
        trace.look(0, [("start", state) for state in start])
        current, last_gain = trace.best, 0
        memory: deque[State] = deque([current], maxlen=self.n_memory)
        for step in range(1, self.n_steps + 1):
            before = trace.known[trace.best].rank
            looked = trace.look(step, neighbours(current))
            allowed = [s for s in looked if s not in memory or trace.known[s].rank > before]
            if allowed:
                current = max(allowed, key=lambda state: trace.known[state].rank)
                memory.append(current)
            if trace.known[trace.best].rank > before:
                last_gain = step
            if progress is not None:
                progress(step, trace.known[trace.best].attainment)
            if step - last_gain >= self.patience or trace.out_of_time:
                break
        if not trace.known[trace.best].served:
            raise InfeasibleError(
                f"cluster.links: of {len(trace.log)} plans none has a link from a prefill to a decode group; give the "
                "machines bandwidth to each other"
            )
        ranked = sorted(trace.known, key=lambda state: trace.known[state].rank, reverse=True)[:KEPT]
        return Search(
            candidates=tuple(candidate(state, trace.known[state]) for state in ranked),
            log=tuple(trace.log),
            elapsed_s=trace.elapsed_s,
        )


class _Trace(Generic[State]):
    """Every state evaluated, the best one, and the log."""

    def __init__(self, evaluate: Callable[[State], Routing], seconds: float) -> None:
        self._evaluate = evaluate
        self._started_s = time.perf_counter()
        self._seconds = seconds
        self.known: dict[State, Routing] = {}
        self.log: list[LogRow] = []
        self.best: State

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s

    @property
    def out_of_time(self) -> bool:
        return self.elapsed_s >= self._seconds

    def look(self, step: int, moves: Iterable[tuple[str, State]]) -> list[State]:
        """Evaluate these, and note the best; one at least, and then no more once time is up."""
        looked = []
        for move, state in moves:
            if state not in self.known:
                self.known[state] = found = self._evaluate(state)
                if not self.log or found.rank > self.known[self.best].rank:
                    self.best = state
                best = self.known[self.best].attainment
                self.log.append(LogRow(step, len(self.log), self.elapsed_s, move, found.attainment, best))
            looked.append(state)
            if self.out_of_time:
                break
        return looked
