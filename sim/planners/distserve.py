"""DistServe's placement (OSDI 2024, section 4, algorithms 1 and 2): tensor and pipeline degrees by simulated goodput.

A ``Unit`` is what is simulated as one: a prefill instance, a decode instance, a pair of both, or a colocated instance.
A ``Judge`` says whether a unit attains the SLO at a rate; whoever builds the planner gives it, so nothing here knows
the engine. Start with ``DistServe`` and ``BestColocated``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import ceil
from typing import Any, Literal, NamedTuple

from sim.goodput import bisected_rate, bracketing, halving
from sim.memory import kv_blocks
from sim.planners.pools import Colocated, Pool, Split, evenly
from sim.policy import Problem
from sim.types import ConfigError, Plan, Replica, Role

Affinity = Literal["high", "low"]
Count = Literal["fill", "rate"]


class Shape(NamedTuple):
    """Degrees of tensor and pipeline parallelism of an instance."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp


class Unit(NamedTuple):
    """Instances that are simulated together; a pair lies stage by stage on ``nodes`` machines."""

    prefill: Shape | None = None
    decode: Shape | None = None
    mixed: Shape | None = None
    nodes: int = 1

    @property
    def parts(self) -> dict[Role, Shape]:
        roles: tuple[tuple[Role, Shape | None], ...] = (
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("mixed", self.mixed),
        )
        return {role: shape for role, shape in roles if shape is not None}

    @property
    def gpus(self) -> int:
        return sum(shape.gpus for shape in self.parts.values())


Judge = Callable[[Problem, Unit, float], bool]
"""Whether a unit attains the problem's SLO at so many requests/s."""


class Rated(NamedTuple):
    """A unit and the requests/s and GPU that it serves within the SLO."""

    unit: Unit
    per_gpu: float

    @property
    def rate_per_s(self) -> float:
        return self.per_gpu * self.unit.gpus


# ---------------------------------------------------------------- what can be placed


def machines(problem: Problem) -> tuple[int, int]:
    """(machines, GPUs of each). ``ConfigError`` unless all are alike: the algorithms know one kind."""
    nodes = problem.cluster.nodes
    if len({(node.gpu.name, node.count) for node in nodes}) != 1:
        kinds = ", ".join(f"{node.count} x {node.gpu.name}" for node in nodes)
        raise ConfigError(f"system.placement: needs equal machines, the cluster has {kinds}; state prefill and decode")
    return len(nodes), nodes[0].count


def shapes(problem: Problem, most_stages: int, most_gpus: int) -> list[Shape]:
    """Shapes of at most so many stages, and GPUs on one machine, that divide heads and layers and hold the model.

    They must hold the longest sampled request as well. If the latency model has measurements for some of them, the
    others are left out: to compare the two would be to compare latency models.
    """
    model = problem.model
    tensor = [tp for tp in range(1, most_gpus + 1) if model.num_attention_heads % tp == 0]
    pipeline = [pp for pp in range(1, most_stages + 1) if model.num_layers % pp == 0]
    fitting = [Shape(tp, pp) for tp, pp in product(tensor, pipeline) if _fits(problem, Shape(tp, pp))]
    measured = [shape for shape in fitting if _measured(problem, shape)]
    return measured or fitting


def _trial(problem: Problem, shape: Shape) -> Replica:
    """An instance of the shape, all stages on the first GPUs: for its memory and its price."""
    group = tuple(problem.cluster.nodes[0].gpu_ids[: shape.tp])
    return evenly(problem.model, "trial", "mixed", [group] * shape.pp)


def _fits(problem: Problem, shape: Shape) -> bool:
    longest = max(sum(lengths) for lengths in problem.workload.lengths)
    blocks = kv_blocks(problem, _trial(problem, shape).stages, problem.limits)
    return blocks * problem.limits.block_size >= longest


def _measured(problem: Problem, shape: Shape) -> bool:
    stage = _trial(problem, shape).stages[0]
    return problem.cost.bind(problem.model, stage, problem.cluster).measured


def instances(problem: Problem) -> list[Shape]:
    """Shapes of one instance that may span machines (algorithm 1), fewest GPUs first."""
    count, gpus = machines(problem)
    found = [shape for shape in shapes(problem, count * gpus, gpus) if ceil(shape.pp / (gpus // shape.tp)) <= count]
    return sorted(found, key=lambda shape: (shape.gpus, shape.tp))


def pairs(problem: Problem) -> list[Unit]:
    """Prefill and decode instances whose stages of the same layers share machines (algorithm 2), fewest GPUs first."""
    count, gpus = machines(problem)
    layers = problem.model.num_layers
    fitting = set(shapes(problem, count * gpus, gpus))
    found = []
    for nodes in (nodes for nodes in range(1, count + 1) if layers % nodes == 0):
        whole = [shape for shape in fitting if shape.pp % nodes == 0 and shape.gpus <= nodes * gpus]
        found += [
            Unit(prefill=prefill, decode=decode, nodes=nodes)
            for prefill, decode in product(whole, whole)
            if prefill.gpus + decode.gpus <= nodes * gpus
        ]
    return sorted(found, key=lambda unit: (unit.gpus, unit.nodes, unit.prefill, unit.decode))  # narrow TP first


# ---------------------------------------------------------------- the search


def best(rated: Sequence[Rated], what: str) -> Rated:
    """The highest goodput per GPU; of equal ones the fewest GPUs, then the first. ``ConfigError`` if none has any."""
    if not rated:
        raise ConfigError(f"system.placement: no {what} fits; add GPUs, or raise gpu_memory_utilization")
    found = max(rated, key=lambda one: (one.per_gpu, -one.unit.gpus))
    if not found.per_gpu:
        raise ConfigError(f"system.placement: no {what} attains the SLO at any rate; loosen slo, or add other GPUs")
    return found


@dataclass(slots=True, kw_only=True)
class Search:
    """Rates units and remembers what it has rated; on an ``executor`` all at the same time.

    Rates are found to ``tolerance``, a share of them; or, with ``width_per_gpu``, by halving 0 to ``most_per_gpu``
    until it is so narrow, as the released code does (0.25, which leaves many shapes equal).
    """

    judge: Judge
    most_per_gpu: float = 20.0
    tolerance: float = 0.05
    width_per_gpu: float | None = None
    executor: Executor | None = None
    done: Callable[[], None] = lambda: None
    _setting: tuple[Any, ...] = ()
    _known: dict[Unit, Rated] = field(default_factory=dict)

    def rate(self, problem: Problem, units: Sequence[Unit]) -> list[Rated]:
        """In the order of the units. ``done`` is called after each that was not known."""
        setting = (problem.model, problem.cluster, problem.cost, problem.slo, problem.limits, problem.workload.lengths)
        if self._setting != setting:
            self._setting, self._known = setting, {}
        todo = [unit for unit in dict.fromkeys(units) if unit not in self._known]
        call = partial(_rated, self.judge, problem, (self.most_per_gpu, self.tolerance, self.width_per_gpu))
        for rated in map(call, todo) if self.executor is None else self.executor.map(call, todo):
            self._known[rated.unit] = rated
            self.done()
        return [self._known[unit] for unit in units]


def _rated(judge: Judge, problem: Problem, setting: tuple[float, float, float | None], unit: Unit) -> Rated:
    most, tolerance, width = setting
    search = bracketing(most / 32, most, tolerance) if width is None else halving(0.0, most, width)
    return Rated(unit, bisected_rate(lambda rate: judge(problem, unit, rate * unit.gpus), search))


# ---------------------------------------------------------------- placement


class Placement(NamedTuple):
    """What a search chose: instances of either phase, or pairs (then both name the pair)."""

    prefill: Rated
    decode: Rated

    def counts(self, rate_per_s: float) -> tuple[int, int]:
        """Instances for a rate: the smallest numbers whose goodputs add up to it."""
        return ceil(rate_per_s / self.prefill.rate_per_s), ceil(rate_per_s / self.decode.rate_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServe:
    """Places prefill and decode instances for the highest goodput per GPU.

    ``affinity`` high (algorithm 1): both phases by themselves, anywhere, KV crossing machines. Low (algorithm 2): pairs
    whose KV stays inside machines. ``count``: as many as serve the workload's rate, or as the cluster holds (in the
    proportion that serves most).
    """

    search: Search
    affinity: Affinity = "high"
    count: Count = "fill"

    def placement(self, problem: Problem) -> Placement:
        if problem.slo.ttft_s is None or problem.slo.tpot_s is None:
            raise ConfigError("system.placement: it is searched for TTFT and TPOT; set slo.ttft_s and slo.tpot_s")
        if self.affinity == "low":
            pair = best(self.search.rate(problem, pairs(problem)), "pair of instances on the same machines")
            return Placement(pair, pair)
        prefill, decode = self._rated(problem)
        return Placement(best(prefill, "prefill instance"), best(decode, "decode instance"))

    def plan(self, problem: Problem) -> Plan:
        placement = self.placement(problem)
        if self.affinity == "low":
            needed = placement.counts(problem.workload.rate_per_s)[0] if self.count == "rate" else None
            return paired_plan(problem, placement.prefill.unit, needed)
        if self.count == "rate":
            return _split(placement, placement.counts(problem.workload.rate_per_s)).plan(problem)
        return _filled(problem, *self._rated(problem))

    def _rated(self, problem: Problem) -> tuple[list[Rated], list[Rated]]:
        found = instances(problem)
        prefill = self.search.rate(problem, [Unit(prefill=shape) for shape in found])
        return prefill, self.search.rate(problem, [Unit(decode=shape) for shape in found])


def _split(placement: Placement, counts: tuple[int, int]) -> Split:
    prefill, decode = placement.prefill.unit.prefill, placement.decode.unit.decode
    assert prefill is not None
    assert decode is not None
    return Split(
        prefill=Pool(replicas=counts[0], tp=prefill.tp, pp=prefill.pp),
        decode=Pool(replicas=counts[1], tp=decode.tp, pp=decode.pp),
    )


def _filled(problem: Problem, prefills: Sequence[Rated], decodes: Sequence[Rated]) -> Plan:
    """Shapes and numbers of instances that serve most on the cluster's GPUs; of equal ones the fewest GPUs.

    Algorithm 1's shapes are best for any number of GPUs; on a given number others may leave fewer idle.
    """
    total = len(problem.cluster.gpu_ids)
    offers = []
    for prefill, decode in product(prefills, decodes):
        for number in range(1, total // prefill.unit.gpus + 1):
            rest = (total - number * prefill.unit.gpus) // decode.unit.gpus
            rate = min(number * prefill.rate_per_s, rest * decode.rate_per_s)
            if rate > 0:
                gpus = number * prefill.unit.gpus + rest * decode.unit.gpus
                offers.append((rate, -gpus, Placement(prefill, decode), (number, rest)))
    for *_, placement, counts in sorted(offers, key=lambda offer: offer[:2], reverse=True):
        try:
            return _split(placement, counts).plan(problem)
        except ConfigError:
            continue  # their TP groups leave gaps on the machines
    raise ConfigError(f"system.placement: the cluster's {total} GPUs have no room for both phases; add GPUs")


def paired_plan(problem: Problem, unit: Unit, needed: int | None = None) -> Plan:
    """So many copies of a pair (None: all that fit); a request's two legs stay in one pair."""
    places = list(_places(problem, unit))
    if not places or (needed or 1) > len(places):
        raise ConfigError(
            f"system.placement: {needed or 1} pairs of {unit.gpus} GPUs are needed, the cluster has room for "
            f"{len(places)}; add GPUs, or lower the rate"
        )
    chosen = places[: needed or len(places)]
    assert unit.prefill is not None
    assert unit.decode is not None
    replicas: list[Replica] = []
    shares = {}
    for number, machines_ in enumerate(chosen):
        split = unit.prefill.gpus // unit.nodes
        prefill = _on(problem, f"prefill{number}", "prefill", unit.prefill, [gpus[:split] for gpus in machines_])
        decode = _on(problem, f"decode{number}", "decode", unit.decode, [gpus[split:] for gpus in machines_])
        replicas += [prefill, decode]
        shares[prefill.name, decode.name] = 1 / len(chosen)
    return Plan(replicas=tuple(replicas), shares=shares)


def _places(problem: Problem, unit: Unit) -> Iterator[list[tuple[str, ...]]]:
    """GPUs of every copy of a pair, machine by machine."""
    nodes = problem.cluster.nodes
    width = unit.gpus // unit.nodes
    for first in range(0, len(nodes) - unit.nodes + 1, unit.nodes):
        group = nodes[first : first + unit.nodes]
        for start in range(0, group[0].count - width + 1, width):
            yield [tuple(node.gpu_ids[start : start + width]) for node in group]


def _on(problem: Problem, name: str, role: Role, shape: Shape, by_machine: Sequence[tuple[str, ...]]) -> Replica:
    stages = [gpus[start : start + shape.tp] for gpus in by_machine for start in range(0, len(gpus), shape.tp)]
    return evenly(problem.model, name, role, stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestColocated:
    """The shape of colocated instances with the highest goodput per GPU: what DistServe calls vLLM++ (section 6.4)."""

    search: Search

    def placement(self, problem: Problem) -> Rated:
        units = [Unit(mixed=shape) for shape in instances(problem)]
        return best(self.search.rate(problem, units), "colocated instance")

    def plan(self, problem: Problem) -> Plan:
        shape = self.placement(problem).unit.mixed
        assert shape is not None
        return Colocated(pool=Pool(tp=shape.tp, pp=shape.pp)).plan(problem)
