"""HexGen's published figures and ours.

``python -m experiments.studies.hexgen --out docs/studies/hexgen`` (about ten minutes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from sim import SYSTEMS, Cluster, Plan, Problem, Slo, System, Workload, simulate
from sim.cost import Roofline
from sim.goodput import bisected_rate, bracketing, sustained, trial_requests
from sim.metrics import Columns, attainment_curve
from sim.model import model
from sim.planners.hexgen import HexGen
from sim.systems.split.distserve import poisson
from traces import TraceSource

PROMPT_TOKENS = 128
TARGET = 0.99
SLACKS = (5.0, 10.0, 20.0, 40.0)
"""Deadlines in which rates are compared, over a request alone on the A100s; ours."""
SCALES = tuple(round(float(scale), 3) for scale in np.geomspace(0.5, 60, 120))
TOLERANCE = 0.05
PLANNED_PER_S = (1.0, 3.0, 6.0)
"""Rates that HexGen plans for; of its plans the best counts."""

HETEROGENEOUS = (
    ("illinois", "A6000", 8, 2), ("illinois", "A5000", 8, 1), ("illinois", "A40", 4, 1),
    ("iceland", "RTX-3090-Ti", 8, 2), ("norway", "RTX-3090-Ti", 3, 2), ("nevada", "A5000", 8, 1),
)  # fmt: skip
"""Region, GPU, GPUs a machine, machines: counts and memory of the authors' scripts, types and places second-hand."""
INTRODUCTION = """
HexGen (ICML 2024) serves Llama-2-70B on 58 GPUs of four regions, in replicas of unequal GPUs, each a pipeline whose
stages have tensor-parallel degrees of their own. The figures are those of its abstract and README: ratios "up to", over
settings that were not printed. Ours: prompts of 128 tokens and answers of 32, 64 and 128, one request a batch as in its
runtime, deadlines that 99 % of the requests keep, in multiples of what a request takes alone on the A100s; rates are
compared at deadlines of 5 to 40, deadlines at half of the slower one's rate. Machines of a region have 10 Gbit/s and
0.1 ms, regions 1 Gbit/s and 50 ms. Step times are rooflines. The six GPUs of one region have 144 GB together: by our
account too little for weights, KV and activations, so they serve nothing. The symmetric plan is the same search with
one tensor-parallel degree and as many layers for all stages of a replica; what the README calls symmetric it does not
say. With a replica a machine, which both find, asymmetry has nothing to gain. The seven machines that hold the model
have 1.7 times the memory bandwidth and 1.2 times the FLOP/s of the 16 A100, so the printed 4 times ask for a baseline
that makes less of its GPUs than ours, tensor-parallel over eight.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    requests: int
    generations: int
    outputs: tuple[int, ...]
    slacks: tuple[float, ...]


FULL = Size(requests=400, generations=300, outputs=(32, 64, 128), slacks=SLACKS)
QUICK = Size(requests=120, generations=60, outputs=(32,), slacks=(10.0,))


@cache
def heterogeneous() -> Cluster:
    nodes = [
        {"gpu": gpu, "count": count, "nodes": nodes, "region": region} for region, gpu, count, nodes in HETEROGENEOUS
    ]
    links = {"inter_node": {"gbps": 10, "latency_us": 100}, "inter_region": {"gbps": 1, "latency_us": 50_000}}
    return Cluster.of(nodes, links=links)


@cache
def homogeneous() -> Cluster:
    return Cluster.of([{"gpu": "A100-40G-SXM", "count": 8, "nodes": 2}], links={"inter_node": {"gbps": 100}})


@cache
def where(cluster: Cluster, output_tokens: int, rate_per_s: float = 1.0) -> Problem:
    workload = Workload(rate_per_s=rate_per_s, lengths=((PROMPT_TOKENS, output_tokens),))
    return Problem(cluster=cluster, model=model("llama-2-70b"), cost=Roofline(), workload=workload)


class Served:
    """A system on a plan for answers of one length. ``unit_s``: what deadlines are multiples of; ``slack``: the one in
    which rates are compared."""

    def __init__(self, problem: Problem, system: System, plan: Plan, unit_s: float, slack: float, size: Size) -> None:
        self.problem = replace(problem, limits=system.limits)
        self.system, self.plan, self.unit_s, self.slack, self.size = system, plan, unit_s, slack, size

    def shares(self, rate_per_s: float, scales: Sequence[float]) -> list[float]:
        columns = self._columns(rate_per_s, self.size.requests)
        return [share or 0.0 for share in attainment_curve(columns, Slo(e2e_s=self.unit_s), scales)]

    def rate(self) -> float:
        slo = Slo(e2e_s=self.unit_s * self.slack)

        def share(rate_per_s: float) -> float:
            need = trial_requests(slo, self.problem.workload.mean_output_tokens, rate_per_s)
            return sustained(self._columns(rate_per_s, max(self.size.requests, need)), slo)

        return bisected_rate(lambda rate: share(rate) >= TARGET, bracketing(0.5, 500.0, TOLERANCE))

    def _columns(self, rate_per_s: float, count: int) -> Columns:
        requests = poisson(self.problem.workload.lengths, rate_per_s, count, seed=1)
        return simulate(self.problem, self.system, TraceSource(requests), plan=self.plan).columns

    def deadline(self, rate_per_s: float) -> float:
        shares = self.shares(rate_per_s, SCALES)
        return next((scale for scale, share in zip(SCALES, shares, strict=True) if share >= TARGET), inf)


def alone_s(output_tokens: int) -> float:
    """A request alone on eight A100."""
    problem, system = where(homogeneous(), output_tokens), one_by_one("vllm", tp=8)
    requests = poisson(problem.workload.lengths, 0.001, 1, seed=1)
    result = simulate(problem, system, TraceSource(requests))
    return float(result.columns["e2e_s"][0])


def one_by_one(name: str, **options: Any) -> System:
    system = SYSTEMS[name](**options)
    return system.with_limits(replace(system.limits, max_num_seqs=1))


def hexgen(output_tokens: int, unit_s: float, slack: float, size: Size, *, asymmetric: bool) -> Served:
    """The best of the plans for several rates."""
    system = SYSTEMS["hexgen"](batching="one", generations=size.generations, asymmetric=asymmetric)
    planner = HexGen(continuous=False, generations=size.generations, asymmetric=asymmetric)
    offers = {}
    for rate in PLANNED_PER_S:
        problem = replace(where(heterogeneous(), output_tokens, rate), slo=Slo(e2e_s=slack * unit_s))
        problem = replace(problem, limits=system.limits)
        plan = planner.plan(problem)
        offers[plan.replicas] = Served(problem, system, plan, unit_s, slack, size)
    return max(offers.values(), key=Served.rate)


def rows(size: Size, log: Log, _: Path | None = None) -> Iterator[Comparison]:
    rates: dict[str, list[float]] = {"homogeneous": [], "symmetric": []}
    deadlines: dict[str, list[float]] = {"homogeneous": [], "symmetric": []}
    for output_tokens, slack in product(size.outputs, size.slacks):
        what = f"answers of {output_tokens}, deadline of {slack:g}"
        log.say(what)
        unit_s = alone_s(output_tokens)
        problem, system = where(homogeneous(), output_tokens), one_by_one("vllm", tp=8)
        plan = system.planner.plan(replace(problem, limits=system.limits))
        ours = hexgen(output_tokens, unit_s, slack, size, asymmetric=True)
        others = {
            "homogeneous": Served(problem, system, plan, unit_s, slack, size),
            "symmetric": hexgen(output_tokens, unit_s, slack, size, asymmetric=False),
        }
        own = ours.rate()
        yield row("abstract", f"58 GPUs, {what}: rate", None, own, "1/s", note=_shapes(ours.plan))
        for name, other in others.items():
            theirs = other.rate()
            yield row("abstract", f"{name}, {what}: rate", None, theirs, "1/s", note=_shapes(other.plan))
            if theirs and own:
                rates[name].append(own / theirs)
                at = min(own, theirs) / 2
                deadlines[name].append(other.deadline(at) / ours.deadline(at))
    yield row("abstract", "58 unequal GPUs over 16 A100, rate, at most", 4.0, max(rates["homogeneous"]), "x")
    yield row("abstract", "58 unequal GPUs over 16 A100, deadline, at most", 2.3, max(deadlines["homogeneous"]), "x")
    yield row("README", "asymmetric over symmetric, rate", 2.0, max(rates["symmetric"]), "x")
    yield row("README", "asymmetric over symmetric, deadline", 1.8, max(deadlines["symmetric"]), "x")


def _shapes(plan: Plan) -> str:
    """TP degrees of each replica's stages."""
    return "; ".join("-".join(str(stage.tp) for stage in one.stages) for one in plan.replicas)


STUDY = Study(
    name="study_hexgen",
    title="HexGen (ICML 2024): published figures and ours",
    intro=INTRODUCTION + "\nRegenerate with `python -m experiments.studies.hexgen --out docs/studies/hexgen`.",
    sizes={"": (FULL, ""), "quick": (QUICK, "short answers only, small searches: to see that it runs")},
    rows=rows,
)

if __name__ == "__main__":
    STUDY.main()
