"""AlpaServe's placement (OSDI 2023, arXiv 2302.11665): groups of GPUs, how each is parallelised, whose models it hosts.

Start with ``Placement``. All groups but leftovers have one size and one shape (tensor-parallel degree times stages);
every size and shape is tried, models are put into groups greedily by a quick simulation (``fast.py``), and
the best score wins. ``queueing.py`` is the theory behind it. Of different models only the shape that the problem
states is meant: classes of requests are models of that shape with weights of their own (fine-tuned ones, say).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from sim.cost import seconds
from sim.memory import kv_blocks
from sim.planners.alpaserve.fast import Arrival, Group, Served, replay
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan, Replica, Stage, Work

Search = Literal["greedy", "beam", "single"]
BEAM = 3


class Shape(NamedTuple):
    """Of a group of ``tp * pp`` GPUs."""

    tp: int
    pp: int


class Cut(NamedTuple):
    """The cluster in groups: their GPUs, and the shape of each."""

    groups: tuple[tuple[tuple[str, ...], Shape], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """``search``: greedy, beam, or single (SR: no groups, each GPU by itself). ``arrivals`` are simulated, gamma with
    ``cv``; ``slo_scale``: the bound in multiples of one request alone, where no ``slo.e2e_s`` is set."""

    search: Search = "greedy"
    max_tp: int = 4
    max_pp: int = 8
    slo_scale: float = 5.0
    arrivals: int = 2000
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.search not in get_args(Search):
            raise ConfigError(f"system.search is {self.search!r}; alpaserve has {', '.join(get_args(Search))}")
        if min(self.max_tp, self.max_pp, self.arrivals) < 1 or not min(self.slo_scale, self.cv) > 0:
            raise ConfigError(
                f"system.max_tp is {self.max_tp}, max_pp {self.max_pp}, arrivals {self.arrivals}, slo_scale "
                f"{self.slo_scale}, cv {self.cv}; all must be above 0"
            )

    def plan(self, problem: Problem) -> Plan:
        world = World(self, problem)
        best: tuple[float, Cut, list[set[str]]] | None = None
        for cut in self._cuts(problem):
            hosted, score = world.select(cut)
            if any(hosted) and (best is None or score > best[0]):
                best = score, cut, hosted
        if best is None:
            raise InfeasibleError(
                f"plan: no group of up to {self.max_tp} x {self.max_pp} GPUs holds {problem.model.name}; raise "
                "system.max_tp or max_pp, or use larger GPUs"
            )
        _, cut, hosted = best
        return Plan(
            replicas=tuple(
                Replica(name=f"g{g}", stages=stages(f"g{g}", gpus, shape, problem), models=world.names(models))
                for g, ((gpus, shape), models) in enumerate(zip(cut.groups, hosted, strict=True))
                if models
            )
        )

    def _cuts(self, problem: Problem) -> Iterator[Cut]:
        """Every size of group that machines divide into, and every shape of it; what is left over runs as pipelines."""
        widest = max(len(node.gpu_ids) for node in problem.cluster.nodes)
        total = len(problem.cluster.gpu_ids)
        size = 1
        while size <= (1 if self.search == "single" else total):
            for pp in (p for p in range(1, size + 1) if size % p == 0):
                shape = Shape(size // pp, pp)
                if shape.tp <= min(self.max_tp, widest) and pp <= min(self.max_pp, problem.model.num_layers):
                    groups = tuple(_groups(problem, size, shape))
                    if groups:
                        yield Cut(groups)
            size *= 2


def _groups(problem: Problem, size: int, shape: Shape) -> Iterator[tuple[tuple[str, ...], Shape]]:
    """GPUs of one kind, machine after machine; a tensor-parallel stage stays inside a machine."""
    kinds: dict[str, list[str]] = {}
    for node in problem.cluster.nodes:
        whole = len(node.gpu_ids) // shape.tp * shape.tp
        kinds.setdefault(node.gpu.name, []).extend(node.gpu_ids[:whole])
    for gpus in kinds.values():
        full = len(gpus) // size * size
        yield from ((tuple(gpus[start : start + size]), shape) for start in range(0, full, size))
        start, left = full, len(gpus) - full
        while left:
            part = 1 << (left.bit_length() - 1)
            yield tuple(gpus[start : start + part]), Shape(1, part)
            start, left = start + part, left - part


def stages(name: str, gpus: Sequence[str], shape: Shape, problem: Problem) -> tuple[Stage, ...]:
    """A pipeline of equal parts of the layers."""
    layers, (tp, pp) = problem.model.num_layers, shape
    return tuple(
        Stage(
            name=f"{name}.{k}", gpus=tuple(gpus[k * tp : (k + 1) * tp]),
            first_layer=layers * k // pp, end_layer=layers * (k + 1) // pp,
        )
        for k in range(pp)
    )  # fmt: skip


def stage_seconds(problem: Problem, parts: Sequence[Stage], input_tokens: int, output_tokens: int) -> tuple[float, ...]:
    """How long each stage computes for one request by itself: its prompt, and every further token."""
    found = []
    for part in parts:
        cost = problem.cost.bind(problem.model, part, problem.cluster)
        prompt_s = seconds(cost, Work(((input_tokens, 0),), 0, 0))
        context = input_tokens + output_tokens // 2
        found.append(prompt_s + (output_tokens - 1) * seconds(cost, Work((), 1, context)))
    return tuple(found)


class World:
    """What a search asks: how good models in groups are, and whether they fit."""

    def __init__(self, settings: Placement, problem: Problem) -> None:
        self.settings = settings
        self.problem = problem
        traffic = problem.workload
        self.models = dict(traffic.classes) or {"": 1.0}
        self.lengths = round(traffic.mean_input_tokens), max(1, round(traffic.mean_output_tokens))
        self.arrivals = self._drawn(traffic.rate_per_s)
        self._stage_s: dict[tuple[str, Shape], tuple[float, ...] | None] = {}
        self._most: dict[tuple[str, Shape], int] = {}
        self.bound_s = dict.fromkeys(self.models, self._bound_s())

    def names(self, hosted: set[str]) -> tuple[str, ...]:
        """In the order of the traffic's classes; none where requests have none."""
        return tuple(name for name in self.models if name in hosted and name)

    def _drawn(self, rate_per_s: float) -> list[Arrival]:
        rng = np.random.default_rng(self.problem.seed)
        shape = 1 / self.settings.cv**2
        arrivals: list[Arrival] = []
        for name, share in self.models.items():
            count = max(1, round(self.settings.arrivals * share))
            gaps = rng.gamma(shape, 1 / (shape * rate_per_s * share), count)
            arrivals += [Arrival(float(at_s), name) for at_s in np.cumsum(gaps)]
        end_s = self.settings.arrivals / rate_per_s
        return sorted(arrival for arrival in arrivals if arrival.at_s <= end_s)

    def _bound_s(self) -> float:
        if self.problem.slo.e2e_s is not None:
            return self.problem.slo.e2e_s
        alone = [
            sum(row)
            for node in self.problem.cluster.nodes
            for size in (1, 2, 4, 8, 16)
            if size <= len(node.gpu_ids) and (row := self.stage_s(node.gpu_ids[:size], Shape(size, 1))) is not None
        ]
        return self.settings.slo_scale * (alone[0] if alone else float("inf"))

    def stage_s(self, gpus: Sequence[str], shape: Shape) -> tuple[float, ...] | None:
        """Seconds of each stage for the mean request; None if not even one model fits."""
        key = self.problem.cluster.gpu(gpus[0]).name, shape
        if key not in self._stage_s:
            fits = self.most_models(gpus, shape) > 0
            parts = stages("probe", gpus, shape, self.problem)
            self._stage_s[key] = stage_seconds(self.problem, parts, *self.lengths) if fits else None
        return self._stage_s[key]

    def most_models(self, gpus: Sequence[str], shape: Shape) -> int:
        """How many models' weights leave room for the KV of the longest request, once for each stage."""
        key = self.problem.cluster.gpu(gpus[0]).name, shape
        if key not in self._most:
            parts = stages("probe", gpus, shape, self.problem)
            limits = self.problem.limits
            longest = max(sum(pair) for pair in self.problem.workload.lengths)
            count = 0
            while count < len(self.models):
                blocks = kv_blocks(self.problem, parts, replace(limits, num_kv_blocks=None), copies=count + 1)
                if blocks * limits.block_size < longest * shape.pp:
                    break
                count += 1
            self._most[key] = count
        return self._most[key]

    # ------------------------------------------------------------ which models where

    def select(self, cut: Cut) -> tuple[list[set[str]], float]:
        """Models of each group, and the score."""
        empty: list[set[str]] = [set() for _ in cut.groups]
        return self._beam(cut, empty) if self.settings.search == "beam" else self._greedy(cut, empty)

    def _greedy(self, cut: Cut, hosted: list[set[str]]) -> tuple[list[set[str]], float]:
        """Into the group that got the fewest requests goes the model that misses the most; until nothing fits."""
        while True:
            served = self.replay(cut, hosted)
            groups = sorted(range(len(hosted)), key=lambda g: (served.dispatched[g], g))
            models = sorted(self.models, key=lambda name: -served.unserved(name))
            pair = next(((g, name) for g in groups for name in models if self._can(cut, hosted, g, name)), None)
            if pair is None:
                return hosted, self.score(served, hosted)
            hosted[pair[0]].add(pair[1])

    def _beam(self, cut: Cut, empty: list[set[str]]) -> tuple[list[set[str]], float]:
        """Every pair is tried, the best few go on."""
        front = [(self.score(self.replay(cut, empty), empty), empty)]
        best = front[0]
        while front:
            tried: dict[tuple[tuple[str, ...], ...], tuple[float, list[set[str]]]] = {}
            for _, hosted in front:
                for g in range(len(hosted)):
                    for name in self.models:
                        if self._can(cut, hosted, g, name):
                            more = [models | {name} if k == g else models for k, models in enumerate(hosted)]
                            key = tuple(tuple(sorted(models)) for models in more)
                            if key not in tried:
                                tried[key] = (self.score(self.replay(cut, more), more), more)
            front = sorted(tried.values(), key=lambda found: -found[0])[:BEAM]
            if front and front[0][0] > best[0]:
                best = front[0]
        return best[1], best[0]

    def _can(self, cut: Cut, hosted: Sequence[set[str]], g: int, name: str) -> bool:
        return name not in hosted[g] and len(hosted[g]) < self.most_models(*cut.groups[g])

    def replay(self, cut: Cut, hosted: Sequence[set[str]]) -> Served:
        groups = []
        for (gpus, shape), models in zip(cut.groups, hosted, strict=True):
            row = self.stage_s(gpus, shape)
            groups.append(Group.of({name: row for name in models if row is not None}))
        return replay(self.arrivals, groups, self.bound_s)

    def score(self, served: Served, hosted: Sequence[set[str]]) -> float:
        """Goodput; of equal ones the quicker, then the one with more copies (the artifact's weights)."""
        return served.goodput - served.mean_latency_s / 1e4 + sum(map(len, hosted)) / 1e6


__all__ = ["Arrival", "Group", "Placement", "Search", "Served", "replay", "stage_seconds", "stages"]
