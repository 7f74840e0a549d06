"""Melange (arXiv 2404.14527): the cheapest mix of GPU types, and a load balancer that draws by what each serves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import numpy as np

from sim.batchers import TokenBudget
from sim.goodput import bisected_rate, bracketing
from sim.planners.melange import INPUT_EDGES, OUTPUT_EDGES, Bucket, ClosedForm, Melange, Profile, Profiler, edge
from sim.policy import Problem, RequestView, System, View, Workload
from sim.predictors import TrueLength
from sim.record import Result
from sim.reschedulers import RestorePlan
from sim.routers import LeastRequests
from sim.transfers import Whole
from sim.types import ConfigError, Plan, Reject, Replica, Request, Route

Simulate = Callable[..., Result]
"""``sim.simulate``: given as an argument, since no policy knows the engine."""
TOLERANCE = 0.03
MOST_OVER_CLOSED_FORM = 1.25
"""Where a search for a simulated rate ends: beyond it only queues grow, which short runs do not show."""
SPANS = 16.0
"""Ours: requests of a run arrive for so many times as long as one may take; the later half of them is judged."""


class ByThroughput:
    """Draws a replica with a chance as large as the rate at which it serves requests of that size (section 5.5).

    The size is the prompt's and the mean answer so far to prompts of its bucket; before the first answer the mean of
    the planner's sample. A request that lost its replica comes again with what it had emitted, which had been counted
    as an answer and is taken back. Where no replica serves the bucket within the SLO, all that are up count alike.
    """

    def __init__(self, profile: Profiler = ClosedForm) -> None:
        self._profile = profile
        self._answers: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # of an input edge: tokens, requests
        self._expected: dict[int, int] = {}
        self._plan: Plan | None = None
        self._profiles: dict[str, Profile] = {}
        self._rates: dict[tuple[str, Bucket], float] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        if view.plan is not self._plan:
            self._look(view)
        if request.emitted_tokens:
            self._count(request, -1)
        bucket = self.expected(request, view.problem.workload)
        rates = np.array([self.rate(replica.name, bucket) for replica in view.replicas])
        total = rates.sum()
        shares = rates / total if total > 0 else None
        chosen = view.replicas[int(view.rng.choice(len(rates), p=shares))]
        return Route(chosen.leg, chosen.leg)

    def finished(self, request: RequestView) -> None:
        if request.emitted_tokens:
            self._count(request, 1)

    def expected(self, request: RequestView, workload: Workload) -> Bucket:
        """Its bucket, if its answer is as long as the others' in the mean."""
        size = edge(request.input_tokens, INPUT_EDGES)
        tokens, requests = self._answers[size]
        if not requests:
            if size not in self._expected:
                self._expected[size] = _mean_answer(size, workload)
            return Bucket(size, self._expected[size])
        return Bucket(size, edge(-(-tokens // requests), OUTPUT_EDGES))

    def rate(self, name: str, bucket: Bucket) -> float:
        """Requests/s of a bucket that a replica of the plan serves alone."""
        if (name, bucket) not in self._rates:
            self._rates[name, bucket] = self._profiles[name](bucket)
        return self._rates[name, bucket]

    def _count(self, request: RequestView, sign: int) -> None:
        size = edge(request.input_tokens, INPUT_EDGES)
        tokens, requests = self._answers[size]
        self._answers[size] = (tokens + sign * request.emitted_tokens, requests + sign)

    def _look(self, view: View) -> None:
        self._plan, self._rates = view.plan, {}
        kinds: dict[tuple[str, int], Profile] = {}
        for replica in view.plan.replicas:
            kind = (view.problem.cluster.gpu(replica.gpus[0]).name, len(replica.gpus))
            if kind not in kinds:
                kinds[kind] = self._profile(view.problem, replica)
            self._profiles[replica.name] = kinds[kind]


def _mean_answer(size: int, workload: Workload) -> int:
    """Edge of the sample's mean answer to prompts of a bucket, or to all if it has none there."""
    answers = [answer for prompt, answer in workload.lengths if edge(prompt, INPUT_EDGES) == size]
    mean = sum(answers) / len(answers) if answers else workload.mean_output_tokens
    return edge(max(1, int(np.ceil(mean))), OUTPUT_EDGES)


# ---------------------------------------------------------------- rates by simulation


@dataclass(frozen=True, slots=True)
class _Listed:
    """A source that replays a list."""

    requests: Sequence[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return self.requests if finished is None else ()


class Simulated:
    """Rates by bisection on simulated Poisson arrivals of one size on one replica, as the paper profiles GPUs.

    To 3 %, ``requests`` a trial or more (``SPANS``). What was found is kept while only the workload differs.
    """

    def __init__(self, simulate: Simulate, requests: int = 500) -> None:
        self._simulate = simulate
        self._requests = requests
        self._about: tuple[object, ...] = ()
        self._found: dict[tuple[str, int, Bucket], float] = {}

    def __call__(self, problem: Problem, replica: Replica) -> Profile:
        if problem.slo.tpot_s is None:
            raise ConfigError("system.profile is simulated, which wants a bound on the time per token; set slo.tpot_s")
        about = (problem.cluster, problem.model, problem.cost, problem.slo, problem.limits, problem.seed)
        if about != self._about:
            self._about, self._found = about, {}
        known, first = self._found, ClosedForm(problem, replica)
        kind = (problem.cluster.gpu(replica.gpus[0]).name, len(replica.gpus))

        def profile(bucket: Bucket) -> float:
            if (*kind, bucket) not in known:
                guess = first(bucket)
                known[*kind, bucket] = self._rate(problem, replica, bucket, guess) if guess else 0.0
            return known[*kind, bucket]

        return profile

    def _rate(self, problem: Problem, replica: Replica, bucket: Bucket, guess: float) -> float:
        """0 if even a few requests, one after the other, take too long."""
        search = bracketing(guess, MOST_OVER_CLOSED_FORM * guess, TOLERANCE)
        return bisected_rate(lambda rate: self._serves(problem, replica, bucket, rate), search)

    def _serves(self, problem: Problem, replica: Replica, bucket: Bucket, rate_per_s: float) -> bool:
        """Whether all complete, the later half with a mean time per token within the SLO."""
        assert problem.slo.tpot_s is not None
        count = max(self._requests, ceil(SPANS * problem.slo.tpot_s * bucket.output_tokens * rate_per_s))
        gaps_s = np.random.default_rng(problem.seed).exponential(1, count)
        requests = [
            Request(id=number, arrival_s=time_s, input_tokens=bucket[0], output_tokens=bucket[1])
            for number, time_s in enumerate((np.cumsum(gaps_s) / rate_per_s).tolist())
        ]
        longest = max(sum(bucket), problem.model.max_position_embeddings or 0)
        where = replace(problem, model=replace(problem.model, max_position_embeddings=longest))
        system = _system(Melange(), LeastRequests).with_limits(problem.limits)
        columns = self._simulate(
            where, system, _Listed(requests), plan=Plan(replicas=(replica,)), predictor=TrueLength()
        ).columns
        late = columns["arrival_s"] >= np.median(columns["arrival_s"])
        done = bool((columns["outcome"] == "completed").all())
        return done and float((columns["e2e_s"] / columns["output_tokens"])[late].mean()) <= problem.slo.tpot_s


# ---------------------------------------------------------------- the system


def melange(
    slices: int = 8,
    overprovision: float = 0.0,
    tp: int | None = None,
    spot: bool = False,
    profile: Literal["closed-form", "simulated"] = "closed-form",
    simulate: Simulate | None = None,
) -> System:
    """Melange: the cheapest mix of the cluster's GPU types by an ILP; replicas drawn by what they serve of a size.

    Mean latency over output tokens is kept within slo.tpot_s. Each bucket of sizes is cut in ``slices``;
    ``overprovision`` is a share on top of the rate. A replica is a GPU, or as many as hold the model (``tp``), and
    batches as vLLM V1. ``profile``: a replica's rates by the latency model or simulated (minutes). ``spot``: prices.
    """
    if slices < 1:
        raise ConfigError(f"system.slices is {slices}; it must be a whole number >= 1")
    if not 0 <= overprovision < float("inf"):
        raise ConfigError(f"system.overprovision is {overprovision}; it must be a number >= 0")
    if tp is not None and tp < 1:
        raise ConfigError(f"system.tp is {tp}; it must be a whole number >= 1")
    if profile not in ("closed-form", "simulated"):
        raise ConfigError(f"system.profile is {profile!r}; melange has closed-form, simulated")
    profiler: Profiler = ClosedForm
    if profile == "simulated":
        if simulate is None:
            raise ConfigError("system.profile: simulated rates want simulate=sim.simulate; or take closed-form")
        profiler = Simulated(simulate)
    planner = Melange(slices=slices, overprovision=overprovision, tp=tp, spot=spot, profile=profiler)
    return _system(planner, lambda: ByThroughput(profiler))


def _system(planner: Melange, router: Callable[[], ByThroughput | LeastRequests]) -> System:
    return System(
        name="melange",
        mirrors="Melange (arXiv 2404.14527), with the scheduler of vLLM V1",
        planner=planner,
        router=router,
        batcher=lambda role: TokenBudget(),
        transfer=Whole,
        rescheduler=RestorePlan,
    )
