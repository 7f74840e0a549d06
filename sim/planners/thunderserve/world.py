"""What a search walks over: groupings of a cluster's GPUs, or the phases of replicas that stay as they are.

Either gives a start, prices a state by the lower level (configurations, then routing), and turns it into a plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sim.planners.thunderserve.groups import (
    PHASES,
    Counts,
    Group,
    Grouping,
    agglomerate,
    by_intensity,
    canonical,
    halves,
    two_even,
)
from sim.planners.thunderserve.orchestrate import NOTHING, Orchestrator, Routing
from sim.planners.thunderserve.parallel import Layouts
from sim.planners.thunderserve.replay import Floats, Sample, Server
from sim.policy import Problem
from sim.transfers import Quantized
from sim.types import InfeasibleError, Plan, Replica, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan and what the planner predicts of it.

    ``attainment``: share of requests that meet the SLO. ``served``: part of the rate that fits all capacities.
    ``headroom``: how many times the rate could flow, links included. ``pair_scores``: D, by (prefill, decode) replica.
    ``bottleneck``: the stage, link or memory that is full first.
    """

    plan: Plan
    attainment: float
    served: float
    headroom: float
    pair_scores: Mapping[tuple[str, str], float]
    bottleneck: str


class World:
    """The GPUs of a cluster, in groups."""

    def __init__(self, problem: Problem, transfer: Quantized, without: Collection[str] = ()) -> None:
        self.problem = problem
        self.layouts = Layouts(problem, Sample.of(problem))
        self.orchestrator = Orchestrator(self.layouts, transfer)
        self._free = [[gpu for gpu in node.gpu_ids if gpu not in without] for node in problem.cluster.nodes]

    def start(self) -> list[Grouping]:
        """As many groups as the clustering closes; by FLOP/s per byte/s, the first of them prefill, for any number; and
        both phases on every machine.

        ``InfeasibleError`` if there is no room for two copies of the model, or no link between any two groups.
        """
        cluster, free = self.problem.cluster, tuple(map(len, self._free))
        parts = agglomerate(cluster, free, self.layouts.holds)
        if len(parts) < 2:
            parts = [half for half in two_even(cluster, free) if self.layouts.holds(half)]
        if len(parts) < 2:
            raise InfeasibleError(self.no_room())
        order = self.by_intensity(parts)
        ordered = [
            canonical([Group(part, "prefill" if place < cut else "decode") for place, part in enumerate(order)])
            for cut in range(1, len(order))
        ]
        beside = canonical(Group(half, role) for half, role in zip(halves(free), PHASES, strict=True))
        return [*ordered, *([beside] if self.feasible(beside) else [])]

    def of_plan(self, plan: Plan) -> Grouping | None:
        """Its groups; None if one of them does both phases."""
        places = {gpu: place for place, node in enumerate(self.problem.cluster.nodes) for gpu in node.gpu_ids}
        groups = []
        for replica in plan.replicas:
            if replica.role == "mixed":
                return None
            counts = [0] * len(self.problem.cluster.nodes)
            for gpu in replica.gpus:
                counts[places[gpu]] += 1
            groups.append(Group(tuple(counts), replica.role))
        return canonical(groups)

    def by_intensity(self, parts: Sequence[Counts]) -> list[Counts]:
        """Those that suit prefill first."""
        return by_intensity(self.problem.cluster, parts, self.problem.model.dtype)

    def no_room(self) -> str:
        """Why two groups cannot be made, in numbers."""
        model, cluster, free = self.problem.model, self.problem.cluster, tuple(map(len, self._free))
        tokens = self.layouts.sample.longest_tokens
        copy = model.weight_bytes(0, model.num_layers) + tokens * model.kv_bytes_per_token()
        share = self.problem.limits.gpu_memory_utilization
        usable = sum(n * node.gpu.memory_bytes for n, node in zip(free, cluster.nodes, strict=True)) * share
        return (
            f"cluster: a prefill and a decode copy of {model.name}, each with KV for {tokens} tokens, need 2 x "
            f"{copy / 1e9:.1f} GB besides activations; the {sum(free)} GPUs have {usable / 1e9:.1f} GB usable and no "
            "two groups of them hold it; add GPUs, take a smaller model or raise gpu_memory_utilization"
        )

    def feasible(self, grouping: Grouping) -> bool:
        return all(self.layouts.serve(group) is not None for group in grouping)

    def evaluate(self, grouping: Grouping) -> Routing:
        if not self.feasible(grouping):
            return NOTHING
        return self.orchestrator.route(self.servers(grouping, "prefill"), self.servers(grouping, "decode"))

    def servers(self, grouping: Grouping, role: Role) -> list[Server]:
        servers = (self.layouts.serve(group) for group in grouping if group.role == role)
        return [server for server in servers if server is not None]

    def candidate(self, grouping: Grouping, routing: Routing) -> Candidate:
        return _candidate(self._replicas(grouping), routing)

    def _replicas(self, grouping: Grouping) -> list[Replica]:
        """Named and on GPUs of their own: each machine's are dealt out in order."""
        left = [iter(gpus) for gpus in self._free]
        numbers = {"prefill": 0, "decode": 0}
        replicas = []
        for counts, role in grouping:
            server = self.layouts.serve(Group(counts, role))
            assert server is not None
            mine = {
                node.name: iter([next(gpus) for _ in range(count)])
                for node, gpus, count in zip(self.problem.cluster.nodes, left, counts, strict=True)
            }
            name = f"{role}{numbers[role]}"
            numbers[role] += 1
            stages = []
            for number, stage in enumerate(server.stages):
                source = mine[self.problem.cluster.node(stage.gpus[0]).name]
                gpus = tuple(next(source) for _ in stage.gpus)
                stages.append(replace(stage, name=f"{name}.{number}", gpus=gpus))
            replicas.append(Replica(name=name, role=role, stages=tuple(stages)))
        return replicas


class Survivors:
    """Replicas that keep their stages, and take either phase."""

    def __init__(self, problem: Problem, transfer: Quantized, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self._layouts = Layouts(problem, Sample.of(problem))
        self.orchestrator = Orchestrator(self._layouts, transfer)

    def start(self) -> list[tuple[Role, ...]]:
        """The roles they have; if those are all the same, each in turn takes the other."""
        if len(self.replicas) < 2:
            raise InfeasibleError(
                f"plan: {len(self.replicas)} of its replicas have all their GPUs; two phases need two, so plan anew"
            )
        roles = tuple(replica.role for replica in self.replicas)
        if set(roles) == {"prefill", "decode"}:
            return [roles]
        count = len(roles)
        return [tuple("prefill" if place == turn else "decode" for place in range(count)) for turn in range(count)]

    def evaluate(self, roles: tuple[Role, ...]) -> Routing:
        by_role = self._servers(roles)
        return NOTHING if by_role is None else self.orchestrator.route(by_role["prefill"], by_role["decode"])

    def expected(self, roles: tuple[Role, ...], shares: Floats) -> Routing | None:
        """Of these shares (prefill by decode replicas); None if a replica has no room."""
        by_role = self._servers(roles)
        if by_role is None:
            return None
        prefills, decodes = by_role["prefill"], by_role["decode"]
        ways = self.orchestrator.ways(prefills, decodes)
        best = self.orchestrator.headroom(prefills, decodes, ways)
        served = min(1.0, best.headroom)
        return self.orchestrator.predict(prefills, decodes, ways, shares, served, best.headroom, best.binds)

    def _servers(self, roles: tuple[Role, ...]) -> dict[str, list[Server]] | None:
        servers = [self._layouts.of_replica(r, role) for r, role in zip(self.replicas, roles, strict=True)]
        if any(server is None for server in servers):
            return None
        return {
            want: [s for s, role in zip(servers, roles, strict=True) if role == want and s is not None]
            for want in ("prefill", "decode")
        }

    def candidate(self, roles: tuple[Role, ...], routing: Routing) -> Candidate:
        return _candidate([replace(r, role=role) for r, role in zip(self.replicas, roles, strict=True)], routing)


def _candidate(replicas: Sequence[Replica], routing: Routing) -> Candidate:
    """Rows and columns of the routing are the prefill and the decode replicas, in this order."""
    names = {role: [replica.name for replica in replicas if replica.role == role] for role in ("prefill", "decode")}
    places = [
        (i, j, pair) for i, p in enumerate(names["prefill"]) for j, pair in enumerate((p, d) for d in names["decode"])
    ]
    known = routing.shares.size > 0
    return Candidate(
        plan=Plan(
            replicas=tuple(replicas),
            shares={
                pair: float(routing.shares[i, j]) for i, j, pair in places if known and routing.shares[i, j] > 1e-9
            },
        ),
        attainment=routing.attainment,
        served=routing.served,
        headroom=routing.headroom,
        pair_scores={pair: float(routing.pair_scores[i, j]) for i, j, pair in places if known},
        bottleneck=routing.binds,
    )
