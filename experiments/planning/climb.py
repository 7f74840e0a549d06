"""The most that a cluster carries, and the least rent for what is asked for: ``phasewise plan`` of a searching planner.

1. The capacity LP: an upper bound, and near-optimal layouts at several loads of the phases.
2. They race in the engine (``race.py``) with what the planner's own search offers and with the simple layouts that one
   would try first: colocated vLLM on all GPUs and on each type, every division of the types into prefill and decode. So
   no plan is worse than the best of those.
3. The planner searches again at the rate that is carried, and the best layout's neighbours race, until nothing gains.
4. The least rent that carries the asked rate is looked for among layouts of the program and the simple ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from experiments.planning.race import COARSE, Contender, Race, Trials
from experiments.scenario.resolve import Setup, resolve
from experiments.scenario.system import SystemSpec
from sim.planners.thunderserve import TabuSearch
from sim.planners.thunderserve.capacity import Bound, Shape
from sim.planners.thunderserve.place import Placed
from sim.planners.thunderserve.survey import Survey
from sim.types import ConfigError, InfeasibleError, Plan

SEARCHED = 4
"""Candidates of the planner's own search that race."""
NEIGHBOURS = 14
"""Of the best layout, in a round."""
MOST_TRIALS = 120
REQUESTS_A_GPU, FEWEST_GPUS = 3000, 24
"""Simulated in the race, of a cluster of at least so many GPUs: what it may cost, whatever the machine's speed."""
TRIALS_A_STEP = 4
"""Of the search's own ``n_steps``: who wants a short search gets a short race."""
AGAIN_STEPS = 10
"""Of the planner's search at the rate that is carried."""
TP_DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Climbed:
    """``contenders``: of different shapes, the best first; ``baselines``: colocated vLLM, on all GPUs and on each type.

    ``cheapest``: the least rent found that carries the scenario's rate; None: it has none, or nothing carries it.
    """

    bound: Bound
    contenders: tuple[Contender, ...]
    baselines: tuple[Contender, ...]
    cheapest: Contender | None
    trials: int


def climb(
    setup: Setup,
    offered: Sequence[Plan],
    *,
    top: int,
    colocated: bool = True,
    seconds: float | None = None,
    progress: Callable[[int, float], None] = lambda step, best: None,
) -> Climbed:
    """``offered``: what the planner's search found at the asked rate. ``colocated``: groups may do both phases."""
    ascent = Ascent(setup, colocated, seconds, progress)
    return ascent.run(offered, top)


class Ascent:
    """One climb: the survey of the cluster, and the race."""

    def __init__(
        self, setup: Setup, colocated: bool, seconds: float | None, progress: Callable[[int, float], None]
    ) -> None:
        self.setup, self.colocated = setup, colocated
        planner = setup.system.planner
        assert isinstance(planner, TabuSearch)
        self.planner = planner
        self.problem = replace(setup.problem, limits=setup.system.limits)
        self.spot = setup.scenario.cluster.pricing == "spot"
        self.survey = Survey(self.problem, planner.transfer, spot=self.spot)
        until_s = inf if seconds is None else time.perf_counter() + seconds
        most = min(MOST_TRIALS, TRIALS_A_STEP * max(1, planner.n_steps))
        self.most_requests = REQUESTS_A_GPU * max(FEWEST_GPUS, len(self.problem.cluster.gpu_ids))
        self.race = Race(Trials(), most, self.most_requests, until_s, progress)

    def run(self, offered: Sequence[Plan], top: int) -> Climbed:
        bound = self.survey.capacity.bound()
        baselines = self._by_place()
        self.race.enter(self._of_shapes(self.survey.shapes(colocated=self.colocated), "capacity LP"))
        self.race.enter(one for several in baselines.values() for one in several)
        self.race.enter(self.by_hand())
        self.race.enter(self._of_plans(offered[:SEARCHED], "tabu search"), first=SEARCHED)
        self._iterate()
        rated = tuple(self._rated(several) for several in baselines.values())
        for one in rated:
            self.race.note(one)
        self.race.confirm()
        cheapest = self._cheapest(rated)
        return Climbed(
            bound=bound, contenders=self._leaders(top), baselines=rated, cheapest=cheapest,
            trials=self.race.trials.count,
        )  # fmt: skip

    # ------------------------------------------------------------ who enters

    def _of_shapes(self, shapes: Iterable[Shape], label: str) -> list[Contender]:
        placed = [self.survey.placer.of(shape) for shape in shapes]
        return [self._of(one, label) for one in placed if one is not None]

    def _of(self, placed: Placed, label: str) -> Contender:
        return Contender(
            setup=self.setup, plan=placed.plan, label=label, binds=placed.binds,
            most_per_s=placed.rate_per_s, likely_per_s=placed.likely_per_s,
        )  # fmt: skip

    def _of_plans(self, plans: Iterable[Plan], label: str) -> list[Contender]:
        """With their own shares; the LP only says what they could carry."""
        found = []
        for plan in plans:
            placed = self.survey.placer.balance(plan.replicas)
            if placed is not None:
                found.append(self._of(replace(placed, plan=plan), label))
        return found

    def by_hand(self) -> list[Contender]:
        """Every division of the types into prefill and decode."""
        found = []
        for label, shape in self.survey.split_by_type():
            placed = self.survey.placer.of(shape)
            if placed is not None:
                found.append(self._of(placed, label))
        return found

    def colocated_vllm(self) -> list[Contender]:
        """On all GPUs and on each type alone, at every TP."""
        return [one for several in self._by_place().values() for one in several]

    def _by_place(self) -> dict[str, list[Contender]]:
        """Colocated vLLM at every TP that fits, by where: all GPUs, and each type alone."""
        names = list(dict.fromkeys(kind.node.gpu.name for kind in self.survey.kinds))
        found: dict[str, list[Contender]] = {}
        for gpu in [None, *names] if len(names) > 1 else [None]:
            where = "all GPUs" if gpu is None else gpu
            for tp in TP_DEGREES:
                one = self._vllm(gpu, tp, f"colocated vLLM on {where}, TP {tp}")
                if one is not None:
                    found.setdefault(where, []).append(one)
        return found

    def _vllm(self, gpu: str | None, tp: int, label: str, replicas: int | None = None) -> Contender | None:
        options = {"tp": tp, "gpu": gpu, "replicas": replicas}
        stated = {name: value for name, value in options.items() if value is not None}
        spec = SystemSpec(name="vllm", engine=self.setup.scenario.system.engine, **stated)
        scenario = self.setup.scenario.model_copy(update={"system": spec, "plan": None})
        try:
            setup = resolve(scenario)
            plan = setup.system.planner.plan(replace(setup.problem, limits=setup.system.limits))
            placed = self.survey.placer.balance(plan.replicas)
        except ConfigError:
            return None
        if placed is None:
            return None
        return replace(self._of(replace(placed, plan=plan), label), setup=setup)

    # ------------------------------------------------------------ until nothing gains

    def _iterate(self) -> None:
        """The planner once more, for the rate that is carried; then neighbours of the best, round by round."""
        if self.race.best is None:
            return
        if not self.race.over:
            self.race.enter(self._of_plans(self._searched_again(), "tabu search, again"), first=SEARCHED)
        while not self.race.over and self.race.best is not None:
            shape = self.survey.shape_of(self.race.best.plan)
            if shape is None:
                return
            around = self.survey.neighbours(shape, colocated=self.colocated)
            contenders = [self._of(one, "a step from the best") for one in around]
            if not self.race.enter(contenders, first=NEIGHBOURS):
                return

    def _searched_again(self) -> list[Plan]:
        workload = replace(self.problem.workload, rate_per_s=self.race.rate_per_s)
        planner = replace(self.planner, n_steps=min(self.planner.n_steps, AGAIN_STEPS))
        try:
            return [one.plan for one in planner.search(replace(self.problem, workload=workload)).candidates]
        except InfeasibleError:
            return []

    # ------------------------------------------------------------ what is handed back

    def _leaders(self, top: int) -> tuple[Contender, ...]:
        """The best, then those of other shapes that could carry most, each with its own rate."""
        best = self.race.best
        if best is None:
            return ()
        others = [one for one in self.race.entered.values() if one.key != best.key]
        others.sort(key=lambda one: -(one.goodput_per_s or min(one.likely_per_s, self.race.rate_per_s)))
        rated = [
            one if one.goodput_per_s or self.race.late else self.race.rated(one, COARSE) for one in others[: top - 1]
        ]
        return tuple(sorted([best, *rated], key=lambda one: -(one.goodput_per_s or 0.0)))

    def _rated(self, several: Sequence[Contender]) -> Contender:
        """The TP degree with the highest rate: by the race if one was measured there, else by the LP."""
        best = max(several, key=lambda one: one.likely_per_s)
        found = [self.race.tried.get(one.key, one) for one in several]
        measured = [one for one in found if one.goodput_per_s]
        return max(measured, key=lambda one: one.goodput_per_s or 0.0) if measured else self.race.rated(best, COARSE)

    def _cheapest(self, baselines: Sequence[Contender]) -> Contender | None:
        """Of the layouts that carry the asked rate in the engine, the one with the least rent."""
        rate = self.setup.scenario.workload.rate
        if rate is None or not self.survey.priced or self.race.rate_per_s < rate:
            return None
        shapes = self._of_shapes(self.survey.cheap(rate, colocated=self.colocated), "least rent")
        found = [*shapes, *self._fewest(baselines, rate)]
        for one in sorted(found, key=self._rent):
            if self.race.trials.passed(one, rate):
                return one
        return self.race.best

    def _fewest(self, baselines: Sequence[Contender], rate: float) -> list[Contender]:
        """Each type's colocated layout, with as few replicas as its share of the rate asks for, and one more."""
        found = []
        for one in baselines:
            if not one.goodput_per_s or one.goodput_per_s < rate:
                continue
            options = one.setup.scenario.system.options
            need = max(1, -(-rate * len(one.plan.replicas) // one.goodput_per_s))
            for replicas in range(int(need), min(int(need) + 2, len(one.plan.replicas) + 1)):
                made = self._vllm(options.get("gpu"), options["tp"], f"{one.label}, {replicas} replicas", replicas)
                if made is not None:
                    found.append(made)
        return found

    def _rent(self, one: Contender) -> float:
        cluster = self.problem.cluster
        gpus = [cluster.gpu(gpu) for replica in one.plan.replicas for gpu in replica.gpus]
        return sum((gpu.usd_per_hour_spot if self.spot else gpu.usd_per_hour) or 0.0 for gpu in gpus)
