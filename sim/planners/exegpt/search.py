"""The best schedule over RRA, WAA-C and WAA-M within a latency bound, and the plan that goes with it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from sim.planners.exegpt.bound import TOLERANCE, Found, branch_and_bound, exhaustive
from sim.planners.exegpt.layout import alike, degrees
from sim.planners.exegpt.lengths import Rule, Traffic
from sim.planners.exegpt.schedule import BAND, KINDS, Kind, Schedule, Space, World
from sim.planners.exegpt.timing import Timing
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan

MOST_PROMPTS, PROMPT_STEP = 512, 4
"""Of a phase, and between two that are looked at (ours)."""


class Searched(NamedTuple):
    """One kind at one tensor-parallel degree; no schedule: none keeps the bound."""

    space: Space
    found: Found
    schedule: Schedule | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All that was looked at."""

    bound_s: float
    searched: tuple[Searched, ...]
    wall_s: float

    @property
    def best(self) -> Schedule | None:
        """The highest throughput; of equal ones the lower latency, then the first."""
        found = [one.schedule for one in self.searched if one.schedule is not None]
        return max(found, key=lambda one: (one.perf.throughput_per_s, -one.perf.latency_s), default=None)

    def best_of(self, kinds: Collection[Kind]) -> Schedule | None:
        return replace(self, searched=tuple(one for one in self.searched if one.space.kind in kinds)).best

    @property
    def evaluations(self) -> int:
        return sum(one.found.evaluations for one in self.searched)

    @property
    def points(self) -> int:
        """What an exhaustive search looks at."""
        return sum(one.found.points for one in self.searched)

    @property
    def least_s(self) -> float:
        return min((one.found.least_s for one in self.searched), default=inf)


@dataclass(slots=True, kw_only=True)
class ExeGPT:
    """Searches schedules for the latency of the 99th-percentile output length; what is stated is not searched.

    ``bound_s`` None: the SLO's ``e2e_s``, or no bound. It remembers the schedule of the last problem, which batchers
    follow. ``whole``: look at every point instead of branch and bound.
    """

    kinds: tuple[Kind, ...] = KINDS
    bound_s: float | None = None
    encode_batch: int | None = None
    decode_iterations: int | None = None
    micro_batches: int | None = None
    tp: int | None = None
    tp_gpus: int | None = None
    gpu: str | None = None
    gpus: int | None = None
    rule: Rule = "littles_law"
    band: float = BAND
    tolerance: float = TOLERANCE
    whole: bool = False
    _last: tuple[tuple[Any, ...], Search] | None = field(default=None, repr=False)

    def names(self, problem: Problem) -> tuple[str, ...]:
        """The GPUs that a schedule is for."""
        return alike(problem, self.gpu, self.gpus)

    def plan(self, problem: Problem) -> Plan:
        return self.schedule(problem).plan

    def schedule(self, problem: Problem, kinds: Collection[Kind] = KINDS) -> Schedule:
        """The best one of these kinds. ``InfeasibleError`` if none keeps the bound."""
        search = self.search(problem)
        best = search.best_of(kinds)
        if best is not None:
            return best
        if not any(one.space.kind in kinds for one in search.searched):
            raise ConfigError(f"system.schedule: {', '.join(kinds)} is not among the kinds searched; set it to auto")
        if search.least_s == inf:
            raise InfeasibleError(
                f"system: no schedule of {problem.model.name} on {len(self.names(problem))} GPUs fits their "
                f"memory and max_num_seqs ({problem.limits.max_num_seqs}); use more GPUs, or state a smaller "
                "encode_batch"
            )
        raise InfeasibleError(
            f"system: the latency bound is {search.bound_s:g} s (latency_bound_s, else slo.e2e_s); the lowest latency "
            f"of the schedules looked at is {search.least_s:.4g} s; raise it, or use more or faster GPUs"
        )

    def last(self, kinds: Collection[Kind]) -> Schedule:
        """The schedule of these kinds for the problem that was planned last."""
        best = None if self._last is None else self._last[1].best_of(kinds)
        if best is None:
            raise ConfigError(
                f"system.schedule: the plan has replicas for {', '.join(kinds)}, none of which was planned"
            )
        return best

    def search(self, problem: Problem) -> Search:
        """Every kind at every degree of tensor parallelism; not repeated while the problem is the same."""
        key = (
            problem.cluster, problem.model, problem.cost, problem.workload.lengths, problem.limits, problem.slo.e2e_s,
        )  # fmt: skip
        if self._last is None or self._last[0] != key:
            began_s = time.perf_counter()
            bound_s = self.bound_s or problem.slo.e2e_s or inf
            spaces = list(self.spaces(problem))
            if not spaces:
                raise self._nothing(problem)
            searched = tuple(self._searched(space, bound_s, len(spaces) == 1) for space in spaces)
            self._last = key, Search(bound_s=bound_s, searched=searched, wall_s=time.perf_counter() - began_s)
        return self._last[1]

    def _searched(self, space: Space, bound_s: float, alone: bool) -> Searched:
        if alone and self.bound_s is None and all(side == 1 for side in space.sides):  # stated: nothing to choose
            schedule = space.at((0, 0, 0))
            return Searched(space, Found((0, 0, 0), schedule.perf, 1, 1, schedule.perf.latency_s), schedule)
        if self.whole:
            found = exhaustive(space.price, space.sides, bound_s)
        else:
            found = branch_and_bound(space.price, space.sides, bound_s, self.tolerance)
        return Searched(space, found, None if found.point is None else space.at(found.point))

    def _nothing(self, problem: Problem) -> ConfigError:
        """Why what is stated leaves no schedule."""
        names = self.names(problem)
        known = degrees(problem, names)
        if self.tp is not None and self.tp not in known:
            return ConfigError(
                f"system.tp is {self.tp}; {problem.model.name} on {len(names)} GPUs has {', '.join(map(str, known))}"
            )
        if self.tp_gpus is not None and not any(self._joined(g, len(names)) for g in known if self.tp in (None, g)):
            return ConfigError(
                f"system.tp_gpus is {self.tp_gpus}; it must be whole groups of tp ({self.tp or '2 or more'}), at most "
                f"{len(names)} GPUs"
            )
        return ConfigError(
            f"system.schedule is {', '.join(self.kinds)}; two pools take two GPUs, there is {len(names)}"
        )

    # ------------------------------------------------------------ what there is to search

    def spaces(self, problem: Problem) -> Iterator[Space]:
        names = self.names(problem)
        traffic = Traffic.of(problem.workload)
        timing = Timing(problem, traffic.prompt_tokens, traffic.context_tokens, traffic.decode_iterations, names)
        world = World(timing=timing, traffic=traffic, gpus=names, rule=self.rule, band=self.band)
        for kind in self.kinds:
            if kind != "rra" and len(names) < 2:
                continue
            for degree in degrees(problem, names):
                if self.tp in (None, degree) and (joined := self._joined(degree, len(names))):
                    yield Space(
                        world=world, kind=kind, degree=degree, encode_batches=self._encode_batches(problem),
                        paces=self._paces(kind, traffic, len(names)), joined=joined,
                    )  # fmt: skip

    def _joined(self, degree: int, total: int) -> Sequence[int]:
        """Numbers of GPUs in groups, most first."""
        if degree == 1:
            return [] if self.tp_gpus else [0]
        numbers = range(total // degree * degree, 0, -degree)
        return [number for number in numbers if self.tp_gpus in (None, number)]

    def _encode_batches(self, problem: Problem) -> Sequence[int]:
        if self.encode_batch is not None:
            return [self.encode_batch]
        return [
            n for n in (1, 2, *range(PROMPT_STEP, MOST_PROMPTS + 1, PROMPT_STEP)) if n <= problem.limits.max_num_seqs
        ]

    def _paces(self, kind: Kind, traffic: Traffic, gpus: int) -> Sequence[int]:
        if kind == "rra":
            if self.decode_iterations is not None:
                return [self.decode_iterations]
            return range(max(1, traffic.bounded_iterations), 0, -1)  # from there on more iterations are worse in both
        return [self.micro_batches or gpus]

    # ------------------------------------------------------------ what is told

    def explain(self, problem: Problem) -> list[str]:
        """The schedule chosen, the best of each kind, and how much of the whole was looked at."""
        search = self.search(problem)
        bound = "without a latency bound" if search.bound_s == inf else f"within {search.bound_s:g} s"
        lines = [f"schedule {bound}: {self.schedule(problem)}"]
        for kind in self.kinds:
            rest = search.best_of([kind])
            if rest is not None and rest is not search.best:
                lines.append(f"best {rest}")
            elif rest is None:
                lines.append(f"no {kind.upper()} keeps the bound and fits")
        lines.append(
            f"{search.evaluations:,} evaluations in {search.wall_s:.2f} s; an exhaustive search has {search.points:,}"
        )
        return lines
