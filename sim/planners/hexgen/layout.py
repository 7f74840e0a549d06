"""How a group of GPUs becomes a pipeline: asymmetric tensor parallelism inside machines, layers by what a stage can do.

HexGen tries every way to cut each machine's GPUs into tensor-parallel groups (``TP_DEGREES``); its scripts give all
stages as many layers, moved by a number that the search mutates. Ours gives each stage the layers that make the slowest
one fastest, which needs no such number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

from sim.cluster import Node
from sim.cost import seconds
from sim.memory import kv_bytes_available
from sim.planners.hexgen.cost import Costs, Wire
from sim.policy import Problem
from sim.types import Stage, Work

TP_DEGREES = (8, 4, 2, 1)
MOST_CUTS = 3000
"""Ways to cut a group; beyond, each machine's GPUs are in groups of one size."""

LAYERS = 8
"""Whose time is divided, for that of one."""

Counts = tuple[int, ...]
"""GPUs of each machine of the cluster, in its order."""


class Part(NamedTuple):
    """A stage to be: a tensor-parallel group on one machine."""

    machine: int
    tp: int


class Layout(NamedTuple):
    """Stages with their layers; ``latency_s``: of a request alone."""

    cut: tuple[Part, ...]
    layers: tuple[int, ...]
    latency_s: float


class Layouts:
    """Lays out groups of one problem, each once. ``asymmetric``: stages may differ in GPUs and layers; ``by_model``:
    a layer takes what the problem's latency model says, else what the paper's formulas say."""

    def __init__(self, problem: Problem, costs: Costs, *, asymmetric: bool = True, by_model: bool = True) -> None:
        self.problem = problem
        self.costs = costs
        self.asymmetric = asymmetric
        self.by_model = by_model
        self.nodes: Sequence[Node] = problem.cluster.nodes
        self.best = cache(self._best)
        self._fits = cache(self._most_layers)
        self._wire = cache(self._between)
        self._layer_s = cache(self._seconds_of_a_layer)
        self._hop_s = cache(self._seconds_of_a_hop)

    def _best(self, counts: Counts) -> Layout | None:
        """The layout of the lowest latency; None if none holds the model."""
        found = (self.priced(parts) for parts in self.cuts(counts))
        return min((one for one in found if one is not None), key=lambda one: (one.latency_s, one.cut), default=None)

    def cuts(self, counts: Counts) -> Iterator[tuple[Part, ...]]:
        """Tensor-parallel groups in the order of the machines."""
        machines = [(machine, count) for machine, count in enumerate(counts) if count]
        if not self.asymmetric:
            for tp in TP_DEGREES:
                if all(count % tp == 0 for _, count in machines):
                    yield tuple(Part(machine, tp) for machine, count in machines for _ in range(count // tp))
            return
        ways = [[[Part(machine, tp) for tp in cut] for cut in parts(count)] for machine, count in machines]
        if prod(map(len, ways)) > MOST_CUTS:
            ways = [[cut for cut in way if len(set(cut)) == 1] or way[:1] for way in ways]
        for chosen in product(*ways):
            yield tuple(part for cut in chosen for part in cut)

    # ------------------------------------------------------------ price

    def priced(self, cut: tuple[Part, ...]) -> Layout | None:
        num_layers = self.problem.model.num_layers
        if not cut or len(cut) > num_layers:
            return None
        most = [self._fits(part, place == 0, place == len(cut) - 1) for place, part in enumerate(cut)]
        output = self.costs.output_tokens
        whole_s = [self._layer_s(part, self.costs.input_tokens, 1) + output * self._layer_s(part, 1, 1) for part in cut]
        layers = shared_out(num_layers, whole_s, most, even=not self.asymmetric)
        if layers is None:
            return None
        bare = Layout(cut, tuple(layers), 0.0)
        return bare._replace(latency_s=self.prefill_s(bare) + output * self.step_s(bare, 1))

    def prefill_s(self, layout: Layout) -> float:
        return self._pass_s(layout, self.costs.input_tokens, 1)

    def step_s(self, layout: Layout, batch: int) -> float:
        """A token of each of ``batch`` requests, through all stages."""
        return self._pass_s(layout, 1, batch)

    def stages_s(self, layout: Layout) -> list[float]:
        """Of a prompt on each stage."""
        stages = zip(layout.cut, layout.layers, strict=True)
        return [layers * self._layer_s(part, self.costs.input_tokens, 1) for part, layers in stages]

    def _pass_s(self, layout: Layout, tokens: int, batch: int) -> float:
        stages = zip(layout.cut, layout.layers, strict=True)
        inside_s = sum(layers * self._layer_s(part, tokens, batch) for part, layers in stages)
        hops = zip(layout.cut, layout.cut[1:], strict=False)
        return inside_s + sum(self._hop_s(here, there, tokens, batch) for here, there in hops)

    def room(self, layout: Layout, most: int) -> int:
        """Requests at once, a power of two and ``most`` at the most, by memory."""
        ends = list(accumulate(layout.layers))
        batch = 1
        while 2 * batch <= most and all(
            self.holds(part, end - layers, end, 2 * batch)
            for part, layers, end in zip(layout.cut, layout.layers, ends, strict=True)
        ):
            batch *= 2
        return batch

    def _seconds_of_a_layer(self, part: Part, tokens: int, batch: int) -> float:
        node, costs, model = self.nodes[part.machine], replace(self.costs, batch=batch), self.problem.model
        if self.by_model:
            begin, layers = (1, min(LAYERS, model.num_layers - 2)) if model.num_layers > 2 else (0, model.num_layers)
            stage = Stage(name="trial", gpus=node.gpu_ids[: part.tp], first_layer=begin, end_layer=begin + layers)
            context = costs.input_tokens + costs.output_tokens // 2
            work = Work(((tokens, 0),) * batch, 0, 0) if tokens > 1 else Work((), batch, batch * context)
            return seconds(self.problem.cost.bind(model, stage, self.problem.cluster), work) / layers
        found_s = costs.compute_s(tokens, part.tp, node.gpu.flops_for(model.dtype), node.gpu.bandwidth_bytes_per_s)
        if part.tp > 1:
            found_s += costs.collectives_s(tokens, part.tp, self._wire(part.machine, part.machine))
        return found_s

    def _seconds_of_a_hop(self, here: Part, there: Part, tokens: int, batch: int) -> float:
        next_wire = self._wire(there.machine, there.machine) if there.tp > 1 else None
        wire = self._wire(here.machine, there.machine)
        return replace(self.costs, batch=batch).hop_s(tokens, wire, there.tp, next_wire)

    def _between(self, a: int, b: int) -> Wire:
        cluster = self.problem.cluster
        path = cluster.path(self.nodes[a].gpu_ids[:1], self.nodes[b].gpu_ids[-1:])
        return Wire(path.latency_s, path.bytes_per_s(cluster.capacity_bytes_per_s))

    # ------------------------------------------------------------ memory

    def _most_layers(self, part: Part, first: bool, last: bool) -> int:
        """That it holds beside one request; 0 if none."""
        num_layers = self.problem.model.num_layers
        for layers in range(num_layers - (not (first and last)), 0, -1):
            begin = 0 if first else num_layers - layers if last else 1
            if self.holds(part, begin, begin + layers, 1):
                return layers
        return 0

    def holds(self, part: Part, begin: int, end: int, batch: int) -> bool:
        """Whether so many requests have room beside these layers: by the paper's account, and by the engine's."""
        problem, node = self.problem, self.nodes[part.machine]
        costs = replace(self.costs, batch=batch)
        if costs.memory_bytes(end - begin, part.tp) > node.gpu.memory_bytes * problem.limits.gpu_memory_utilization:
            return False
        stage = Stage(name="trial", gpus=node.gpu_ids[: part.tp], first_layer=begin, end_layer=end)
        tokens = batch * (costs.input_tokens + costs.output_tokens) * (end - begin)
        kv_bytes = tokens * problem.model.kv_bytes_per_token_layer_gpu(part.tp)
        return kv_bytes_available(problem, stage, problem.limits) >= kv_bytes


@cache
def parts(count: int, most: int = TP_DEGREES[0]) -> tuple[tuple[int, ...], ...]:
    """All ways to write a count as a falling sum of ``TP_DEGREES``: 4 is 4, 2+2, 2+1+1, 1+1+1+1."""
    if not count:
        return ((),)
    degrees = [tp for tp in TP_DEGREES if tp <= min(count, most)]
    return tuple((tp, *rest) for tp in degrees for rest in parts(count - tp, tp))


def shared_out(layers: int, layer_s: Sequence[float], most: Sequence[int], *, even: bool = False) -> list[int] | None:
    """Layers of each stage, so that the slowest takes least; alike if ``even``. None if they do not fit."""
    stages = len(layer_s)
    if min(most) < 1 or sum(most) < layers or stages > layers:
        return None
    if even:
        alike = [layers // stages + (place < layers % stages) for place in range(stages)]
        return alike if all(n <= m for n, m in zip(alike, most, strict=True)) else None
    found = [1] * stages
    heap = [(2 * layer_s[place], place) for place in range(stages) if most[place] > 1]
    heapify(heap)
    for _ in range(layers - stages):
        _, place = heappop(heap)
        found[place] += 1
        if found[place] < most[place]:
            heappush(heap, ((found[place] + 1) * layer_s[place], place))
    return found
