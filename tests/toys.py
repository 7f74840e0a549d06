"""Small worlds for tests: a cost model one can do in one's head, a two-layer model, a helper to run them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sim import Cluster, Limits, Plan, Problem, Request, Result, System, Workload, simulate
from sim.cluster import Gpu
from sim.cost import StageCost
from sim.model import ModelSpec, model
from sim.policy import RequestView
from sim.types import Line, Replica, Role, Stage, Work

MS = 10**9
"""Picoseconds in a millisecond."""
TINY = replace(model("llama-2-7b"), name="tiny", num_layers=2)


@dataclass(frozen=True, kw_only=True)
class ToyCost:
    """base + per_token * tokens + per_context * decode context + per_pair * chunk tokens * its context, by stage.

    ``knot``: beyond so many context tokens a decode costs twice as much per token (a kink to cut segments at).
    """

    name: str = "toy"
    base_ps: int = 10 * MS
    per_token_ps: int = MS // 100
    per_context_ps: int = 1000
    per_pair_ps: int = 3
    knot: int = 10**9

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        share = stage.num_layers / model.num_layers * slow
        return ToyStage(
            *(
                round(value * share)
                for value in (self.base_ps, self.per_token_ps, self.per_context_ps, self.per_pair_ps)
            ),
            self.knot,
        )


@dataclass(frozen=True)
class ToyStage:
    base_ps: int
    per_token_ps: int
    per_context_ps: int
    per_pair_ps: int
    knot: int
    measured: bool = False

    def line(self, work: Work) -> Line:
        first = self.base_ps + self.per_token_ps * work.tokens + self.per_context_ps * work.decode_context
        slope = self.per_context_ps * work.decode_seqs
        iterations = 1 << 30
        if work.decode_context >= self.knot:
            first += self.per_context_ps * (work.decode_context - self.knot)
            slope *= 2
        elif work.decode_seqs:
            iterations = -(-(self.knot - work.decode_context) // work.decode_seqs)
        for tokens, context in work.chunks:
            first += self.per_pair_ps * tokens * context
            slope += self.per_pair_ps * tokens * tokens
        return Line(first, slope, iterations)


@dataclass(frozen=True)
class Requests:
    """A source that replays a list."""

    requests: Sequence[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        return self.requests if finished is None else ()


def request(
    number: int, arrival_s: float = 0.0, input_tokens: int = 100, output_tokens: int = 10, **more: object
) -> Request:
    return Request(id=number, arrival_s=arrival_s, input_tokens=input_tokens, output_tokens=output_tokens, **more)  # type: ignore[arg-type]


def cluster(gpus: int = 4, nodes: int = 1, gbps: float = 100) -> Cluster:
    """Nodes of A100s."""
    return Cluster.of(
        nodes=[{"gpu": "A100-80G-SXM", "count": gpus, "nodes": nodes}],
        links={"inter_node": {"gbps": gbps, "latency_us": 10}},
    )


def problem(where: Cluster | None = None, cost: object | None = None, seed: int = 0) -> Problem:
    return Problem(
        cluster=where or cluster(),
        model=TINY,
        cost=cost or ToyCost(),  # type: ignore[arg-type]
        workload=Workload(rate_per_s=1.0, lengths=((100, 10),)),
        seed=seed,
    )


def replica(name: str, gpus: Sequence[str], role: Role = "mixed", pp: int = 1) -> Replica:
    """A replica over these GPUs, one layer range per stage."""
    share = len(gpus) // pp
    bounds = [TINY.num_layers * stage // pp for stage in range(pp + 1)]
    return Replica(
        name=name,
        role=role,
        stages=tuple(
            Stage(
                name=f"{name}.{k}",
                gpus=tuple(gpus[k * share : (k + 1) * share]),
                first_layer=bounds[k],
                end_layer=bounds[k + 1],
            )
            for k in range(pp)
        ),
    )


def run(system: System, requests: Sequence[Request], where: Problem | None = None, **options: object) -> Result:
    return simulate(where or problem(), system, Requests(requests), **options)  # type: ignore[arg-type]


def with_limits(system: System, **limits: object) -> System:
    return system.with_limits(replace(system.limits, **limits))  # type: ignore[arg-type]


__all__ = [
    "MS",
    "TINY",
    "Gpu",
    "Limits",
    "Plan",
    "RequestView",
    "Requests",
    "ToyCost",
    "cluster",
    "problem",
    "replica",
    "request",
    "run",
    "with_limits",
]
