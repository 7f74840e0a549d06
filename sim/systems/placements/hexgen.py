"""HexGen (ICML 2024; arXiv 2311.11514): colocated replicas of unequal GPUs, found by a genetic search."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from sim.batchers import RequestLevel, TokenBudget
from sim.planners.hexgen import HexGen, World
from sim.policy import Batcher, Limits, RequestView, System, View
from sim.transfers import Whole
from sim.types import Change, ConfigError, InfeasibleError, Plan, Reject, Role, Route, Signal


class ByCapacity:
    """To the replica that has fewest requests for what it can serve at once and how fast, by the planner's prices.

    Workers of the original pull from one queue when they have room, so each gets what it can serve; here that is
    decided when a request arrives.
    """

    def __init__(self, planner: HexGen) -> None:
        self._planner = planner
        self._plan: Plan | None = None
        self._rates: Mapping[str, float] = {}
        self._assigned: dict[str, int] = defaultdict(int)
        self._place: dict[int, str] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        if view.plan is not self._plan:
            self._plan, self._rates = view.plan, rates(self._planner, view)
        best = min(view.replicas, key=lambda one: (self._assigned[one.name] + 1) / self._rates[one.name])
        self._assigned[best.name] += 1
        self._place[request.id] = best.name
        return Route(best.leg, best.leg)

    def finished(self, request: RequestView) -> None:
        self._assigned[self._place.pop(request.id)] -= 1


def rates(planner: HexGen, view: View) -> dict[str, float]:
    """Requests/s of each replica of the plan when it is full; alike where the planner knows no layout."""
    world = World(view.problem, planner)
    found = {}
    for replica in view.plan.replicas:
        known = world.layouts.best(world.counts(replica)) is not None
        server = world.server(world.counts(replica)) if known else None
        found[replica.name] = server.slots / server.busy_s if server is not None else 1.0
    return found


class Regenerate:
    """When GPUs are lost or join, the search runs again on those that are there."""

    interval_s: float | None = None

    def __init__(self, planner: HexGen) -> None:
        self._planner = planner
        self._lost: set[str] = set()

    def react(self, signal: Signal, view: View) -> Change | None:
        if signal.kind == "lost":
            self._lost |= set(signal.gpus)
        elif signal.kind == "joined":
            self._lost -= set(signal.gpus)
        else:
            return None
        try:
            plan = self._planner.plan(view.problem, without=self._lost)
        except InfeasibleError:
            return None  # what is left of the plan goes on
        if plan == view.plan:
            return None
        return Change(plan=plan, reason=f"search again: {', '.join(signal.gpus)} {signal.kind}")


def hexgen(
    batching: Literal["continuous", "one"] = "continuous",
    generations: int = 300,
    asymmetric: bool = True,
    prices: Literal["model", "paper"] = "model",
) -> System:
    """HexGen: replicas of unequal GPUs by a genetic search, pipelines whose stages have TP degrees of their own.

    ``batching``: continuous (vLLM V1's), as ThunderServe compared with it, or one request a batch, as its own runtime.
    ``asymmetric`` false: all stages of a replica have one TP degree and as many layers. ``prices``: of a layer, by the
    latency model or by the paper's formulas. When GPUs are lost or join, the search of ``generations`` runs again.
    """
    if batching not in ("continuous", "one"):
        raise ConfigError(f"system.batching is {batching!r}; hexgen has continuous, one")
    continuous = batching == "continuous"
    planner = HexGen(generations=generations, continuous=continuous, asymmetric=asymmetric, prices=prices)

    def batcher(role: Role) -> Batcher:
        return TokenBudget() if continuous else RequestLevel()

    return System(
        name="hexgen",
        mirrors="HexGen (ICML 2024), by its runtime and public copies of its authors' scheduler scripts",
        planner=planner,
        router=lambda: ByCapacity(planner),
        batcher=batcher,
        transfer=Whole,
        rescheduler=lambda: Regenerate(planner),
        limits=Limits() if continuous else Limits(max_num_seqs=1),
    )
