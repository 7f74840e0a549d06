"""ThunderServe (MLSys 2025; arXiv 2502.09334): groups and phases by tabu search, requests routed by an LP."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sim.batchers import Saturating, TokenBudget
from sim.planners.pools import Pool, Split
from sim.planners.thunderserve import Candidate, TabuSearch
from sim.policy import Planner, Problem, Rescheduler, System, View, Workload
from sim.reschedulers import RestorePlan, described, shifted
from sim.routers import ByAttainment, ByShare, Gauge
from sim.systems.layout import PoolOption
from sim.transfers import Quantized
from sim.types import Change, ConfigError, InfeasibleError, Plan, Replica, Signal

Routing = Literal["attainment", "round-robin", "random"]
TICK_S = 5.0
WINDOW_S = 60.0
FEWEST_REQUESTS = 50
"""Ours: how often, over which time and from how many requests a shift is seen."""
HORIZON_S = 300.0
LEAST_GAIN = 0.02
"""Ours: over which time a change must pay, and how much (a prediction is no surer)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orchestrated:
    """A stated layout, with the shares that the planner's LP gives it."""

    layout: Planner
    search: TabuSearch

    def plan(self, problem: Problem) -> Plan:
        return self.search.routed(problem, self.layout.plan(problem)).plan


class Reschedule:
    """Plans anew when GPUs are lost or return, and when rate or mean lengths of a window have shifted.

    ``lightweight``: the groups that still have all their GPUs keep stages and layers; phases and shares are planned
    anew, so nothing is loaded (what returns loads its own weights). Otherwise a full search on the GPUs there are. What
    a flipped group runs, it finishes. The new plan stands ``planning_s`` after its cause, at the next tick; a cause in
    the meantime starts the planning again. Traffic is looked at from the second window on, and plans are for the rate
    that is seen. What is left of the present plan stays unless another is predicted to keep ``LEAST_GAIN`` more of the
    requests within the SLO over the next ``horizon_s``, in which what it changes first drains and loads.
    """

    def __init__(
        self,
        search: TabuSearch,
        *,
        lightweight: bool = True,
        planning_s: float = 0.0,
        interval_s: float = TICK_S,
        window_s: float = WINDOW_S,
        fewest_requests: int = FEWEST_REQUESTS,
        horizon_s: float = HORIZON_S,
    ) -> None:
        self.interval_s: float | None = interval_s
        self.search = search
        self.lightweight = lightweight
        self.planning_s = planning_s
        self.window_s = window_s
        self.fewest_requests = fewest_requests
        self.horizon_s = horizon_s
        self._groups: Plan | None = None  # with those that are lost for now
        self._lost: set[str] = set()
        self._planned_for: Workload | None = None
        self._cause: tuple[float, str] | None = None  # when the new plan is due, and why

    def react(self, signal: Signal, view: View) -> Change | None:
        self._groups = self._groups or view.plan
        self._planned_for = self._planned_for or view.problem.workload
        if signal.kind == "tick":
            self._look_at_traffic(view)
        else:
            change = self._lost.difference_update if signal.kind == "joined" else self._lost.update
            change(signal.gpus)
            happened = {"joined": "joined", "lost": "lost", "notice": "about to be lost"}[signal.kind]
            self._cause = (signal.at_s + self.planning_s, f"{', '.join(signal.gpus)} {happened}")
        if self._cause is None or self._cause[0] > signal.at_s:
            return None
        reason, self._cause = self._cause[1], None
        return self._change(view, self._groups, self._planned_for, reason)

    def _look_at_traffic(self, view: View) -> None:
        if view.now_s < 2 * self.window_s:  # what completes first was short
            return
        seen = view.observed(self.window_s)
        if seen is None or len(seen.lengths) < self.fewest_requests:
            return
        assert self._planned_for is not None
        if shifted(self._planned_for, seen):
            reason = f"the workload shifted: {described(self._planned_for)} became {described(seen)}"
            self._planned_for = seen
            self._cause = (view.now_s + self.planning_s, reason)

    def _change(self, view: View, groups: Plan, workload: Workload, reason: str) -> Change | None:
        problem = replace(view.problem, workload=self._at_the_rate_seen(view, workload))
        roles = {one.name: one.role for one in view.plan.replicas}
        left = tuple(
            replace(one, role=roles.get(one.name, one.role))
            for one in groups.replicas
            if not self._lost & set(one.gpus)
        )
        kept = _reached(replace(view.plan, replicas=left))
        try:
            found = self.search.replan(problem, groups, lost=self._lost, flips_only=self.lightweight).candidates
        except InfeasibleError as error:
            return Change(plan=kept, reason=f"{reason}; no better plan: {error}")
        worth = [self._worth(problem, one, view) for one in found]
        best = worth.index(max(worth))
        plan = found[best].plan if worth[best] > self._as_it_is(problem, kept) + LEAST_GAIN else kept
        if plan == view.plan or (plan is kept and _is_up(plan, view)):
            return None
        roles = {one.name: one.role for one in plan.replicas}
        whole = tuple(replace(one, role=roles.get(one.name, one.role)) for one in groups.replicas)
        self._groups = Plan(replicas=whole) if self.lightweight or plan is kept else plan
        return Change(plan=plan, reason=reason)

    def _as_it_is(self, problem: Problem, plan: Plan) -> float:
        """By its own shares or by the LP's, whichever is better: routers depart from shares where queues tell them."""
        found = self.search.predicted(problem, plan)
        try:
            routed = self.search.routed(problem, plan).attainment
        except InfeasibleError:
            routed = 0.0
        return routed if found is None else max(found.attainment, routed)

    def _at_the_rate_seen(self, view: View, workload: Workload) -> Workload:
        """Lengths as planned for: what completes first is short. Arrivals are seen at once."""
        seen = view.observed(self.window_s)
        if seen is None or len(seen.lengths) < self.fewest_requests:
            return workload
        return replace(workload, rate_per_s=seen.rate_per_s)

    def _worth(self, problem: Problem, candidate: Candidate, view: View) -> float:
        """Share within the SLO over the next ``horizon_s``, with what is to drain or load out of service until then."""
        up = {one.name: one for one in view.plan.replicas}
        same = [one for one in candidate.plan.replicas if up.get(one.name) == one]
        if len(same) == len(candidate.plan.replicas):
            return candidate.attainment
        changed = [one for one in candidate.plan.replicas if one not in same]
        wait_s = max(_change_s(problem, one, view) for one in changed)
        part = min(1.0, wait_s / self.horizon_s)
        meanwhile = self._as_it_is(problem, _reached(replace(candidate.plan, replicas=tuple(same)))) if same else 0.0
        return (1 - part) * candidate.attainment + part * meanwhile


def _is_up(plan: Plan, view: View) -> bool:
    """Nobody has to come up, and whoever is up has a share: routers make do."""
    names = {one.name for one in plan.replicas}
    with_shares = {name for pair in _left(view.plan.shares, names) for name in pair}
    return names == {one.name for one in view.replicas} and (not view.plan.shares or with_shares == names)


def _left(shares: Mapping[tuple[str, str], float], names: Set[str]) -> dict[tuple[str, str], float]:
    return {pair: share for pair, share in shares.items() if share > 0 and names >= set(pair)}


def _reached(plan: Plan) -> Plan:
    """Shares of the pairs that are left; if a replica has none of them, every pair counts alike."""
    names = {one.name for one in plan.replicas}
    shares = _left(plan.shares, names)
    if {name for pair in shares for name in pair} != names:
        by_role = {role: [one.name for one in plan.replicas if one.role == role] for role in ("prefill", "decode")}
        pairs = [(a, b) for a in by_role["prefill"] for b in by_role["decode"]]
        shares = dict.fromkeys(pairs, 1 / len(pairs)) if pairs else {}
    total = sum(shares.values())
    return replace(plan, shares={pair: share / total for pair, share in shares.items()})


def _change_s(problem: Problem, replica: Replica, view: View) -> float:
    """Until a replica serves in its new role: who is on its GPUs finishes what it runs, and missing weights load."""
    drain_s = max(
        (_drain_s(problem, spec, view) for spec in view.plan.replicas if set(spec.gpus) & set(replica.gpus)),
        default=0.0,
    )
    held = {stage for spec in view.plan.replicas for stage in spec.stages}
    missing = [stage for stage in replica.stages if stage not in held]
    capacity = problem.cluster.capacity_bytes_per_s
    load_s = [
        problem.model.weight_bytes(stage.first_layer, stage.end_layer)
        / problem.cluster.load_path(stage.gpus).bytes_per_s(capacity)
        for stage in missing
    ]
    return drain_s + max(load_s, default=0.0)


def _drain_s(problem: Problem, spec: Replica, view: View) -> float:
    """The prompts that are queued, and the answers that are long (nine tenths are no longer), at its own step times."""
    state = next((one for one in view.replicas if one.name == spec.name), None)
    if state is None:
        return 0.0
    gauge, count = Gauge(spec, problem), state.num_prefilling
    prompts_s = count * gauge.prompt_s(state.pending_prefill_tokens // count)[1] if count else 0.0
    if not state.num_decoding:
        return prompts_s
    together = max(1, min(state.num_decoding, state.num_running or state.max_num_seqs))
    outputs = sorted(pair[1] for pair in problem.workload.lengths)
    context = problem.workload.mean_input_tokens + problem.workload.mean_output_tokens / 2
    answers_s = outputs[len(outputs) * 9 // 10] * gauge.step_s(together, context)
    return prompts_s + answers_s * state.num_decoding / together


def thunderserve(
    bits: int = 4,
    codec_bytes_per_s: float = 4e11,
    routing: Routing = "attainment",
    n_steps: int = 100,
    n_neighbors: int = 10,
    n_memory: int = 5,
    patience: int = 100,
    seconds: float | None = None,
    reschedule: Literal["lightweight", "full"] | None = None,
    planning_s: float = 0.0,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """ThunderServe: GPU groups and their phases by tabu search, pairs by an LP and their state, KV sent in 4 bits.

    ``bits`` a value of KV on the way (16: as it is), the codec at ``codec_bytes_per_s`` (ours). ``routing``: to the
    pair that is best within the SLO by queue, batch, KV room and link, the LP's shares as weights; or the shares alone,
    kept by a weighted round robin or drawn. The search makes ``n_steps`` of the best of ``n_neighbors``, keeps
    ``n_memory`` tabu, and ends after ``patience`` steps without gain or after ``seconds``; its seed is the scenario's.
    With ``prefill`` and ``decode`` pools that layout is taken, and only the shares are planned. ``reschedule``, when
    GPUs are lost or return or the workload shifts: lightweight (phases and shares only, nothing is loaded) or full; the
    new plan stands ``planning_s`` later.
    """
    for name, value, least in (
        ("n_steps", n_steps, 0),
        ("n_neighbors", n_neighbors, 1),
        ("n_memory", n_memory, 0),
        ("patience", patience, 1),
    ):
        if value < least:
            raise ConfigError(f"system.{name} is {value}; it must be a whole number >= {least}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"system.seconds is {seconds}; it must be > 0, or left out for no limit")
    if routing not in get_args(Routing):
        raise ConfigError(f"system.routing is {routing!r}; thunderserve has {', '.join(get_args(Routing))}")
    if reschedule not in (None, "lightweight", "full"):
        raise ConfigError(f"system.reschedule is {reschedule!r}; it must be lightweight or full, or left out")
    if not 0 <= planning_s < float("inf"):
        raise ConfigError(f"system.planning_s is {planning_s}; it must be a number >= 0")
    transfer = Quantized(bits, codec_bytes_per_s=codec_bytes_per_s)
    search = TabuSearch(
        transfer=transfer,
        n_steps=n_steps,
        n_neighbors=n_neighbors,
        n_memory=n_memory,
        patience=patience,
        seconds=seconds,
    )
    planner: Planner = search
    if prefill is not None or decode is not None:
        pools = Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode"))
        planner = Orchestrated(layout=pools, search=search)

    def rescheduler() -> Rescheduler:
        if reschedule is None:
            return RestorePlan()
        return Reschedule(search, lightweight=reschedule == "lightweight", planning_s=planning_s)

    return System(
        name="thunderserve",
        mirrors="ThunderServe (MLSys 2025), by its abstract and public summaries; no code is public",
        planner=planner,
        router=lambda: ByAttainment(transfer) if routing == "attainment" else ByShare(routing),
        batcher=lambda role: TokenBudget() if role == "mixed" else Saturating(),
        transfer=lambda: transfer,
        rescheduler=rescheduler,
    )
