"""HexGen's planner (ICML 2024; arXiv 2311.11514): replicas of unequal GPUs, each an asymmetric pipeline, by a search.

Start with ``HexGen``. ``cost.py`` is its cost model, ``layout.py`` how a group of GPUs becomes a pipeline,
``genetic.py`` which GPUs form a group, ``goodput.py`` what a partition is judged by. A layer's time is the problem's
own (``Problem.cost``), so what was measured counts, or by the paper's formulas over GPUs' peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Literal, get_args

import numpy as np

from sim.memory import kv_blocks
from sim.planners.hexgen.cost import Costs
from sim.planners.hexgen.genetic import Fitness, Genetic, Partition
from sim.planners.hexgen.goodput import Server, attained
from sim.planners.hexgen.layout import Counts, Layout, Layouts
from sim.policy import Problem
from sim.types import ConfigError, InfeasibleError, Plan, Replica, Stage

Prices = Literal["model", "paper"]
ARRIVALS = 200
"""Of the quick replay."""
HALVINGS = 20
MOST_BUSY = 0.95
"""Share of its time that a stage spends on prompts at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HexGen:
    """``continuous``: replicas serve as many requests at once as memory and slo.tpot_s allow, else one a stage.

    ``asymmetric``: stages may differ in tensor-parallel degree and layers. ``prices``: of the latency model, or paper.
    """

    generations: int = 300
    continuous: bool = True
    asymmetric: bool = True
    prices: Prices = "model"

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise ConfigError(f"system.generations is {self.generations}; it must be a whole number >= 1")
        if self.prices not in get_args(Prices):
            raise ConfigError(f"system.prices is {self.prices!r}; hexgen has {', '.join(get_args(Prices))}")

    def plan(
        self,
        problem: Problem,
        *,
        without: Collection[str] = (),
        progress: Callable[[int, float], None] | None = None,
    ) -> Plan:
        """On all GPUs but these. ``InfeasibleError`` if no region holds the model."""
        world = World(problem, self)
        free = [[gpu for gpu in node.gpu_ids if gpu not in without] for node in problem.cluster.nodes]
        counts = [len(gpus) for gpus in free]
        starts = [start for start in (tuple(world.by_region(counts)), tuple(world.by_machine(counts))) if start]
        if not starts:
            weights_gb = problem.model.weight_bytes(0, problem.model.num_layers) / 1e9
            raise InfeasibleError(
                f"plan: no region's GPUs hold {problem.model.name} ({weights_gb:.0f} GB); add GPUs, take a smaller "
                "model or raise gpu_memory_utilization"
            )
        rng = np.random.default_rng(np.random.SeedSequence(problem.seed).spawn(7)[6])
        best = world.genetic(self.generations).search(starts, rng, progress)
        return Plan(replicas=tuple(world.replicas(best, free)))

    def explain(self, problem: Problem) -> list[str]:
        """What the last plan's replicas are, and what the quick replay says of them."""
        world = World(problem, self)
        plan = self.plan(problem)
        shapes = [", ".join(f"{s.tp} x {s.num_layers}" for s in one.stages) for one in plan.replicas]
        counts = tuple(world.counts(one) for one in plan.replicas)
        lost, mean_s = world.judge(counts)
        lines = [f"{one.name}: GPUs x layers {shape}" for one, shape in zip(plan.replicas, shapes, strict=True)]
        rate = 1 / lost if lost else inf
        refused = world.refused(counts)
        if refused:
            lines.append(
                f"no replica holds more than {max(map(world.tokens, counts))} tokens of KV: {refused:.1%} of the "
                "workload's requests are longer and will be rejected"
            )
        return [*lines, f"quick replay: {rate:.3g} requests/s within the SLO, {mean_s:.3g} s in the mean"]


class World:
    """One problem as the search sees it."""

    def __init__(self, problem: Problem, planner: HexGen) -> None:
        self.problem = problem
        workload = problem.workload
        self.output_tokens = max(1, round(workload.mean_output_tokens))
        costs = Costs.of(problem.model, max(1, round(workload.mean_input_tokens)), self.output_tokens)
        by_model = planner.prices == "model"
        self.layouts = Layouts(problem, costs, asymmetric=planner.asymmetric, by_model=by_model)
        self.continuous = planner.continuous
        rng = np.random.default_rng(np.random.SeedSequence(problem.seed).spawn(8)[7])
        self.arrivals_s = rng.exponential(1 / workload.rate_per_s, ARRIVALS).cumsum()
        self._servers: dict[Counts, Server] = {}
        self._tokens: dict[Counts, int] = {}

    def by_region(self, free: Sequence[int]) -> Iterator[Counts]:
        """All GPUs of a region are one replica; regions that cannot hold the model are left out."""
        nodes = self.problem.cluster.nodes
        for region in dict.fromkeys(node.region for node in nodes):
            counts = tuple(count if node.region == region else 0 for count, node in zip(free, nodes, strict=True))
            if self.valid(counts):
                yield counts

    def by_machine(self, free: Sequence[int]) -> Iterator[Counts]:
        """A machine is a replica, with the next ones of its region if it cannot hold the model; what is left over
        goes to the last."""
        nodes = self.problem.cluster.nodes
        for whole in self.by_region(free):
            groups: list[Counts] = []
            group = (0,) * len(nodes)
            for machine, count in enumerate(whole):
                group = tuple(count if place == machine else n for place, n in enumerate(group))
                if self.valid(group):
                    groups.append(group)
                    group = (0,) * len(nodes)
            groups[-1] = tuple(map(sum, zip(groups[-1], group, strict=True)))
            yield from groups

    def genetic(self, generations: int) -> Genetic:
        return Genetic(
            region=[str(node.region) for node in self.problem.cluster.nodes], enough=self.enough,
            valid=self.valid, judge=self.judge, generations=generations,
        )  # fmt: skip

    def valid(self, counts: Counts) -> bool:
        """Whether a layout of these GPUs holds the model."""
        return self.enough(counts) and self.layouts.best(counts) is not None

    def enough(self, counts: Counts) -> bool:
        """Memory for the weights, whatever the layout."""
        share = self.problem.limits.gpu_memory_utilization
        nodes = self.problem.cluster.nodes
        memory = sum(count * node.gpu.memory_bytes for count, node in zip(counts, nodes, strict=True))
        return memory * share >= self.problem.model.weight_bytes(0, self.problem.model.num_layers)

    def judge(self, partition: Partition) -> Fitness:
        """One over the goodput, and the mean latency, of the quick replay."""
        share, mean_s = attained([self.server(group) for group in partition], self.arrivals_s, self.problem.slo)
        share *= 1 - self.refused(partition)
        rate = self.problem.workload.rate_per_s
        return (1 / (share * rate) if share else 1e6), mean_s

    def refused(self, partition: Partition) -> float:
        """Share of the workload's requests that no replica can hold. Layouts are by mean lengths, these are not."""
        most = max(map(self.tokens, partition))
        lengths = self.problem.workload.lengths
        return sum(given + answer - 1 > most for given, answer in lengths) / len(lengths)

    def tokens(self, counts: Counts) -> int:
        """KV tokens that the replica on these GPUs has room for."""
        if counts not in self._tokens:
            (replica,) = self.replicas((counts,), [node.gpu_ids for node in self.problem.cluster.nodes])
            limits = self.problem.limits
            self._tokens[counts] = kv_blocks(self.problem, replica.stages, limits) * limits.block_size
        return self._tokens[counts]

    def server(self, counts: Counts) -> Server:
        """As many requests at once as memory and slo.tpot_s allow, or one a stage."""
        if counts not in self._servers:
            layout = self.layouts.best(counts)
            assert layout is not None
            slots = self.layouts.room(layout, self.problem.limits.max_num_seqs) if self.continuous else len(layout.cut)
            self._servers[counts] = self._full(layout, slots)
            tpot_s = self.problem.slo.tpot_s
            while self.continuous and slots > 1 and tpot_s is not None and self._servers[counts].step_s > tpot_s:
                slots //= 2
                self._servers[counts] = self._full(layout, slots)
        return self._servers[counts]

    def _full(self, layout: Layout, slots: int) -> Server:
        """With continuous batches a token waits, at each stage, for the prompt that may be there (M/D/1); the longer it
        waits, the fewer prompts come, so there is one wait that agrees with the rate."""
        prefill_s = self.layouts.prefill_s(layout)
        stages_s = self.layouts.stages_s(layout) if self.continuous else []
        step_s = self.layouts.step_s(layout, slots if self.continuous else 1)

        def waits_s(waited_s: float) -> float:
            rate = slots / (prefill_s + self.output_tokens * (step_s + waited_s))
            shares = [(min(MOST_BUSY, rate * stage_s), stage_s) for stage_s in stages_s]
            return sum(share * stage_s / (2 * (1 - share)) for share, stage_s in shares)

        low_s, high_s = 0.0, waits_s(0.0)
        for _ in range(HALVINGS):
            middle_s = (low_s + high_s) / 2
            low_s, high_s = (middle_s, high_s) if waits_s(middle_s) > middle_s else (low_s, middle_s)
        step_s += high_s
        return Server(slots, prefill_s, step_s, prefill_s + self.output_tokens * step_s)

    # ------------------------------------------------------------ as a plan

    def replicas(self, partition: Partition, free: Sequence[Sequence[str]]) -> Iterator[Replica]:
        """Each machine's GPUs are dealt out in order; a replica is named after its first GPU."""
        left = [iter(gpus) for gpus in free]
        for counts in partition:
            layout = self.layouts.best(counts)
            assert layout is not None
            groups = [tuple(next(left[part.machine]) for _ in range(part.tp)) for part in layout.cut]
            name = f"r-{groups[0][0]}"
            ends = list(accumulate(layout.layers))
            yield Replica(
                name=name,
                stages=tuple(
                    Stage(name=f"{name}.{place}", gpus=gpus, first_layer=end - layers, end_layer=end)
                    for place, (gpus, layers, end) in enumerate(zip(groups, layout.layers, ends, strict=True))
                ),
            )

    def counts(self, replica: Replica) -> Counts:
        own = [self.problem.cluster.node(gpu).name for gpu in replica.gpus]
        return tuple(own.count(node.name) for node in self.problem.cluster.nodes)
