"""What ThunderServe's studies run on: its clusters and workloads, and how a system's best plan there is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Any, NamedTuple

import numpy as np

from sim import SYSTEMS, Cluster, ConfigError, Plan, Problem, Slo, System, Workload, simulate
from sim.cost import Roofline
from sim.goodput import bisected_rate, bracketing, sustained, trial_requests
from sim.metrics import Columns, attainment_curve
from sim.model import ModelSpec, model
from sim.planners.hexgen2 import HexGen2
from sim.planners.thunderserve import TabuSearch
from sim.systems.split.distserve import poisson
from sim.types import ClusterEvent, Stage, Work
from traces import Lognormal, TraceSource, generate

TARGET = 0.9
CANDIDATES = 5
"""Of a search, tried in the engine."""
SLO_SCALE = 20.0
"""Bounds over what the mean request takes alone on two A100: our choice, searched where deadlines are compared."""
SCALES = tuple(round(float(scale), 3) for scale in np.geomspace(1, 40, 75))
CLOUD_USD_PER_HOUR = 13.54
"""Abstract of the paper; the machines are our assumption, their prices scaled to this total."""
CLOUD_GBPS = 40.0
LENGTHS = {
    "coding": (Lognormal(mean_tokens=2047.8, median_tokens=1469, max_tokens=7400),
               Lognormal(mean_tokens=27.9, median_tokens=13, max_tokens=1000)),
    "conversation": (Lognormal(mean_tokens=1154.7, median_tokens=1020, max_tokens=7400),
                     Lognormal(mean_tokens=211.1, median_tokens=129, max_tokens=1000)),
}  # fmt: skip
"""Means and medians of the Azure traces of 2023 (coding, conversation), cut at about their longest."""


class Size(NamedTuple):
    """Requests of a trial at least, tolerance of rates, steps of a tabu search, times a plan is made anew."""

    requests: int
    tolerance: float
    steps: int
    rounds: int


FULL, QUICK = Size(300, 0.05, 25, 2), Size(200, 0.1, 10, 1)


@cache
def llama_30b() -> ModelSpec:
    """LLaMA-30B with its context limit of 2,048 lifted: the Azure prompts are longer."""
    return replace(model("llama-30b"), max_position_embeddings=16384)


@cache
def cloud() -> Cluster:
    """32 GPUs of four types on seven machines, as one rents them."""
    rows = [("A6000", 4, 2), ("A5000", 4, 2), ("A40", 8, 1), ("RTX-3090-Ti", 4, 2)]
    plain = _cluster(rows, CLOUD_GBPS)
    total = plain.usd_per_hour()
    assert total is not None
    scale = CLOUD_USD_PER_HOUR / total
    nodes = tuple(
        replace(node, gpu=replace(node.gpu, usd_per_hour=(node.gpu.usd_per_hour or 0.0) * scale))
        for node in plain.nodes
    )
    return replace(plain, nodes=nodes)


@cache
def in_house() -> Cluster:
    return _cluster([("A100-80G-SXM", 8, 1)], 100.0)


@cache
def two_kinds(gbps: float) -> Cluster:
    """Four A40 and four RTX 3090 Ti."""
    return _cluster([("A40", 4, 1), ("RTX-3090-Ti", 4, 1)], gbps)


def _cluster(rows: Sequence[tuple[str, int, int]], gbps: float) -> Cluster:
    return Cluster.of(
        [{"gpu": gpu, "count": count, "nodes": nodes} for gpu, count, nodes in rows],
        links={"inter_node": {"gbps": gbps, "latency_us": 50}},
    )


@cache
def problem(cluster: Cluster, workload: str, scale: float = SLO_SCALE) -> Problem:
    """The workload on a cluster; rates are set by who searches them."""
    drawn = generate(1000, 1.0, input=LENGTHS[workload][0], output=LENGTHS[workload][1], seed=0)
    lengths = tuple((one.input_tokens, one.output_tokens) for one in drawn)
    known = Workload(rate_per_s=1.0, lengths=lengths)
    return Problem(
        cluster=cluster, model=llama_30b(), cost=Roofline(), workload=known, slo=reference(known, scale)
    )  # fmt: skip


def reference(workload: Workload, scale: float) -> Slo:
    """TTFT and time to the last token of the mean request alone on two A100, times ``scale``.

    No TPOT: the whole transfer of a long prompt would count on the few tokens that coding asks for.
    """
    stage = Stage(name="reference", gpus=in_house().gpu_ids[:2], first_layer=0, end_layer=llama_30b().num_layers)
    line = Roofline().bind(llama_30b(), stage, in_house()).line
    tokens = round(workload.mean_input_tokens)
    prefill, step = (line(work).first_ps * 1e-12 for work in (Work(((tokens, 0),), 0, 0), Work((), 1, tokens)))
    return Slo(
        ttft_s=scale * prefill, e2e_s=scale * (prefill + (workload.mean_output_tokens - 1) * step), attainment=TARGET
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A system on a plan, and the rate (requests/s) that it serves within the SLO."""

    problem: Problem
    system: System
    plan: Plan
    rate_per_s: float

    def columns(self, rate_per_s: float, size: Size, events: Sequence[ClusterEvent] = (), count: int = 0) -> Columns:
        known = self.problem.workload
        count = count or max(size.requests, trial_requests(self.problem.slo, known.mean_output_tokens, rate_per_s))
        requests = poisson(known.lengths, rate_per_s, count, seed=1)
        told = at(self.problem, rate_per_s)
        return simulate(told, self.system, TraceSource(requests), plan=self.plan, events=events).columns

    def found(self, start: float, size: Size) -> Served:
        """With its goodput, looked for from ``start`` on."""

        search = bracketing(start, 64 * start, size.tolerance)
        return replace(self, rate_per_s=bisected_rate(lambda rate: self.share(rate, size) >= TARGET, search))

    def share(self, rate_per_s: float, size: Size) -> float:
        """Of the requests within the SLO; 0 where the queue grows."""
        return sustained(self.columns(rate_per_s, size), self.problem.slo)

    def deadline_scale(self, rate_per_s: float, size: Size) -> float:
        """The tightest SLO, over the reference, that the target share of the requests keeps at a rate."""
        unit = reference(self.problem.workload, 1.0)
        shares = attainment_curve(self.columns(rate_per_s, size), unit, SCALES)
        return next(
            (scale for scale, share in zip(SCALES, shares, strict=True) if share and share >= TARGET), inf
        )  # fmt: skip


def at(where: Problem, rate_per_s: float) -> Problem:
    return replace(where, workload=replace(where.workload, rate_per_s=rate_per_s))


def best(where: Problem, systems: Sequence[System], start: float, size: Size) -> Served:
    """The best of several layouts of one system; every planner plans for ``start``, then for the rate that is served.

    Of a search the first candidates are simulated at that rate, as ``phasewise plan`` does. A layout without room is
    left out.
    """
    found: list[Served] = []
    for system in systems:
        rate, before = start, None
        for _ in range(size.rounds):
            try:
                offers = [Served(problem=where, system=system, plan=plan, rate_per_s=0.0)
                          for plan in plans(replace(at(where, rate), limits=system.limits), system)]  # fmt: skip
                if [offer.plan for offer in offers] == before:
                    break  # this planner looks at no rate
                before = [offer.plan for offer in offers]
                one = max(offers, key=lambda offer: offer.share(rate, size)).found(rate, size)
            except ConfigError:
                break
            found.append(one)
            rate = max(rate, one.rate_per_s) * 1.1
    return max(found, key=lambda one: one.rate_per_s)


def plans(where: Problem, system: System) -> list[Plan]:
    planner = system.planner
    if isinstance(planner, TabuSearch | HexGen2):
        return [candidate.plan for candidate in planner.search(where).candidates[:CANDIDATES]]
    return [planner.plan(where)]


def thunderserve(size: Size, **options: Any) -> System:
    return SYSTEMS["thunderserve"](n_steps=size.steps, **options)


def hexgen2(size: Size) -> System:
    return SYSTEMS["hexgen-2"](patience=size.steps)


def colocated(mode: str) -> list[System]:
    """vLLM, V0 (prompts first) or V1 (chunked prompts), as narrow as memory allows, or TP 2 or 4."""
    systems = (SYSTEMS["vllm"](mode=mode, tp=tp) for tp in (None, 2, 4))
    if mode == "v1":
        return list(systems)
    whole = llama_30b().max_position_embeddings  # V0 computes a prompt in one step
    return [system.with_limits(replace(system.limits, max_num_batched_tokens=whole)) for system in systems]


def distserve() -> list[System]:
    """DistServe with TP 2 and every number of prefill instances."""
    return [
        SYSTEMS["distserve"](prefill={"replicas": count, "tp": 2}, decode={"replicas": 4 - count, "tp": 2})
        for count in (1, 2, 3)
    ]
