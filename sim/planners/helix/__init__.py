"""Helix's placement (ASPLOS 2025, arXiv 2406.01566): which layers each machine holds, by the max-flow that results.

A node holds a contiguous range of layers; ranges may overlap. How many tokens per second a node passes with so many
layers bounds its flow, links bound the flow between nodes, and the placement with the largest flow
from the first layer to the last wins. Here a problem becomes a network and a placement a plan; ``network.py`` has
throughput and flow, ``program.py`` the mixed-integer program, ``placements.py`` the paper's baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Literal, get_args

from sim.cost import seconds
from sim.memory import kv_blocks
from sim.planners.helix.network import Held, Machine, Network, Throughput, Typical, max_flow
from sim.planners.helix.placements import MOVES, best_placement, petals_placement, separate_placement, swarm_placement
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan, Replica, Stage, Work

Placement = Literal["helix", "petals", "swarm", "separate"]
END = ""
"""Where flows come from and go to: the coordinator."""
TOKEN_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HelixPlacement:
    """Which layers each machine holds. ``tp``: GPUs a node, None for all of a machine; ``moves``: of the search."""

    placement: Placement = "helix"
    tp: int | None = None
    moves: int = MOVES
    weight_share: float = 0.5
    typical: Typical | None = None

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ConfigError(f"system.placement is {self.placement!r}; helix has {', '.join(get_args(Placement))}")

    def plan(self, problem: Problem) -> Plan:
        network = self.network(problem)
        held = self._held(network, problem.seed)
        plan = plan_of(network, held)
        if not plan.flows:
            raise InfeasibleError(
                f"plan: no chain of machines holds the {network.num_layers} layers of {problem.model.name} "
                f"({self.placement}): {sum(m.most_layers for m in network.machines)} layers fit where weights take "
                f"{self.weight_share:.0%} of the memory; use more GPUs or raise system.weight_share"
            )
        return plan

    def _held(self, network: Network, seed: int) -> list[Held | None]:
        if self.placement == "petals":
            return petals_placement(network, seed)
        if self.placement == "swarm":
            return swarm_placement(network)
        if self.placement == "separate":
            return separate_placement(network)
        return best_placement(network, moves=self.moves, seed=seed)

    def network(self, problem: Problem) -> Network:
        """What the machines and links of a problem can pass, by its latency model."""
        machines = _with_typical_layers(tuple(self._machines(problem)), problem.model.num_layers)
        if not machines:
            raise InfeasibleError(f"plan: no machine holds a layer of {problem.model.name}; use larger GPUs or more tp")
        separate = self.placement == "separate"
        estimate = Throughput(machines, problem.model.num_layers, self.typical)
        cluster, activation_bytes = problem.cluster, 2 * problem.model.hidden_size
        rates = []
        for machine in machines:
            most = machine.fit_layers if separate else machine.most_layers
            rates.append({k: estimate.tokens_per_s(machine, k) for k in range(1, most + 1)})
        capacity = cluster.capacity_bytes_per_s
        links = {
            (i, j): cluster.path(machines[i].gpus, machines[j].gpus).bytes_per_s(capacity) / activation_bytes
            for i, j in product(range(len(machines)), repeat=2)
            if i != j
        }
        ends = [
            max((links[i, j] for j in range(len(machines)) if j != i), default=inf) * activation_bytes / TOKEN_BYTES
            for i in range(len(machines))
        ]
        return Network(
            machines=machines, num_layers=problem.model.num_layers, node_tokens_per_s=tuple(rates),
            link_tokens_per_s=links, end_tokens_per_s=tuple(ends),
        )  # fmt: skip

    def _machines(self, problem: Problem) -> list[Machine]:
        found: list[Machine] = []
        known: dict[str, Machine] = {}
        for row in problem.cluster.nodes:
            width = self.tp or len(row.gpu_ids)
            for start in range(0, len(row.gpu_ids) - width + 1, width):
                gpus = tuple(row.gpu_ids[start : start + width])
                kind = f"{problem.cluster.gpu(gpus[0]).name} x {width}"
                if kind not in known:
                    known[kind] = self._machine(problem, gpus, kind)
                name = row.gpu_ids[start].split(".")[0] + (f"-{start // width}" if width < len(row.gpu_ids) else "")
                if known[kind].most_layers:
                    found.append(replace(known[kind], name=name, gpus=gpus))
        return found

    def _machine(self, problem: Problem, gpus: tuple[str, ...], kind: str) -> Machine:
        model, limits = problem.model, problem.limits
        tokens, fit, half = {}, 0, 0
        memory_bytes = min(problem.cluster.gpu(gpu).memory_bytes for gpu in gpus) * len(gpus)
        for layers in range(1, model.num_layers + 1):
            blocks = kv_blocks(problem, (_stage_of(gpus, 0, layers),), limits)
            if blocks < 1:
                break
            tokens[layers], fit = blocks * limits.block_size, layers
            first = int(model.num_layers > layers)  # inner layers, where there are: neither embedding nor head
            if model.weight_bytes(first, first + layers) <= self.weight_share * memory_bytes:
                half = layers
        depth = max(1, half // 2)
        first = int(model.num_layers > depth)
        cost = problem.cost.bind(model, _stage_of(gpus, first, first + depth), problem.cluster)
        of = self.typical or Typical()
        context = of.input_tokens + of.output_tokens // 2
        return Machine(
            name=kind, gpus=gpus, kind=kind, most_layers=half, fit_layers=fit, typical_layers=half, kv_tokens=tokens,
            prompt_s=lambda count: seconds(cost, Work(((count, 0),), 0, 0)) / depth,
            decode_s=lambda count: seconds(cost, Work((), count, count * context)) / depth,
        )  # fmt: skip


def _with_typical_layers(machines: tuple[Machine, ...], num_layers: int) -> tuple[Machine, ...]:
    """Two thirds of the most that a machine holds, where these make 1.2 models (as the artifact's tables do, about)."""
    fewer = tuple(replace(machine, typical_layers=max(1, round(machine.most_layers * 2 / 3))) for machine in machines)
    return fewer if sum(machine.typical_layers for machine in fewer) >= 1.2 * num_layers else machines


def plan_of(network: Network, held: Sequence[Held | None]) -> Plan:
    """Each machine with its layers, and the max-flow between them (none, if nothing passes)."""
    names = [machine.name for machine in network.machines]
    _, flows = max_flow(network, held)
    return Plan(
        replicas=tuple(
            Replica(name=names[i], stages=(_stage(network.machines[i], mine.first, mine.end),))
            for i, mine in enumerate(held)
            if mine is not None
        ),
        flows={
            (END if a is None else names[a], END if b is None else names[b]): flow for (a, b), flow in flows.items()
        },
    )


def _stage(machine: Machine, first: int, end: int) -> Stage:
    return Stage(name=machine.name, gpus=machine.gpus, first_layer=first, end_layer=end)


def _stage_of(gpus: tuple[str, ...], first: int, end: int) -> Stage:
    return Stage(name="probe", gpus=gpus, first_layer=first, end_layer=end)


__all__ = [
    "END", "MOVES", "Held", "HelixPlacement", "Machine", "Network", "Placement", "Throughput", "Typical",
    "best_placement", "max_flow", "petals_placement", "plan_of", "separate_placement", "swarm_placement",
]  # fmt: skip
