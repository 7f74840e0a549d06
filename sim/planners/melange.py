"""Melange's allocation (arXiv 2404.14527): the cheapest mix of GPU types for a distribution of request sizes.

Requests are sorted into buckets by length. What one replica serves of a bucket within the SLO is ``ClosedForm``'s word,
or that of whoever is given as ``profile``. An integer program (``cheapest``) then says how many replicas of each type
to rent. Start with ``Melange``. The SLO is the paper's: the mean of a request's latency, prompt and waiting included,
over its output tokens, within ``slo.tpot_s``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, NamedTuple

import numpy as np

from sim.cost import seconds
from sim.memory import DEFAULT_BATCHED_TOKENS, kv_blocks
from sim.planners.pools import Colocated, Pool, evenly
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan, Replica, Work

INPUT_EDGES = (25, 100, 250, 500, 1000, 2000, 4000, 8000, 12000, 16000)
OUTPUT_EDGES = (25, 100, 250, 500, 1000, 2000)
"""Section 5.4.1 of the paper; beyond the last one it is doubled (ours)."""
BATCHES = tuple(sorted({round(1.06**power) for power in range(160)}))
"""Batches that are looked at beside the largest: all small ones, then steps of 6 %."""
SOLVER_S = 60.0
TIME_IS_UP, INFEASIBLE = 1, 2
"""What scipy's ``milp`` may say of its result."""
ROUNDING = 1e-6
"""Of a replica: to what the solver keeps its constraints."""


class Bucket(NamedTuple):
    """Requests up to so many tokens; they count as that long."""

    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.input_tokens}x{self.output_tokens}"


def edge(tokens: int, edges: Sequence[int]) -> int:
    """The smallest edge that is not below."""
    if tokens <= edges[-1]:
        return edges[bisect_left(edges, tokens)]
    return edges[-1] << (-(-tokens // edges[-1]) - 1).bit_length()


def bucket_of(input_tokens: int, output_tokens: int) -> Bucket:
    return Bucket(edge(input_tokens, INPUT_EDGES), edge(output_tokens, OUTPUT_EDGES))


def histogram(lengths: Iterable[tuple[int, int]]) -> dict[Bucket, float]:
    """Share of the requests in each bucket that has any, shortest first."""
    counts = Counter(bucket_of(*pair) for pair in lengths)
    return {bucket: counts[bucket] / counts.total() for bucket in sorted(counts)}


# ---------------------------------------------------------------- what a replica serves


Profile = Callable[[Bucket], float]
"""Requests/s of a bucket that one replica serves within the SLO; 0: none."""
Profiler = Callable[[Problem, Replica], Profile]


class ClosedForm:
    """By the latency model: n requests in steady state, each ``output_tokens`` iterations with the n - 1 others.

    Meanwhile n prompts are computed, beside the decodes, in chunks of what a batch has room for. By Little's law n over
    that time is the rate. KV must have room for n requests of mean length, and for a whole one. Queues that come of
    chance arrivals are not in it.
    """

    def __init__(self, problem: Problem, replica: Replica) -> None:
        limits = problem.limits
        (stage,) = replica.stages
        self._cost = problem.cost.bind(problem.model, stage, problem.cluster)
        self._tokens = kv_blocks(problem, replica.stages, limits) * limits.block_size
        self._most = limits.max_num_seqs
        self._budget = limits.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS
        self._bound_s = problem.slo.tpot_s or inf

    def __call__(self, bucket: Bucket) -> float:
        """The highest rate of all batches within the bound."""
        most = self.most(bucket)
        rates = [0.0]
        for batch in {most, *(batch for batch in BATCHES if batch < most)}:
            if batch:
                latency_s = self.latency_s(bucket, batch)
                if latency_s / bucket.output_tokens <= self._bound_s:
                    rates.append(batch / latency_s)
        return max(rates)

    def most(self, bucket: Bucket) -> int:
        """Requests that have room at once."""
        if sum(bucket) > self._tokens:
            return 0
        return min(self._most, max(1, int(self._tokens / (bucket.input_tokens + bucket.output_tokens / 2))))

    def latency_s(self, bucket: Bucket, batch: int) -> float:
        """Of each request while ``batch`` are under way all the time."""
        context = bucket.input_tokens + bucket.output_tokens / 2
        room = max(1, self._budget - batch)
        chunks = -(-bucket.input_tokens // room)
        together = max(1, min(round(batch / bucket.output_tokens), room // bucket.input_tokens))
        decodes = batch - together
        beside = (decodes, round(decodes * context))
        step_s = seconds(self._cost, Work((), *beside)) if decodes else 0.0
        if chunks == 1:
            works = [Work(((bucket.input_tokens, 0),) * together, *beside)]
        else:
            ends = [*range(room, bucket.input_tokens, room), bucket.input_tokens]
            works = [Work(((end - start, start),), *beside) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        prompt_s = sum(seconds(self._cost, work) - step_s for work in works) / together
        iterations = max(bucket.output_tokens - 1, batch * chunks / together)
        return iterations * seconds(self._cost, Work((), batch, round(batch * context))) + batch * prompt_s


# ---------------------------------------------------------------- the integer program


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Replicas of one type: rent of one, requests/s of each bucket that it serves alone (0: cannot), how many there
    are (None: any number)."""

    name: str
    usd_per_hour: float
    max_rates: Mapping[Bucket, float]
    available: int | None = None

    def replicas_for(self, rates: Mapping[Bucket, float]) -> float:
        """Replicas' worth of work, not rounded; infinite if some bucket cannot be served."""
        return sum(rate / self.max_rates[one] if self.max_rates[one] > 0 else inf for one, rate in rates.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Replicas by offer. ``loads``: replicas' worth of work; ``slices`` of each bucket by offer and bucket.

    ``gap``: share of the rent that another mix might save, where the solver's time was up; else 0.
    """

    counts: Mapping[str, int]
    usd_per_hour: float
    gap: float
    loads: Mapping[str, float]
    slices: Mapping[tuple[str, Bucket], int]


def alone(rates: Mapping[Bucket, float], offer: Offer) -> int | None:
    """Replicas that serve everything by themselves, however many there are; None if they cannot."""
    replicas = offer.replicas_for(rates)
    return None if replicas == inf else ceil(replicas - ROUNDING)


def least_usd_per_hour(rates: Mapping[Bucket, float], offers: Sequence[Offer]) -> float:
    """The relaxed program's optimum, with enough of each type: parts of replicas, each bucket where it is cheapest."""
    return sum(
        rate * min(one.usd_per_hour / one.max_rates[bucket] for one in offers if one.max_rates[bucket] > 0)
        for bucket, rate in rates.items()
    )


def cheapest(rates: Mapping[Bucket, float], offers: Sequence[Offer], slices: int = 8) -> Mix:
    """The cheapest replicas for requests/s by bucket, each bucket divided in equal slices (section 5.4.2).

    Slices of a bucket are alike, so that a whole number of them by type and bucket stands for the paper's 0 and 1 of
    every slice. Each type's work fits its replicas as a whole, which need not fit them one by one.
    ``InfeasibleError`` names the bucket that nobody serves, or says that there are too few.
    """
    rates = {bucket: rate for bucket, rate in rates.items() if rate > 0}
    for bucket in rates:
        if not any(offer.max_rates[bucket] > 0 for offer in offers):
            raise InfeasibleError(f"none of {', '.join(one.name for one in offers)} serves requests of {bucket} tokens")
    found = _solved(rates, offers, slices)
    if found is None:
        has = ", ".join(f"{'any' if one.available is None else one.available} {one.name}" for one in offers)
        raise InfeasibleError(f"{sum(rates.values()):.3g} requests/s are more than the cluster serves: {has}")
    counts, parts, gap = found
    loads = {
        offer.name: sum(
            part * rate / slices / offer.max_rates[bucket]
            for part, (bucket, rate) in zip(row, rates.items(), strict=True)
            if part
        )
        for offer, row in zip(offers, parts, strict=True)
    }
    return Mix(
        counts={offer.name: number for offer, number in zip(offers, counts, strict=True)},
        usd_per_hour=sum(offer.usd_per_hour * number for offer, number in zip(offers, counts, strict=True)),
        gap=gap,
        loads=loads,
        slices={
            (offer.name, bucket): part
            for offer, row in zip(offers, parts, strict=True)
            for part, bucket in zip(row, rates, strict=True)
            if part
        },
    )


def _solved(
    rates: Mapping[Bucket, float], offers: Sequence[Offer], slices: int
) -> tuple[list[int], list[list[int]], float] | None:
    """Replicas of each offer, its slices of each bucket, and the gap; None if there are too few replicas."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    types, buckets = len(offers), len(rates)
    load = np.zeros((types, types * buckets + types))  # work of a type's slices, less its replicas
    whole = np.zeros((buckets, types * buckets + types))  # slices of a bucket
    most = np.full(types * buckets + types, float(slices))
    for at, offer in enumerate(offers):
        for place, (bucket, rate) in enumerate(rates.items()):
            column = at * buckets + place
            whole[place, column] = 1
            if offer.max_rates[bucket] > 0:
                load[at, column] = rate / slices / offer.max_rates[bucket]
            else:
                most[column] = 0
        load[at, types * buckets + at] = -1
        most[types * buckets + at] = inf if offer.available is None else offer.available
    rent = np.concatenate([np.zeros(types * buckets), [offer.usd_per_hour for offer in offers]])
    result: Any = milp(
        rent,
        integrality=np.ones(len(rent), dtype=int),
        bounds=Bounds(0, most),
        constraints=[LinearConstraint(load, -np.inf, 0), LinearConstraint(whole, slices, slices)],
        options={"mip_rel_gap": 0.0, "time_limit": SOLVER_S},
    )
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise ConfigError(f"melange: no mix was found in {SOLVER_S:g} s; set system.slices to fewer ({result.message})")
    values = np.rint(result.x).astype(int)
    counts, parts = values[types * buckets :].tolist(), values[: types * buckets].reshape(types, buckets).tolist()
    return counts, parts, float(result.mip_gap) if result.status == TIME_IS_UP else 0.0


# ---------------------------------------------------------------- the planner


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A mix, what it was chosen from, and for which requests/s by bucket."""

    rates: Mapping[Bucket, float]
    offers: tuple[Offer, ...]
    mix: Mix
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Melange:
    """The cheapest of the cluster's GPUs that serve the workload; the others stay idle and cost nothing.

    A replica is a GPU, or so many of one machine as hold the model (``tp``: that many). ``overprovision``: share of the
    rate on top of it. ``spot``: spot prices.
    """

    slices: int = 8
    overprovision: float = 0.0
    tp: int | None = None
    spot: bool = False
    profile: Profiler = ClosedForm

    def plan(self, problem: Problem) -> Plan:
        return self.solve(problem).plan

    def solve(self, problem: Problem) -> Solution:
        """``InfeasibleError`` if a bucket cannot be served within the SLO, or not at this rate; ``ConfigError`` for a
        GPU without a price."""
        shares = histogram(problem.workload.lengths)
        rate_per_s = problem.workload.rate_per_s * (1 + self.overprovision)
        rates = {bucket: rate_per_s * share for bucket, share in shares.items()}
        groups = self._replicas(problem)
        offers = tuple(self._offer(problem, name, group, rates) for name, group in groups.items())
        try:
            mix = cheapest(rates, offers, self.slices)
        except InfeasibleError as error:
            bound = problem.slo.tpot_s
            within = "" if bound is None else f" within slo.tpot_s {bound:g}"
            raise InfeasibleError(
                f"melange: {error}{within}; it takes other or more GPUs, a looser slo.tpot_s or a lower rate"
            ) from None
        rented = [one.stages[0].gpus for name, group in groups.items() for one in group[: mix.counts[name]]]
        replicas = (evenly(problem.model, f"mixed{number}", "mixed", [gpus]) for number, gpus in enumerate(rented))
        return Solution(rates=rates, offers=offers, mix=mix, plan=Plan(replicas=tuple(replicas)))

    def explain(self, problem: Problem) -> list[str]:
        """The mix and its rent, that of each type alone, and what keeps it from being cheaper."""
        found = self.solve(problem)
        mix, offers = found.mix, found.offers
        counts = " + ".join(f"{number} {name}" for name, number in mix.counts.items() if number)
        lines = [f"cheapest mix for {sum(found.rates.values()):.3g} requests/s: {counts} = {mix.usd_per_hour:.2f} $/h"]
        if mix.gap:
            lines.append(f"the solver's {SOLVER_S:g} s were up; another mix may cost up to {mix.gap:.1%} less")
        lines += [f"only {offer.name}: {_alone(found, offer)}" for offer in offers]
        lower = least_usd_per_hour(found.rates, offers)
        lines.append(f"least possible with parts of replicas, and enough of each: {lower:.2f} $/h")
        for offer in offers:
            number = mix.counts[offer.name]
            if number:
                all_ = ", all that there are" if number == offer.available else ""
                lines.append(f"{offer.name}: {number} rented{all_}, {mix.loads[offer.name] / number:.0%} of them used")
        return lines

    def _replicas(self, problem: Problem) -> dict[str, tuple[Replica, ...]]:
        """Replicas that the cluster has room for, by type, degree where it is above 1, and price where it differs."""
        groups: dict[tuple[str, int, float], list[Replica]] = {}
        for kind in dict.fromkeys(node.gpu.name for node in problem.cluster.nodes):
            try:
                replicas = Colocated(pool=Pool(gpu=kind, tp=self.tp)).plan(problem).replicas
            except ConfigError:
                continue  # none of its machines has room
            for one in replicas:
                groups.setdefault((kind, len(one.gpus), self._usd_per_hour(problem, one)), []).append(one)
        if not groups:
            stated, way_out = ("", "") if self.tp is None else (f" with system.tp {self.tp}", ", or leave tp out")
            raise InfeasibleError(
                f"melange: no machine of the cluster has room for {problem.model.name}{stated}; take larger GPUs, or "
                f"more of them in a machine{way_out}"
            )
        kinds = Counter((kind, tp) for kind, tp, _ in groups)
        named = {}
        for (kind, tp, usd_per_hour), group in groups.items():
            name = f"{kind} TP {tp}" if tp > 1 else kind
            named[f"{name} at {usd_per_hour:g} $/h" if kinds[kind, tp] > 1 else name] = tuple(group)
        return named

    def _usd_per_hour(self, problem: Problem, replica: Replica) -> float:
        gpu = problem.cluster.gpu(replica.gpus[0])
        price = gpu.usd_per_hour_spot if self.spot else gpu.usd_per_hour
        if price is None:
            field = "usd_per_hour_spot" if self.spot else "usd_per_hour"
            raise ConfigError(f"melange: no price is known of {gpu.name}; set {field} on its nodes")
        return len(replica.gpus) * price

    def _offer(self, problem: Problem, name: str, replicas: tuple[Replica, ...], buckets: Iterable[Bucket]) -> Offer:
        profile = self.profile(problem, replicas[0])
        return Offer(
            name=name,
            usd_per_hour=self._usd_per_hour(problem, replicas[0]),
            max_rates={bucket: profile(bucket) for bucket in buckets},
            available=len(replicas),
        )


def _alone(found: Solution, offer: Offer) -> str:
    number = alone(found.rates, offer)
    if number is None:
        lacking = [str(bucket) for bucket in found.rates if not offer.max_rates[bucket] > 0]
        more = f" and {len(lacking) - 1} more buckets" if len(lacking) > 1 else ""
        return f"cannot serve requests of {lacking[0]} tokens{more} within the SLO"
    rent = number * offer.usd_per_hour
    saved = f"the mix saves {1 - found.mix.usd_per_hour / rent:.0%}"
    few = f" (the cluster has {offer.available})" if offer.available is not None and number > offer.available else ""
    return f"{number} = {rent:.2f} $/h{few}; {saved}"
