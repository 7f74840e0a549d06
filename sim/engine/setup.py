"""Before the first event: is the plan possible, and how many KV blocks does each replica have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache

from sim.cost import StageCost, StepCost
from sim.engine.clock import Clock
from sim.engine.node import Node
from sim.engine.replica.state import ReplicaState
from sim.memory import Ledger, kv_blocks, kv_bytes_available
from sim.policy import Batcher, Limits, Problem
from sim.types import ConfigError, Plan, Replica, Stage, to_ps


def check_plan(plan: Plan, problem: Problem) -> None:
    """Raise ``ConfigError`` unless every replica holds every layer once, or nodes form a chain of all, on own GPUs."""
    owner: dict[str, str] = {}
    if not plan.replicas:
        raise ConfigError("plan: it has no replicas")
    for what, names in (
        ("replica", [replica.name for replica in plan.replicas]),
        ("stage", [name for replica in plan.replicas for name in replica.leg]),
    ):
        for name, times in Counter(names).items():
            if times > 1:
                raise ConfigError(f"plan: {what} {name!r} occurs twice; {what} names must be unique")
    of_nodes = plan.of_nodes(problem.model.num_layers)
    if of_nodes:
        _check_nodes(plan, problem.model.num_layers)
    for replica in plan.replicas:
        if not of_nodes:
            _check_layers(replica, problem)
        for gpu in replica.gpus:
            if gpu not in problem.cluster.gpu_ids:
                raise ConfigError(f"plan: replica {replica.name!r} uses GPU {gpu!r}, which the cluster does not have")
            if gpu in owner:
                raise ConfigError(f"plan: GPU {gpu} is used by {owner[gpu]} and by {replica.name}")
            owner[gpu] = replica.name


def _check_layers(replica: Replica, problem: Problem) -> None:
    layer = 0
    for stage in replica.stages:
        if stage.first_layer != layer or stage.end_layer <= layer:
            raise ConfigError(
                f"plan: stage {stage.name!r} holds layers {stage.first_layer} to {stage.end_layer}; "
                f"it must start at {layer}"
            )
        layer = stage.end_layer


def _check_nodes(plan: Plan, num_layers: int) -> None:
    """One stage each, and from layer 0 on there is a chain to the last layer."""
    for replica in plan.replicas:
        stage = replica.stages[0]
        if len(replica.stages) > 1 or not 0 <= stage.first_layer < stage.end_layer <= num_layers:
            raise ConfigError(
                f"plan: replica {replica.name!r} has {len(replica.stages)} stages, layers {stage.first_layer} to "
                f"{stage.end_layer}; where one holds a part of the {num_layers} layers, all must be one stage"
            )
    reached = 0
    while reached < num_layers:
        ends = [r.stages[0].end_layer for r in plan.replicas if r.stages[0].first_layer <= reached]
        if max(ends, default=0) <= reached:
            raise ConfigError(f"plan: no replica holds layer {reached}; each of the {num_layers} must be somewhere")
        reached = max(ends)


def build_replica(
    number: int,
    spec: Replica,
    problem: Problem,
    limits: Limits,
    cost: StepCost,
    batcher: Batcher,
    slow: Mapping[str, float],
    clock: Clock,
    *,
    of_nodes: bool = False,
) -> ReplicaState:
    """A replica ready to serve, or a node. Raises ``ConfigError`` if its GPUs cannot hold its layers."""
    copies = max(1, len(spec.models))
    blocks = kv_blocks(problem, spec.stages, limits, copies=copies)
    if blocks < 1:
        worst = min(spec.stages, key=lambda stage: kv_bytes_available(problem, stage, limits, copies=copies))
        short_gb = -kv_bytes_available(problem, worst, limits, copies=copies) / 1e9
        gpu = problem.cluster.gpu(worst.gpus[0]).name
        what = problem.model.name if copies == 1 else f"{copies} x {problem.model.name}"
        raise ConfigError(
            f"plan: {what} does not fit on stage {worst.name} ({worst.tp} x {gpu}): "
            f"{max(short_gb, 0.1):.1f} GB a GPU are missing; "
            f"use more GPUs (tp, pp) or raise gpu_memory_utilization ({limits.gpu_memory_utilization})"
        )
    layers = spec.stages[0].num_layers if of_nodes else 1
    return (Node if of_nodes else ReplicaState)(
        number,
        spec,
        tuple(bind_cost(cost, problem, stage, slow) for stage in spec.stages),
        hop_time_ps(problem, spec),
        Ledger(blocks * layers, limits.block_size, limits.prefix_caching),
        batcher,
        limits,
        clock,
    )


def bind_cost(cost: StepCost, problem: Problem, stage: Stage, slow: Mapping[str, float]) -> StageCost:
    """Step times of a stage; its slowest GPU sets the pace."""
    return cost.bind(problem.model, stage, problem.cluster, max(slow.get(gpu, 1.0) for gpu in stage.gpus))


def hop_time_ps(problem: Problem, spec: Replica) -> Callable[[int], int]:
    """Time to hand so many tokens' activations to the next stage: the slowest hop, alone on its link."""
    cluster = problem.cluster
    paths = [cluster.path(a.gpus, b.gpus) for a, b in zip(spec.stages, spec.stages[1:], strict=False)]

    @cache
    def hop_ps(tokens: int) -> int:
        size_bytes = tokens * problem.model.hidden_size * 2
        capacity = cluster.capacity_bytes_per_s
        return max((to_ps(path.latency_s + size_bytes / path.bytes_per_s(capacity)) for path in paths), default=0)

    return hop_ps
