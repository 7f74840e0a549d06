"""Helix (ASPLOS 2025; arXiv 2406.01566): a path of machines for every request, along the max-flow of the placement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sim.batchers import Passing
from sim.planners.helix import END, MOVES, HelixPlacement, Placement
from sim.policy import ReplicaView, RequestView, System, View
from sim.reschedulers import RestorePlan
from sim.transfers import Whole
from sim.types import ConfigError, Plan, Reject, Route

Routing = Literal["flow", "random", "shortest-queue"]
LEAST_SHARE = 0.05
"""Of a node's flow: edges with less are left out, as in the artifact."""


@dataclass(slots=True)
class Onward:
    """Where a node may send, and the tokens sent so far over each edge, in shares of its flow."""

    flow: Mapping[str, float]
    load: dict[str, float]


class AlongFlow:
    """Each next node by interleaved weighted round robin over the flow's edges (section 5 of the paper).

    Node by node the edge whose load, the request's tokens added, would be the smallest share of its flow; edges whose
    KV is expected to be fuller than ``high_water`` are passed over while another is left. Expected are the prompt and
    ``output_ratio`` of the predicted answer. Loads count a request's prompt and predicted answer when it is routed,
    where Helix adds a token at a time. ``routing`` random and shortest-queue are the paper's ablations.
    """

    def __init__(self, routing: Routing = "flow", high_water: float = 0.9, output_ratio: float = 0.6) -> None:
        self.routing = routing
        self.high_water = high_water
        self.output_ratio = output_ratio
        self._seen: tuple[Plan | None, tuple[str, ...]] = (None, ())
        self._onward: dict[str, Onward] = {}
        self._expected: dict[str, int] = defaultdict(int)
        self._reserved: dict[int, list[tuple[str, int]]] = {}
        """By request, the KV it is expected to fill along its path: (replica, tokens times layers)."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        up = {replica.name: replica for replica in view.replicas}
        if (view.plan, tuple(up)) != self._seen:
            self._look(view.plan, up)
        if END not in self._onward:
            return Reject("no chain of nodes that are up holds all layers")
        ends = {replica.name: replica.stages[0].end_layer for replica in view.plan.replicas}
        at, layer, path, places = END, 0, [], []
        while True:
            at = self._next(at, layer, request, up, ends, view)
            path.append(at)
            places.append((at, self._tokens(request) * (ends[at] - layer)))
            layer = ends[at]
            if layer == view.problem.model.num_layers:
                break
        for name, amount in places:
            self._expected[name] += amount
        self._reserved[request.id] = places
        leg = tuple(stage for name in path for stage in up[name].leg)
        return Route(leg, leg)

    def finished(self, request: RequestView) -> None:
        for name, amount in self._reserved.pop(request.id):
            self._expected[name] -= amount

    def _tokens(self, request: RequestView) -> int:
        return request.input_tokens + round(self.output_ratio * request.predicted_output_tokens)

    def _next(
        self,
        at: str,
        layer: int,
        request: RequestView,
        up: Mapping[str, ReplicaView],
        ends: Mapping[str, int],
        view: View,
    ) -> str:
        onward = self._onward[at]
        names = list(onward.flow)
        roomy = [name for name in names if self._has_room(up[name], self._tokens(request) * (ends[name] - layer), view)]
        names = roomy or names
        if self.routing == "random":
            return names[int(view.rng.integers(len(names)))]
        if self.routing == "shortest-queue":
            return min(names, key=lambda name: up[name].num_waiting + up[name].num_running)
        tokens = request.input_tokens + request.predicted_output_tokens
        best = min(names, key=lambda name: onward.load[name] + tokens / onward.flow[name])
        onward.load[best] += tokens / onward.flow[best]
        return best

    def _has_room(self, replica: ReplicaView, amount: int, view: View) -> bool:
        stage = next(spec.stages[0] for spec in view.plan.replicas if spec.name == replica.name)
        most = self.high_water * replica.total_blocks * replica.block_size * stage.num_layers
        return self._expected[replica.name] + amount <= most

    def _look(self, plan: Plan, up: Mapping[str, ReplicaView]) -> None:
        """The edges between nodes that are up and from which the last layer can still be reached."""
        edges = _usable(plan.flows or _all_edges(plan), up)
        if END not in edges:  # the flow's chains are broken: any other will do
            edges = _usable(_all_edges(plan), up)
        self._seen = (plan, tuple(up))
        self._onward = {name: Onward(flow, dict.fromkeys(flow, 0.0)) for name, flow in edges.items()}


def _usable(flows: Mapping[tuple[str, str], float], up: Mapping[str, ReplicaView]) -> dict[str, dict[str, float]]:
    """By node: the flow to each next one; without edges of a small share of the node's flow, where others stay."""
    total: dict[str, float] = defaultdict(float)
    for (source, _), flow in flows.items():
        total[source] += flow
    reach = _reaching(flows, up)
    edges: dict[str, dict[str, float]] = {}
    for (source, target), flow in flows.items():
        if target != END and target in reach and (source == END or source in up):
            edges.setdefault(source, {})[target] = flow
    for source, row in edges.items():
        large = {target: flow for target, flow in row.items() if flow >= LEAST_SHARE * total[source]}
        edges[source] = large or row
    return edges


def _reaching(flows: Mapping[tuple[str, str], float], up: Mapping[str, ReplicaView]) -> set[str]:
    """Nodes that are up and from which a flow leads to the end."""
    reach = {source for source, target in flows if target == END and source in up}
    while True:
        more = {source for source, target in flows if target in reach and source in up} - reach
        if not more:
            return reach
        reach |= more


def _all_edges(plan: Plan) -> dict[tuple[str, str], float]:
    """Every edge that the layers allow, alike."""
    stages = [(replica.name, replica.stages[0]) for replica in plan.replicas]
    last = max(stage.end_layer for _, stage in stages)
    edges = {(END, name): 1.0 for name, stage in stages if stage.first_layer == 0}
    edges |= {(name, END): 1.0 for name, stage in stages if stage.end_layer == last}
    return edges | {
        (a, b): 1.0 for a, one in stages for b, two in stages if two.first_layer <= one.end_layer < two.end_layer
    }


def helix(
    placement: Placement = "helix",
    routing: Routing = "flow",
    tp: int | None = None,
    moves: int = MOVES,
    weight_share: float = 0.5,
    max_prompts: int = 3,
    high_water: float = 0.9,
    output_ratio: float = 0.6,
) -> System:
    """Helix: layers over unequal machines for the largest flow; every request takes its own path along that flow.

    A node is a machine (``tp``: so many of its GPUs). ``placement``: for the flow, with layers up to ``weight_share``
    of the memory and a search of so many ``moves``; or petals, swarm, separate (pipelines). ``routing``: along the
    flow, random, or to the shortest queue. A batch has up to ``max_prompts`` prompts. KV stays where it is.
    """
    if routing not in ("flow", "random", "shortest-queue"):
        raise ConfigError(f"system.routing is {routing!r}; helix has flow, random, shortest-queue")
    for name, share in (("weight_share", weight_share), ("high_water", high_water), ("output_ratio", output_ratio)):
        if not 0 < share <= 1:
            raise ConfigError(f"system.{name} is {share}; it must be above 0 and at most 1")
    if max_prompts < 1 or moves < 0:
        raise ConfigError(f"system.max_prompts is {max_prompts} (at least 1), system.moves {moves} (at least 0)")
    return System(
        name="helix",
        mirrors="Helix (ASPLOS 2025), by its artifact's simulator and prototype",
        planner=HelixPlacement(placement=placement, tp=tp, moves=moves, weight_share=weight_share),
        router=lambda: AlongFlow(routing, high_water, output_ratio),
        batcher=lambda role: Passing(max_prompts),
        transfer=Whole,
        rescheduler=RestorePlan,
    )
