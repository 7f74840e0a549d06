"""Which of many layouts carries most, in the engine: trials at a rate, and a race with the best so far.

A layout enters with what it could carry at most by the capacity LP. Whoever could not beat the best so far is not
simulated; whoever could is tried a little above it, and only who passes there has its own rate bisected. So a hundred
layouts cost little more than a hundred trials. ``goodput_per_s`` of a loser is None: it carries less than the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil, inf

from experiments.scenario.requests import RequestStream
from experiments.scenario.resolve import Setup
from sim.engine import simulate
from sim.goodput import attained, sustained, trial_requests
from sim.metrics import Columns
from sim.planners.thunderserve.survey import signature
from sim.types import ConfigError, Plan, Request, Slo
from traces import TraceSource

GAIN = 1.02
"""Over the best so far, to beat it."""
FINE, COARSE = 0.015, 0.06
"""Share of a rate to which the goodput of the best is found, and that of others."""
MARGIN = 1.15
"""What the LP says may be so much too low: it takes mean lengths for all."""
FIRST, MOST = 300, 6000
"""Requests that a trial of the race looks at first, and at most."""
LEAST_SPAN_S = 60.0
"""A trial lasts so long at least: the means of fewer requests are not those that the plan was made for."""
HALVINGS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A layout under a system. ``label``: where it comes from. ``most_per_s``: its upper bound by the LP;
    ``likely_per_s``: what it is likely to carry."""

    setup: Setup
    plan: Plan
    label: str
    most_per_s: float = inf
    likely_per_s: float = inf
    binds: str | None = None
    goodput_per_s: float | None = None

    @property
    def key(self) -> object:
        cluster = self.setup.problem.cluster
        return self.setup.system.name, signature(self.plan, {gpu: cluster.gpu(gpu).name for gpu in cluster.gpu_ids})


class Trials:
    """Whether a layout carries a rate, by the rule of ``sim.goodput``, on as many requests as that asks for.

    A race makes do with ``MOST`` of them, and looks at the first few before: who fails there fails.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, float, int], list[Request]] = {}
        self.count = self.requests = 0

    def passed(self, one: Contender, rate_per_s: float, *, whole: bool = False) -> bool:
        """At the scenario's seed; ``whole``: on all requests that the rule asks for."""
        self.count += 1
        setup = one.setup
        need = trial_requests(setup.problem.slo, setup.problem.workload.mean_output_tokens, rate_per_s)
        need = max(need, ceil(LEAST_SPAN_S * rate_per_s))
        if whole:
            return self._kept(one, rate_per_s, need, sustained)
        need = min(need, MOST)
        first = max(FIRST, need // 5)
        return self._kept(one, rate_per_s, first, attained) and self._kept(one, rate_per_s, need, sustained)

    def _kept(self, one: Contender, rate_per_s: float, count: int, judge: Callable[[Columns, Slo], float]) -> bool:
        setup, slo = one.setup, one.setup.problem.slo
        problem = replace(setup.problem, workload=replace(setup.problem.workload, rate_per_s=rate_per_s))
        source = TraceSource(self._drawn(setup, rate_per_s, count))
        self.requests += count
        columns = simulate(problem, setup.system, source, plan=one.plan, predictor=setup.predictor).columns
        return judge(columns, slo) >= slo.attainment

    def _drawn(self, setup: Setup, rate_per_s: float, count: int) -> list[Request]:
        key = setup.system.name, rate_per_s, count
        if key not in self._streams:
            spec = setup.scenario.workload.model_copy(update={"rate": rate_per_s})
            stream = RequestStream(
                spec, seed=setup.scenario.seed, max_model_len=setup.requests.max_model_len, at_least=count
            )
            found = list(islice(stream, count))
            if not found:
                raise ConfigError("workload: it has no requests; widen start_s and end_s, or name another trace")
            self._streams = {key: found} if len(self._streams) > 1 else {**self._streams, key: found}
        return self._streams[key]


@dataclass(slots=True)
class Race:
    """The best so far, who has been tried, and all who entered. ``most_*``, ``until_s``: then it ends."""

    trials: Trials
    most_trials: int
    most_requests: float = inf
    until_s: float = inf
    progress: Callable[[int, float], None] = lambda step, best: None
    best: Contender | None = None
    tried: dict[object, Contender] = field(default_factory=dict)
    entered: dict[object, Contender] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        spent = self.trials.count >= self.most_trials or self.trials.requests >= self.most_requests
        return spent or self.late

    @property
    def late(self) -> bool:
        """The time asked for is up."""
        return time.perf_counter() >= self.until_s

    @property
    def rate_per_s(self) -> float:
        return 0.0 if self.best is None else self.best.goodput_per_s or 0.0

    def enter(self, contenders: Iterable[Contender], *, first: int = 10**9) -> bool:
        """The likeliest first, at most so many; whether the best has changed."""
        before = self.best
        in_order = sorted(contenders, key=lambda one: -one.likely_per_s)
        for one in in_order:
            self.entered.setdefault(one.key, one)
        for one in in_order:
            if self.over or first <= 0:
                break
            if one.key in self.tried or one.most_per_s * MARGIN < self.rate_per_s * GAIN:
                continue
            first -= 1
            self.note(self._measured(one))
            self.progress(self.trials.count, self.rate_per_s)
        return self.best is not before

    def confirm(self) -> None:
        """The best's rate by whole trials, where those of the race were cut short."""
        while self.best is not None and not self.trials.passed(self.best, self.rate_per_s, whole=True):
            self.best = replace(self.best, goodput_per_s=self.rate_per_s * (1 - FINE))

    def note(self, found: Contender) -> None:
        """It was tried, and is the best if its rate is the highest."""
        self.tried[found.key] = self.entered[found.key] = found
        if (found.goodput_per_s or 0.0) > self.rate_per_s:
            self.best = found

    def _measured(self, one: Contender) -> Contender:
        if self.best is None:
            return self.rated(one)
        floor = self.rate_per_s * GAIN
        if not self.trials.passed(one, floor):
            return one
        return replace(one, goodput_per_s=self._up(one, floor))

    def rated(self, one: Contender, tolerance: float = FINE) -> Contender:
        """With its own rate, whoever is best; None if it keeps the SLO at no rate."""
        low, high = 0.0, inf
        rate = one.likely_per_s
        if one.key in self.tried and self.best is not None:  # it lost
            high = self.rate_per_s * GAIN
            rate = min(rate, 0.94 * high)
        for _ in range(HALVINGS):
            if self.trials.passed(one, rate):
                low = rate
                break
            high, rate = rate, rate * 0.75
        if not low:
            return replace(one, goodput_per_s=None)
        return replace(
            one,
            goodput_per_s=self._up(one, low, tolerance) if high == inf else self._between(one, low, high, tolerance),
        )

    def _up(self, one: Contender, good: float, tolerance: float = FINE) -> float:
        step = 0.04
        while self.trials.passed(one, good * (1 + step)):
            good, step = good * (1 + step), 2 * step
        return self._between(one, good, good * (1 + step), tolerance)

    def _between(self, one: Contender, good: float, bad: float, tolerance: float) -> float:
        while bad - good > tolerance * good:
            middle = (good + bad) / 2
            good, bad = (middle, bad) if self.trials.passed(one, middle) else (good, middle)
        return good
