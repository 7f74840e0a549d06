"""HexGen-2's planner (ICLR 2025; arXiv 2502.07903): partition the GPUs, choose types by cut weight, route by max-flow.

Start with ``HexGen2``. The outline is the abstract's: graph partition, max-flow, iterative edge swaps. Ours is what
the text available to us leaves open: spectral bisection instead of k-means (which cannot part the GPUs of a machine,
since they are alike), the balance of types by what they can compute, and which swaps are tried. Groups are laid out
and priced as ThunderServe's are; KV is sent as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.planners.thunderserve.groups import Counts, Group, Grouping, canonical, has_both_phases
from sim.planners.thunderserve.orchestrate import NOTHING, Ways
from sim.planners.thunderserve.replay import Floats, Server
from sim.planners.thunderserve.tabu import KEPT, LogRow, Search
from sim.planners.thunderserve.world import Candidate, World
from sim.policy import Problem
from sim.transfers import Quantized
from sim.types import InfeasibleError, Plan, Role

UNITS = 1000
"""Of flow per request: flows are whole numbers."""
MOST_UNITS = 2**31 - 1
UNDERUSED = 0.9
"""Part of its capacity below which a group could give something away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HexGen2:
    """``patience``: rounds of swaps without gain; ``guided``: swaps look at what is saturated, else any at random."""

    period_s: float = 600.0
    patience: int = 20
    guided: bool = True

    def plan(self, problem: Problem) -> Plan:
        return self.search(problem).best.plan

    def search(self, problem: Problem, *, progress: Callable[[int, float], None] | None = None) -> Search:
        """The groupings on the way, best flow first. ``InfeasibleError`` says what is missing."""
        started_s = time.perf_counter()
        network = Network(problem, self.period_s)
        rng = np.random.default_rng(np.random.SeedSequence(problem.seed).spawn(5)[4])
        best = types(network, partition(network))
        flow = network.flow(best)
        known = {best: flow}
        log = [LogRow(0, 0, time.perf_counter() - started_s, "partition", flow.value, flow.value)]
        idle = step = 0
        while idle < self.patience:
            step, idle = step + 1, idle + 1
            found = swapped(best, flow, rng, self.guided)
            if found is None or found[1] in known or not network.world.feasible(found[1]):
                continue
            move, grouping = found
            known[grouping] = network.flow(grouping)
            if known[grouping].value > flow.value * (1 + 1e-9):
                best, flow, idle = grouping, known[grouping], 0
            log.append(LogRow(step, len(log), time.perf_counter() - started_s, move, known[grouping].value, flow.value))
            if progress is not None:
                progress(step, flow.value)
        if not flow.value:
            raise InfeasibleError(
                "cluster.links: no KV flows from any prefill to any decode group; give the machines bandwidth"
            )
        ranked = sorted(known, key=lambda grouping: known[grouping].value, reverse=True)[:KEPT]
        candidates = tuple(network.candidate(grouping, known[grouping]) for grouping in ranked)
        return Search(candidates=candidates, log=tuple(log), elapsed_s=time.perf_counter() - started_s)


# ---------------------------------------------------------------- the flow network


class Flow(NamedTuple):
    """``value``: requests that flow, in multiples of the rate. By group: what flows over what it could take."""

    value: float
    shares: Floats
    prefill_use: Floats
    decode_use: Floats
    link_use: Floats

    @property
    def use(self) -> Floats:
        return np.concatenate((self.prefill_use, self.decode_use))


def max_flow(prefill_caps: Floats, decode_caps: Floats, pair_caps: Floats) -> Floats:
    """Requests over each (prefill, decode) pair at the largest flow; capacities in requests, to a ``UNITS``-th.

    source -> prefill groups -> decode groups -> sink; a group's capacity is that of its edge to source or sink.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    m, n = pair_caps.shape
    graph = np.zeros((m + n + 2, m + n + 2))
    graph[0, 1 : m + 1] = prefill_caps
    graph[1 : m + 1, m + 1 : -1] = pair_caps
    graph[m + 1 : -1, -1] = decode_caps
    units = np.floor(np.minimum(graph * UNITS, MOST_UNITS // (m + n))).astype(np.int32)
    flow = maximum_flow(csr_array(units), 0, m + n + 1).flow.toarray()
    pairs: Floats = np.maximum(flow[1 : m + 1, m + 1 : -1], 0) / UNITS
    return pairs


class Network:
    """Prices groupings by the flow through them."""

    def __init__(self, problem: Problem, period_s: float) -> None:
        self.problem = problem
        self.world = World(problem, Quantized(bits=16))
        self.period_s = period_s
        self.machine_rates = _machine_rates(problem)

    def flow(self, grouping: Grouping) -> Flow:
        prefills, decodes, ways = self._parts(grouping)
        requests = self.period_s * self.problem.workload.rate_per_s
        mu = self.world.orchestrator.capacities(prefills) * requests
        nu = self.world.orchestrator.capacities(decodes) * requests
        sent_bytes = self.world.orchestrator.links.sent_bytes.mean()
        with np.errstate(divide="ignore"):
            pair_caps = np.where(
                ways.bytes_per_s > 0, self.period_s / (ways.latency_s + sent_bytes / ways.bytes_per_s), 0.0
            )
        pairs = max_flow(mu, nu, pair_caps)
        total = float(pairs.sum())
        return Flow(
            value=total / requests,
            shares=pairs / total if total else pairs,
            prefill_use=pairs.sum(axis=1) / mu,
            decode_use=pairs.sum(axis=0) / nu,
            link_use=pairs / np.where(pair_caps > 0, pair_caps, 1.0),
        )

    def _parts(self, grouping: Grouping) -> tuple[list[Server], list[Server], Ways]:
        prefills, decodes = self.world.servers(grouping, "prefill"), self.world.servers(grouping, "decode")
        return prefills, decodes, self.world.orchestrator.ways(prefills, decodes)

    def capability(self, grouping: Grouping) -> float:
        """What the weaker of the two types can compute, in multiples of the rate."""
        orchestrator = self.world.orchestrator
        return min(
            float(orchestrator.capacities(self.world.servers(grouping, role)).sum()) for role in ("prefill", "decode")
        )

    def candidate(self, grouping: Grouping, flow: Flow) -> Candidate:
        """With the attainment that ThunderServe's replay predicts for these shares."""
        if not flow.value:
            return self.world.candidate(grouping, NOTHING)
        prefills, decodes, ways = self._parts(grouping)
        served, binds = min(1.0, flow.value), _bottleneck(flow, prefills, decodes)
        headroom = self.capability(grouping)
        routing = self.world.orchestrator.predict(prefills, decodes, ways, flow.shares, served, headroom, binds)
        return self.world.candidate(grouping, routing)


def _bottleneck(flow: Flow, prefills: Sequence[Server], decodes: Sequence[Server]) -> str:
    """What is saturated first; prefill before decode before links."""
    for role, use, servers in (("prefill", flow.prefill_use, prefills), ("decode", flow.decode_use, decodes)):
        if use.min() > 1 - 1e-3:
            place = int(use.argmax())
            return f"every {role} group, first {servers[place].weakest.format(name=f'{role}{place}')}"
    i, j = np.unravel_index(int(flow.link_use.argmax()), flow.link_use.shape)
    return f"link prefill{i} > decode{j}"


def _machine_rates(problem: Problem) -> Floats:
    """Bytes/s from a GPU of one machine to a GPU of another, or of the same (0 where it has one GPU only)."""
    rates = problem.cluster.bandwidth_matrix_bytes_per_s()
    ids = problem.cluster.gpu_ids
    first = [ids.index(node.gpu_ids[0]) for node in problem.cluster.nodes]
    last = [ids.index(node.gpu_ids[-1]) for node in problem.cluster.nodes]
    one_way = rates[np.ix_(first, last)]
    between = np.minimum(one_way, one_way.T)
    return np.where(np.isfinite(between), between, 0.0)


# ---------------------------------------------------------------- step 1: groups


def partition(network: Network) -> list[Counts]:
    """As many groups as memory allows of about the same memory, with fast links inside; each holds the model."""
    problem, layouts = network.problem, network.world.layouts
    nodes = problem.cluster.nodes
    need = problem.model.weight_bytes(0, problem.model.num_layers)
    need += layouts.sample.longest_tokens * problem.model.kv_bytes_per_token()
    usable = sum(node.count * node.gpu.memory_bytes for node in nodes) * problem.limits.gpu_memory_utilization
    machines = np.repeat(np.arange(len(nodes)), [node.count for node in nodes])
    for groups in range(int(usable // need), 1, -1):
        parts = [_counted(part, len(nodes)) for part in _bisected(network, machines, groups)]
        if all(map(layouts.holds, parts)):
            return refined(parts, network.machine_rates, layouts.holds)
    raise InfeasibleError(network.world.no_room())


def _counted(machines: NDArray[np.int64], count: int) -> Counts:
    return tuple(np.bincount(machines, minlength=count).tolist())


def _bisected(network: Network, machines: NDArray[np.int64], groups: int) -> list[NDArray[np.int64]]:
    """Spectral bisection, recursively: GPUs in the order of the Fiedler vector, cut where the fewest links are lost.

    A cut gives either side as many groups as its memory is worth; of the cuts in the middle half the cheapest is taken,
    and of those the most even one.
    """
    if groups == 1 or len(machines) < groups:
        return [machines, *[machines[:0]] * (groups - 1)]  # too few GPUs: the empty groups hold nothing
    weights = network.machine_rates[np.ix_(machines, machines)]
    order = np.argsort(np.round(_fiedler(weights), 9), kind="stable")
    machines, weights = machines[order], weights[np.ix_(order, order)]
    memory = np.cumsum([network.problem.cluster.nodes[machine].gpu.memory_bytes for machine in machines.tolist()])
    share = memory[:-1] / memory[-1]
    lost = np.array([weights[:cut, cut:].sum() for cut in range(1, len(machines))])
    uneven = np.abs(share * groups - np.round(share * groups)) + np.abs(share - 0.5)
    middle = np.abs(share - 0.5) <= np.maximum(0.25, np.abs(share - 0.5).min())
    cut = 1 + int(np.lexsort((uneven, np.where(middle, lost, np.inf)))[0])
    left = min(max(1, round(groups * float(share[cut - 1]))), groups - 1)
    return [*_bisected(network, machines[:cut], left), *_bisected(network, machines[cut:], groups - left)]


def _fiedler(weights: Floats) -> Floats:
    """The eigenvector of the second smallest eigenvalue of the normalised Laplacian."""
    weights = weights.copy()
    np.fill_diagonal(weights, 0.0)
    weights = np.maximum(weights, 1e-9 * max(float(weights.max()), 1.0))
    scale = 1 / np.sqrt(weights.sum(axis=1))
    laplacian = np.eye(len(weights)) - weights * scale[:, None] * scale[None, :]
    vector: Floats = np.linalg.eigh(laplacian)[1][:, min(1, len(weights) - 1)] * scale
    place = int(np.argmax(np.abs(vector)))
    return vector if vector[place] >= 0 else -vector


def inside(part: Counts, rates: Floats) -> float:
    """Link weight between the GPUs of a group; more inside is less cut."""
    counts = np.array(part, dtype=float)
    return float(counts @ rates @ counts - counts @ np.diag(rates)) / 2


def refined(parts: list[Counts], rates: Floats, holds: Callable[[Counts], bool]) -> list[Counts]:
    """Kernighan and Lin's exchanges (1970), one at a time: GPUs of two groups change places while that cuts less."""
    parts = list(parts)
    gained = True
    while gained:
        gained = False
        for a, b in combinations(range(len(parts)), 2):
            exchange = _best_exchange(parts[a], parts[b], rates, holds)
            if exchange is not None:
                parts[a], parts[b] = exchange
                gained = True
    return parts


def _best_exchange(
    a: Counts, b: Counts, rates: Floats, holds: Callable[[Counts], bool]
) -> tuple[Counts, Counts] | None:
    now = inside(a, rates) + inside(b, rates)
    ways = []
    for x in np.flatnonzero(a).tolist():
        for y in np.flatnonzero(b).tolist():
            if x != y:
                one, other = shifted(a, x, -1, y), shifted(b, y, -1, x)
                ways.append((inside(one, rates) + inside(other, rates), one, other))
    for value, one, other in sorted(ways, reverse=True):
        if value <= now * (1 + 1e-9):
            return None
        if holds(one) and holds(other):
            return one, other
    return None


def shifted(part: Counts, machine: int, by: int, back: int | None = None) -> Counts:
    """So many GPUs of a machine more, and as many of another less."""
    counts = list(part)
    counts[machine] += by
    if back is not None:
        counts[back] -= by
    return tuple(counts)


# ---------------------------------------------------------------- step 2: types


def types(network: Network, parts: Sequence[Counts]) -> Grouping:
    """Prefill and decode, so that both can compute about as much and the links between them weigh most."""
    order = network.world.by_intensity(parts)
    starts = [
        canonical(Group(part, "prefill" if place < cut else "decode") for place, part in enumerate(order))
        for cut in range(1, len(order))
    ]
    best = max(starts, key=network.capability)
    least, weight = network.capability(best), between(best, network.machine_rates)
    while True:
        exchanges = (_exchanged(best, i, j) for i, j in combinations(range(len(best)), 2))
        better = [
            (between(grouping, network.machine_rates), grouping)
            for grouping in exchanges
            if between(grouping, network.machine_rates) > weight * (1 + 1e-9) and network.capability(grouping) >= least
        ]
        if not better:
            return best
        weight, best = max(better)


def between(grouping: Grouping, rates: Floats) -> float:
    """Link weight between the two types."""
    total = {
        role: np.sum([group.counts for group in grouping if group.role == role], axis=0)
        for role in ("prefill", "decode")
    }
    return float(total["prefill"] @ rates @ total["decode"])


def _exchanged(grouping: Grouping, i: int, j: int) -> Grouping:
    groups = list(grouping)
    roles: tuple[Role, Role] = groups[j].role, groups[i].role
    groups[i], groups[j] = groups[i]._replace(role=roles[0]), groups[j]._replace(role=roles[1])
    return canonical(groups)


# ---------------------------------------------------------------- step 3: swaps


def swapped(
    grouping: Grouping, flow: Flow, rng: np.random.Generator, guided: bool = True
) -> tuple[str, Grouping] | None:
    """One swap between a saturated and an underused group: GPUs, one GPU, their types, or the latter's type alone."""
    groups = [group for role in ("prefill", "decode") for group in grouping if group.role == role]
    use = flow.use
    full = np.flatnonzero(use >= 1 - 1e-3) if guided else np.arange(len(groups))
    idle = np.flatnonzero(use < UNDERUSED) if guided else np.arange(len(groups))
    if not len(full) or not len(idle):
        full = idle = np.arange(len(groups))
    a, b = int(rng.choice(full)), int(rng.choice(idle))
    if a == b:
        return None
    move = ("exchange", "give", "types", "flip")[int(rng.integers(4))]
    x, y = (int(rng.choice(np.flatnonzero(groups[place].counts))) for place in (a, b))
    if move == "flip":
        groups[b] = groups[b].flipped
    elif move == "types":
        roles: tuple[Role, Role] = groups[b].role, groups[a].role
        groups[a], groups[b] = groups[a]._replace(role=roles[0]), groups[b]._replace(role=roles[1])
    else:
        back = x if move == "exchange" else None
        groups[a] = groups[a]._replace(counts=shifted(groups[a].counts, y, 1, back))
        groups[b] = groups[b]._replace(counts=shifted(groups[b].counts, y, -1, back))
        if not any(groups[b].counts):
            groups.pop(b)
    return (move, canonical(groups)) if has_both_phases(groups) else None
