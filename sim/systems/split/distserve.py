"""DistServe (OSDI 2024; arXiv 2401.09670v3): prefill and decode instances placed by simulated goodput, KV pulled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sim.batchers import Disaggregated, MixedPrompts, PrefillFirst
from sim.cluster import Cluster
from sim.cost import StageCost, StepCost
from sim.goodput import CRITERIA, Criterion, attained
from sim.memory import kv_blocks
from sim.metrics import Columns
from sim.model import ModelSpec
from sim.planners.distserve import Affinity, BestColocated, Count, DistServe, Search, Unit, paired_plan
from sim.planners.pools import Colocated, Pool, Split
from sim.policy import Batcher, Limits, Planner, Problem, ReplicaView, RequestView, System, View, Workload
from sim.record import Result
from sim.reschedulers import RestorePlan, described, shifted
from sim.routers import LeastRequests
from sim.systems.layout import PoolOption
from sim.transfers import Whole
from sim.types import Change, ConfigError, Line, Plan, Reject, Request, Role, Route, Signal, Slo, Stage, Work

Simulate = Callable[..., Result]
"""``sim.simulate``: given as an argument, since no policy knows the engine."""
LIMITS = Limits(max_num_seqs=1024, max_num_batched_tokens=8192, gpu_memory_utilization=0.95)
"""Of the released scripts. Their limit of 65,536 tokens a decode step, one each, never binds below 1,024 requests."""
WINDOW_S = 300.0
TICK_S = 60.0
FEWEST_REQUESTS = 100
"""Ours, as the paper gives no rule: over which time and from how many requests a shift is seen."""
SPANS = 3.0
"""Ours: the released search has 300 requests a trial whatever the rate, which large instances take in as one burst."""


class ShortestQueue:
    """The controller, section 4.3: the prefill instance with the shortest queue; when the prompt is done, the least
    loaded decode instance.

    Load is requests assigned. Where the plan names pairs, the two come from one pair.
    """

    def __init__(self) -> None:
        self._assigned: dict[str, int] = defaultdict(int)
        self._prefill: dict[int, str] = {}
        self._place: dict[int, str] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        able = [prefill for prefill in view.with_role("prefill", "mixed") if self._partners(prefill.name, view)]
        if not able:
            return Reject("no prefill instance with a decode instance to send to is up")
        prefill = min(able, key=lambda replica: replica.num_prefilling)
        self._prefill[request.id] = prefill.name
        return Route(prefill.leg, None)

    def dispatch(self, request: RequestView, view: View) -> tuple[str, ...] | float | Reject:
        partners = self._partners(self._prefill[request.id], view)
        if not partners:
            return Reject("no decode instance to send to is up")
        decode = min(partners, key=lambda replica: self._assigned[replica.name])
        self._assigned[decode.name] += 1
        self._place[request.id] = decode.name
        return decode.leg

    def finished(self, request: RequestView) -> None:
        self._prefill.pop(request.id, None)
        place = self._place.pop(request.id, None)
        if place is not None:
            self._assigned[place] -= 1

    def _partners(self, prefill: str, view: View) -> list[ReplicaView]:
        pairs = view.plan.shares
        return [one for one in view.with_role("decode", "mixed") if not pairs or (prefill, one.name) in pairs]


class ReplanOnShift:
    """Section 4.3: when rate or mean lengths have moved by a fifth, place anew; otherwise ``RestorePlan``.

    What is compared is the workload that the plan was made for. Instances that change drain and load their weights.
    """

    def __init__(
        self,
        planner: Planner,
        interval_s: float = TICK_S,
        window_s: float = WINDOW_S,
        fewest_requests: int = FEWEST_REQUESTS,
    ) -> None:
        self.interval_s: float | None = interval_s
        self.window_s = window_s
        self.fewest_requests = fewest_requests
        self.planner = planner
        self._planned_for: Workload | None = None
        self._restore = RestorePlan()

    def react(self, signal: Signal, view: View) -> Change | None:
        if signal.kind != "tick":
            return self._restore.react(signal, view)
        seen = view.observed(self.window_s)
        planned_for = self._planned_for or view.problem.workload
        if seen is None or len(seen.lengths) < self.fewest_requests or not shifted(planned_for, seen):
            return None
        self._planned_for = seen
        plan = self.planner.plan(replace(view.problem, workload=seen))
        if plan == view.plan:
            return None
        self._restore = RestorePlan(plan)
        return Change(plan=plan, reason=f"the workload shifted: {described(planned_for)} became {described(seen)}")


# ---------------------------------------------------------------- judging a unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Judges a unit by a simulated run (section 4.1): lengths drawn from the workload, Poisson arrivals.

    A prefill instance by TTFT alone, a decode instance by TPOT alone, with prompts that cost nothing; waiting for room
    counts there. A pair, and a colocated instance (vLLM's), by the SLO's criterion. KV moves only in pairs.
    A run has ``requests``, or as many as ``enough`` says, if that is more.
    """

    simulate: Simulate
    requests: int = 300
    spans: float = SPANS
    criterion: Criterion = "joint"
    max_prompts: int = 128
    prompt_tokens: int | None = None

    def __call__(self, problem: Problem, unit: Unit, rate_per_s: float) -> bool:
        count = enough(problem, rate_per_s, self.requests, self.spans)
        requests = poisson(problem.workload.lengths, rate_per_s, count, problem.seed)
        if unit.prefill is not None and unit.decode is not None:
            share = attained(self._pair(problem, unit, requests), problem.slo, self.criterion)
        elif unit.decode is not None:
            share = self._decode_share(problem, unit, requests)
        elif unit.prefill is not None:
            prompts = [replace(request, output_tokens=1) for request in requests]
            pool = Pool(replicas=1, tp=unit.prefill.tp, pp=unit.prefill.pp)
            columns = self._run(problem, _colocated("prefill", pool, self._batcher), prompts)
            share = attained(columns, Slo(ttft_s=problem.slo.ttft_s))
        else:
            assert unit.mixed is not None
            pool = Pool(replicas=1, tp=unit.mixed.tp, pp=unit.mixed.pp)
            columns = self._run(problem, _colocated("vllm", pool, lambda: PrefillFirst("recompute")), requests)
            share = attained(columns, problem.slo, self.criterion)
        return share >= problem.slo.attainment

    def _pair(self, problem: Problem, unit: Unit, requests: Sequence[Request]) -> Columns:
        system = _runtime(_Given(paired_plan(problem, unit, 1)), self._batcher)
        return self._run(problem, system, requests)

    def _batcher(self) -> Batcher:
        return Disaggregated(self.max_prompts, self.prompt_tokens)

    def _decode_share(self, problem: Problem, unit: Unit, requests: Sequence[Request]) -> float:
        """From arrival to the end over all tokens but the first: the prompt's own time is none."""
        assert unit.decode is not None
        pool = Pool(replicas=1, tp=unit.decode.tp, pp=unit.decode.pp)
        system = _colocated("decode", pool, lambda: MixedPrompts("swap", watermark=0.0))
        blocks = kv_blocks(problem, Colocated(pool=pool).plan(problem).replicas[0].stages, problem.limits)
        limits = replace(
            problem.limits, num_kv_blocks=blocks, max_num_batched_tokens=blocks * problem.limits.block_size
        )
        eased = replace(problem, cost=FreePrompts(inner=problem.cost), limits=limits)
        columns = dict(self._run(eased, system, requests))
        later: NDArray[np.float64] = columns["output_tokens"] - 1.0
        columns["tpot_s"] = np.divide(columns["e2e_s"], later, out=np.full(later.shape, np.nan), where=later > 0)
        return attained(columns, Slo(tpot_s=problem.slo.tpot_s))

    def _run(self, problem: Problem, system: System, requests: Sequence[Request]) -> Columns:
        return self.simulate(problem, system.with_limits(problem.limits), _Listed(requests)).columns


def enough(problem: Problem, rate_per_s: float, least: int, spans: float) -> int:
    """Requests that arrive for ``spans`` times as long as one may take: fewer would only fill an empty instance."""
    slo = problem.slo
    allowed_s = (slo.ttft_s or 0.0) + (slo.tpot_s or 0.0) * problem.workload.mean_output_tokens
    return max(least, ceil(spans * allowed_s * rate_per_s))


def poisson(lengths: Sequence[tuple[int, int]], rate_per_s: float, count: int, seed: int) -> list[Request]:
    """Requests with lengths drawn from a sample; the same ones, closer together, at a higher rate."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(lengths), count).tolist()
    arrivals = (np.cumsum(rng.exponential(1.0, count)) / rate_per_s).tolist()
    return [
        Request(id=number, arrival_s=arrival, input_tokens=lengths[place][0], output_tokens=lengths[place][1])
        for number, (place, arrival) in enumerate(zip(drawn, arrivals, strict=True))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class FreePrompts:
    """Another cost in which prompts take no time: a step of prompts alone lasts one picosecond."""

    inner: StepCost

    @property
    def name(self) -> str:
        return f"{self.inner.name}, prompts free"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        return _FreePromptsOnStage(self.inner.bind(model, stage, cluster, slow))


@dataclass(frozen=True, slots=True)
class _FreePromptsOnStage:
    inner: StageCost

    @property
    def measured(self) -> bool:
        return self.inner.measured

    def line(self, work: Work) -> Line:
        if not work.decode_seqs:
            return Line(1, 0, 1)
        return self.inner.line(work._replace(chunks=()))


@dataclass(frozen=True, slots=True)
class _Listed:
    requests: Sequence[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return self.requests if finished is None else ()


@dataclass(frozen=True, slots=True)
class _Given:
    """A planner whose plan is made already."""

    known: Plan

    def plan(self, problem: Problem) -> Plan:
        return self.known


# ---------------------------------------------------------------- the systems


def _runtime(planner: Planner, batcher: Callable[[], Batcher]) -> System:
    def make(role: Role) -> Batcher:
        return batcher()

    return System(
        name="distserve",
        mirrors="DistServe (OSDI 2024), LLMServe/DistServe's schedulers",
        planner=planner,
        router=ShortestQueue,
        batcher=make,
        transfer=lambda: Whole(pull=True),
        rescheduler=RestorePlan,
        limits=LIMITS,
    )


def _colocated(name: str, pool: Pool, batcher: Callable[[], Batcher]) -> System:
    return replace(_runtime(Colocated(pool=pool), batcher), name=name, router=LeastRequests)


def distserve(
    placement: Literal["high", "low", "vllm++"] | None = None,
    count: Count = "fill",
    criterion: Criterion = "joint",
    search_requests: int = 300,
    max_prompts: int = 128,
    prompt_tokens: int | None = None,
    replan: bool = False,
    prefill: PoolOption = None,
    decode: PoolOption = None,
    simulate: Simulate | None = None,
) -> System:
    """DistServe: prefill and decode instances of their own shapes, batches of one phase, KV pulled when there is room.

    ``placement`` searches TP and PP by simulated goodput: high (each phase anywhere) or low (pairs inside machines);
    vllm++ does so for colocated vLLM. ``count``: fill the cluster, or as many as the workload's rate needs.
    ``criterion`` joint or separate, as in 'phasewise goodput'; ``search_requests`` are simulated per trial. Without
    ``placement`` the pools are as stated. ``replan`` searches again when rate or mean lengths move by 20 %.
    ``prompt_tokens`` of a prefill batch: None for the fewest that saturate the GPUs; 8192 in the released scripts.
    """
    if placement is None:
        if replan:
            raise ConfigError("system.replan: it repeats the search; set placement to high or low")
        pools = Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode"))
        return _runtime(pools, lambda: Disaggregated(max_prompts, prompt_tokens))
    if prefill is not None or decode is not None:
        raise ConfigError("system: placement searches what prefill and decode state; drop one of the two")
    if criterion not in CRITERIA or count not in ("fill", "rate") or placement not in ("high", "low", "vllm++"):
        raise ConfigError(
            f"system: placement {placement!r}, count {count!r}, criterion {criterion!r}; they are one of high, low and "
            "vllm++, one of fill and rate, one of joint and separate"
        )
    if simulate is None:
        raise ConfigError(
            "system.placement: the search simulates; pass simulate=sim.simulate, or state prefill and decode"
        )
    rehearsal = Rehearsal(
        simulate=simulate, requests=search_requests, criterion=criterion, max_prompts=max_prompts,
        prompt_tokens=prompt_tokens,
    )  # fmt: skip
    return placed(
        Search(judge=rehearsal), placement, count, replan=replan, max_prompts=max_prompts, prompt_tokens=prompt_tokens
    )


def placed(
    search: Search, placement: Affinity | Literal["vllm++"], count: Count = "fill", *,
    replan: bool = False, max_prompts: int = 128, prompt_tokens: int | None = None,
) -> System:  # fmt: skip
    """The same with a search of one's own: on an executor, or one that several systems share."""
    if placement == "vllm++":
        system = _runtime(BestColocated(search=search), lambda: PrefillFirst("recompute"))
        return replace(
            system, name="vllm++", router=LeastRequests,
            mirrors="vLLM 0.2 with DistServe's search of TP and PP",
        )  # fmt: skip
    planner = DistServe(search=search, affinity=placement, count=count)
    system = _runtime(planner, lambda: Disaggregated(max_prompts, prompt_tokens))
    return replace(system, rescheduler=lambda: ReplanOnShift(planner)) if replan else system
