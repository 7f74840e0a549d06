"""Pools of equal replicas: the layout a user states, or the plain one if nothing is stated.

Tensor parallelism stays inside a node and a GPU type, pipeline stages follow on the same type. Without a stated TP
the smallest power of two is taken that holds the model and ``CONTEXT_TOKENS`` of KV.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sim.cluster import Cluster
from sim.memory import kv_blocks
from sim.model import ModelSpec
from sim.policy import Problem
from sim.types import ConfigError, Plan, Replica, Role, Stage

CONTEXT_TOKENS = 8192
"""KV a replica must at least hold for a TP degree to be taken without being asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Replicas of one role. ``None``: as many, or as wide, as the cluster allows; ``gpu``: on this type only."""

    replicas: int | None = None
    tp: int | None = None
    pp: int = 1
    gpu: str | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any] | Pool | None, where: str) -> Pool:
        """From a mapping of a scenario file."""
        if isinstance(value, Pool):
            return value
        known = [field.name for field in fields(cls)]
        for key, item in (value or {}).items():
            place = f"system.{where}.{key}" if where else f"system.{key}"
            if key not in known:
                raise ConfigError(f"{place} is unknown; known are {', '.join(known)}")
            if key != "gpu" and item is not None and (not isinstance(item, int) or item < 1):
                raise ConfigError(f"{place} is {item!r}; it must be a whole number >= 1")
        return cls(**(value or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated:
    """Every replica does both phases."""

    pool: Pool

    def plan(self, problem: Problem) -> Plan:
        replicas = tuple(_build(problem, self.pool, "mixed", list(_free(problem.cluster, set())), self.pool.replicas))
        _check(replicas, self.pool, "mixed", problem)
        return Plan(replicas=replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Prefill replicas on the GPUs with the most FLOP/s, decode replicas on the rest.

    If neither pool says how many, each gets half of the replicas that fit (prefill the smaller half).
    """

    prefill: Pool
    decode: Pool

    def plan(self, problem: Problem) -> Plan:
        cluster = problem.cluster
        prefill_count = self.prefill.replicas
        if prefill_count is None:
            both = list(_build(problem, self.prefill, "prefill", list(_free(cluster, set())), None))
            most = len(both) // 2 if self.decode.replicas is None else max(1, len(both) - self.decode.replicas)
            prefill_count = max(1, most)
        prefill = tuple(_build(problem, self.prefill, "prefill", list(_free(cluster, set())), prefill_count))
        _check(prefill, self.prefill, "prefill", problem)
        taken = {gpu for replica in prefill for gpu in replica.gpus}
        decode = tuple(_build(problem, self.decode, "decode", list(_free(cluster, taken)), self.decode.replicas))
        _check(decode, self.decode, "decode", problem)
        return Plan(replicas=prefill + decode)


def _check(replicas: tuple[Replica, ...], pool: Pool, role: Role, problem: Problem) -> None:
    """Say what is missing if there are fewer replicas than asked for."""
    if len(replicas) >= (pool.replicas or 1):
        return
    asked = f"{pool.replicas or 'at least one'} {role} replica(s), tp {pool.tp or 'any'}, pp {pool.pp}"
    on = f" on {pool.gpu}" if pool.gpu else ""
    cluster, model = problem.cluster, problem.model
    weights_gb = model.weight_bytes(0, model.num_layers) / 1e9
    machines = {
        name: f"{cluster.node(name).count} x {cluster.gpu(name).name} of {cluster.gpu(name).memory_bytes / 1e9:.0f} GB"
        for name in cluster.gpu_ids
    }
    raise ConfigError(
        f"system: {asked}{on} of {model.name} asked for, but the cluster has room for {len(replicas)} "
        f"({weights_gb:.0f} GB of weights each, besides KV; machines with "
        f"{', '.join(dict.fromkeys(machines.values()))}); ask for fewer, other tp or pp, or add GPUs"
    )


def _free(cluster: Cluster, taken: set[str]) -> Iterator[list[str]]:
    """Free GPUs by node, the fastest type first (FLOP/s, then bandwidth), else in the cluster's order."""
    nodes: dict[str, list[str]] = {}
    for gpu in cluster.gpu_ids:
        if gpu not in taken:
            nodes.setdefault(cluster.node(gpu).name, []).append(gpu)

    def speed(gpus: list[str]) -> tuple[float, float]:
        gpu = cluster.gpu(gpus[0])
        return -gpu.flops_for("bfloat16"), -gpu.bandwidth_bytes_per_s

    yield from sorted(nodes.values(), key=speed)


def _build(problem: Problem, pool: Pool, role: Role, nodes: list[list[str]], most: int | None) -> Iterator[Replica]:
    cluster = problem.cluster
    if pool.gpu is not None:
        nodes = [gpus for gpus in nodes if cluster.gpu(gpus[0]).name.lower() == pool.gpu.lower()]
    number = 0
    groups: list[tuple[str, ...]] = []
    for gpus in nodes:
        tp = pool.tp or _narrowest(problem, gpus, pool.pp)
        if tp is None:
            continue
        if groups and cluster.gpu(groups[0][0]).name != cluster.gpu(gpus[0]).name:
            groups = []  # a pipeline does not mix GPU types
        for start in range(0, len(gpus) - tp + 1, tp):
            groups.append(tuple(gpus[start : start + tp]))
            if len(groups) == pool.pp:
                if most is not None and number >= most:
                    return
                yield evenly(problem.model, f"{role}{number}", role, groups)
                number += 1
                groups = []


def _narrowest(problem: Problem, gpus: list[str], pp: int) -> int | None:
    """Smallest power-of-two TP on this node that holds the model with some KV; None if none does."""
    tp = 1
    need = CONTEXT_TOKENS // problem.limits.block_size
    while tp <= len(gpus):
        stages = evenly(problem.model, "trial", "mixed", [tuple(gpus[:tp])] * pp).stages
        if problem.limits.num_kv_blocks is not None or kv_blocks(problem, stages, problem.limits) >= need:
            return tp
        tp *= 2
    return None


def evenly(model: ModelSpec, name: str, role: Role, groups: Sequence[tuple[str, ...]]) -> Replica:
    """A replica with a stage on each group of GPUs; layers spread evenly, earlier stages taking the remainder."""
    base, extra = divmod(model.num_layers, len(groups))
    stages = []
    layer = 0
    for number, gpus in enumerate(groups):
        end = layer + base + (number < extra)
        stages.append(Stage(name=f"{name}.{number}", gpus=gpus, first_layer=layer, end_layer=end))
        layer = end
    return Replica(name=name, role=role, stages=tuple(stages))
