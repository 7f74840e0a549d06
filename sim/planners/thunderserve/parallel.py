"""The parallel configuration of a group: tensor parallelism inside a machine, a pipeline across, layers by ability.

Source: ThunderServe (MLSys 2025), lower level; ours where the paper's summaries are silent: which TP degrees, the
split of the layers, the memory they must leave. Every price is the problem's own (``Problem.cost``), so what was
measured counts. ``Layouts`` remembers what it priced; it is the only state of a search besides the search's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise, product
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from sim.cost import StageCost
from sim.memory import kv_blocks, kv_bytes_available
from sim.planners.thunderserve.groups import Counts, Group
from sim.planners.thunderserve.replay import LOAD_STEPS, Decoder, Prefiller, Sample, Server, keeps, safe_load
from sim.policy import Problem
from sim.types import PS_PER_S, ConfigError, Replica, Role, Stage, Work

TP_DEGREES = (1, 2, 4, 8)
MOST_OPTIONS = 64
"""Configurations of one group; beyond, all machines of a group take the same TP degree."""
MOST_ORDERS = 2000
"""States of the search for the order of stages; beyond, the nearest is next."""
PROMPT_KNOTS = 16


class Part(NamedTuple):
    """Stages on one machine of a group: so many, each of so many GPUs."""

    machine: int
    tp: int
    stages: int


class Layouts:
    """Prices groups of one problem; the same group in the same phase is laid out once."""

    def __init__(self, problem: Problem, sample: Sample) -> None:
        self.problem = problem
        self.sample = sample
        self.cluster, self.model = problem.cluster, problem.model
        self._by_group: dict[Group, Server | None] = {}
        self._by_shape: dict[tuple[tuple[tuple[str, int, int, int], ...], Role], Server | None] = {}
        self._bound: dict[tuple[str, int, int, int], StageCost] = {}
        self._room = cache(self._kv_room)
        self._line_s = lru_cache(1 << 17)(self._seconds)
        self._hop = cache(self._hop_path)
        self._machine_order = cache(self._shortest)
        self._mean_input = sample.mean_input

    # ------------------------------------------------------------ a group

    def serve(self, group: Group) -> Server | None:
        """The group's best configuration for its phase; None if none holds the model and the longest request."""
        if group not in self._by_group:
            self._by_group[group] = self._lay_out(group)
        return self._by_group[group]

    def holds(self, counts: Counts) -> bool:
        """Whether these GPUs can serve either phase."""
        return all(self.serve(Group(counts, role)) is not None for role in ("prefill", "decode"))

    def _lay_out(self, group: Group) -> Server | None:
        if not self._enough_memory(group.counts):
            return None
        able = [stages for parts in _options(group.counts) for stages in self.splits(parts, group.role)]
        if not able:
            return None
        if group.role == "decode":
            return self.server(min(able, key=self._token_s), group.role)
        quickest, busiest = min(able, key=self._prompt_s), min(able, key=self._period_s)
        if quickest == busiest:
            return self.server(quickest, group.role)
        few, many = self.server(quickest, group.role), self.server(busiest, group.role)
        most = self._within(many)
        if few is None or many is None or most <= 0:
            return few if self._within(few) >= most else many
        step = ceil(most * LOAD_STEPS / few.capacity_per_s)  # at which the quicker one carries as much
        return few if step < LOAD_STEPS and keeps(few, self.sample, self.problem.slo, step) else many

    def _within(self, server: Server | None) -> float:
        """Prompts/s within TTFT; of those that never keep it, the lower latency."""
        if not isinstance(server, Prefiller):
            return -inf
        safe = safe_load(server, server.alone_s, self.sample, self.problem.slo)
        return safe * server.capacity_per_s if safe else -float(server.alone_s.mean())

    def _enough_memory(self, counts: Counts) -> bool:
        """Before any configuration: GPU memory against weights and one longest request's KV."""
        share = self.problem.limits.gpu_memory_utilization
        memory = sum(n * node.gpu.memory_bytes for n, node in zip(counts, self.cluster.nodes, strict=True))
        need = self.model.weight_bytes(0, self.model.num_layers)
        return memory * share >= need + self.sample.longest_tokens * self.model.kv_bytes_per_token()

    def splits(self, parts: Sequence[Part], role: Role) -> Iterator[tuple[Stage, ...]]:
        """The stages in order, their layers by speed, and for decode also by memory."""
        order = self._order(parts)
        if len(order) > self.model.num_layers:
            return
        for by in ("speed",) if role == "prefill" else ("speed", "memory"):
            layers = share_out(self.model.num_layers, [self._ability(part, role, by) for part in order])
            stages = self._repaired(order, layers)
            if stages is not None:
                yield stages

    def _ability(self, part: Part, role: Role, by: str) -> float:
        gpu = self.cluster.nodes[part.machine].gpu
        if by == "memory":
            return part.tp * gpu.memory_bytes
        return part.tp * (gpu.flops_for(self.model.dtype) if role == "prefill" else gpu.bandwidth_bytes_per_s)

    def _order(self, parts: Sequence[Part]) -> list[Part]:
        order = self._machine_order(tuple((part.machine, part.stages) for part in parts))
        return [parts[place] for place in order]

    def _shortest(self, stages: tuple[tuple[int, int], ...]) -> list[int]:
        """By the links of single GPUs: of so many stages on each of these machines."""
        machines = [machine for machine, _ in stages]
        return shortest_order(
            [count for _, count in stages], [[self._handover_s(a, b) for b in machines] for a in machines]
        )

    def _handover_s(self, a: int, b: int) -> float:
        """A mean prompt's activations from a GPU of one machine to a GPU of the other, or of the same."""
        latency_s, rate = self._hop(self.cluster.nodes[a].gpu_ids[:1], self.cluster.nodes[b].gpu_ids[-1:])
        return latency_s + self._mean_input * self.model.hidden_size * 2 / rate if rate else 1e9

    def _hop_path(self, source: tuple[str, ...], target: tuple[str, ...]) -> tuple[float, float]:
        """Latency and bytes/s; 0 bytes/s where there is no link."""
        return link(self.problem, source, target)[:2]

    # ------------------------------------------------------------ memory

    def _kv_room(self, node: str, tp: int, first: int, end: int) -> float:
        """Bytes a GPU that are left when each holds its part of the longest request; may be negative."""
        gpus = next(n for n in self.cluster.nodes if n.name == node).gpu_ids[:tp]
        stage = Stage(name="trial", gpus=gpus, first_layer=first, end_layer=end)
        blocks = -(-self.sample.longest_tokens // self.problem.limits.block_size)
        token_bytes = self.model.kv_bytes_per_token_layer_gpu(tp) * (end - first)
        limits = self.problem.limits
        return kv_bytes_available(self.problem, stage, limits) - blocks * limits.block_size * token_bytes

    def _repaired(self, order: Sequence[Part], layers: list[int]) -> tuple[Stage, ...] | None:
        """Layers go, one by one, from the stage whose memory overflows most to the one with most left."""
        for _ in range(self.model.num_layers):
            ends = np.cumsum(layers).tolist()
            rooms = [
                self._room(self.cluster.nodes[part.machine].name, part.tp, end - n, end)
                for part, n, end in zip(order, layers, ends, strict=True)
            ]
            if min(rooms) >= 0:
                return self._stages(order, layers)
            worst, best = rooms.index(min(rooms)), rooms.index(max(rooms))
            if rooms[best] < 0 or layers[worst] == 1:
                return None
            layers[worst] -= 1
            layers[best] += 1
        return None

    def _stages(self, order: Sequence[Part], layers: Sequence[int]) -> tuple[Stage, ...]:
        """On the first GPUs of each machine."""
        used = [0] * len(self.cluster.nodes)
        stages, layer = [], 0
        for number, (part, count) in enumerate(zip(order, layers, strict=True)):
            begin = used[part.machine]
            used[part.machine] += part.tp
            gpus = self.cluster.nodes[part.machine].gpu_ids[begin : begin + part.tp]
            stages.append(Stage(name=str(number), gpus=gpus, first_layer=layer, end_layer=layer + count))
            layer += count
        return tuple(stages)

    # ------------------------------------------------------------ time

    def _shape(self, stage: Stage) -> tuple[str, int, int, int]:
        return self.cluster.node(stage.gpus[0]).name, stage.tp, stage.first_layer, stage.end_layer

    def _seconds(self, shape: tuple[str, int, int, int], work: Work) -> float:
        return self._bound[shape].line(work).first_ps / PS_PER_S

    def stage_seconds(self, stages: Sequence[Stage], work: Work) -> list[float]:
        """Of every stage, alone."""
        times = []
        for stage in stages:
            shape = self._shape(stage)
            if shape not in self._bound:
                self._bound[shape] = self.problem.cost.bind(self.model, stage, self.cluster)
            times.append(self._line_s(shape, work))
        return times

    def hop_seconds(self, stages: Sequence[Stage], tokens: float) -> float:
        """The slowest handover of so many tokens' activations, as the engine has it."""
        size = tokens * self.model.hidden_size * 2
        hops = [self._hop(a.gpus, b.gpus) for a, b in pairwise(stages)]
        return max((latency_s + size / rate if rate else 1e9 for latency_s, rate in hops), default=0.0)

    def _prompt_s(self, stages: tuple[Stage, ...]) -> float:
        """Of a mean prompt through all stages."""
        tokens = round(self.sample.mean_input)
        times = self.stage_seconds(stages, Work(((tokens, 0),), 0, 0))
        return sum(times) + (len(times) - 1) * self.hop_seconds(stages, tokens)

    def _period_s(self, stages: tuple[Stage, ...]) -> float:
        """From one mean prompt to the next."""
        return max(self.stage_seconds(stages, Work(((round(self.sample.mean_input), 0),), 0, 0)))

    def _token_s(self, stages: tuple[Stage, ...]) -> float:
        """Per token of a full decode batch."""
        seqs = self._most_seqs(stages)
        return self._step_s(stages, seqs, self.sample.mean_context) / seqs

    def _most_seqs(self, stages: tuple[Stage, ...]) -> int:
        """Sequences that decode at once: mean requests at their full length, up to ``max_num_seqs``."""
        limits = self.problem.limits
        tokens = kv_blocks(self.problem, stages, limits) * limits.block_size
        return max(1, min(limits.max_num_seqs, int(tokens / self.sample.mean_tokens)))

    def _step_s(self, stages: tuple[Stage, ...], seqs: int, context: float) -> float:
        """From one token of a sequence to its next, ``seqs`` spread over as many micro-batches as there are stages."""
        batch = -(-seqs // len(stages))
        times = self.stage_seconds(stages, Work((), batch, round(batch * context)))
        through = sum(times) + (len(times) - 1) * self.hop_seconds(stages, batch)
        return max(through, min(seqs, len(times)) * max(times))

    def of_replica(self, replica: Replica, role: Role) -> Server | None:
        """A given replica in this phase, its stages and layers as they are."""
        return self.server(self.on_example(replica), role)

    def on_example(self, replica: Replica) -> tuple[Stage, ...]:
        """Its stages on the first GPUs of their machines, by which they are priced."""
        order, layers = [], []
        for stage in replica.stages:
            machines = {self.cluster.node(gpu).name for gpu in stage.gpus}
            if len(machines) > 1:
                raise ConfigError(
                    f"plan: stage {stage.name} spans the machines {', '.join(sorted(machines))}; "
                    "this planner prices tensor parallelism inside one machine"
                )
            order.append(Part(self.cluster.nodes.index(self.cluster.node(stage.gpus[0])), stage.tp, 1))
            layers.append(stage.num_layers)
        return self._stages(order, layers)

    def server(self, stages: tuple[Stage, ...], role: Role) -> Server | None:
        """What these stages do in this phase; None if they do not hold the model and the longest request."""
        key = (tuple(map(self._shape, stages)), role)
        if key not in self._by_shape:
            self._by_shape[key] = self._measured(stages, role)
        return self._by_shape[key]

    def _measured(self, stages: tuple[Stage, ...], role: Role) -> Server | None:
        limits = self.problem.limits
        tokens = kv_blocks(self.problem, stages, limits) * limits.block_size
        if tokens < self.sample.longest_tokens:
            return None
        if role == "prefill":
            return self._prefiller(stages)
        grid = sorted({*(2**k for k in range(limits.max_num_seqs.bit_length())), limits.max_num_seqs})
        near, far = 0.5 * self.sample.mean_context, 2 * self.sample.mean_context
        low = np.array([self._step_s(stages, seqs, near) for seqs in grid])
        high = np.array([self._step_s(stages, seqs, far) for seqs in grid])
        slope = (high - low) / (far - near)
        seqs = np.arange(limits.max_num_seqs + 1)
        most = self._most_seqs(stages)
        slowest = self._slowest(stages, Work((), -(-most // len(stages)), round(most * near)))
        return Decoder(
            stages=stages,
            weakest=f"memory of stage {{name}}.{self._tightest(stages)}" if most < limits.max_num_seqs
            else f"the speed of stage {{name}}.{slowest} (max_num_seqs {limits.max_num_seqs})",
            step_s=np.interp(seqs, grid, low - slope * near),
            step_s_per_context=np.interp(seqs, grid, slope),
            kv_tokens=tokens,
            most_seqs=most,
        ).sized(self.sample)  # fmt: skip

    def _prefiller(self, stages: tuple[Stage, ...]) -> Prefiller:
        inputs = self.sample.inputs
        knots = np.unique(np.quantile(inputs, np.linspace(0, 1, PROMPT_KNOTS)).astype(int))
        times = np.array([self.stage_seconds(stages, Work(((int(tokens), 0),), 0, 0)) for tokens in knots])
        hops = np.array([self.hop_seconds(stages, float(tokens)) for tokens in knots])
        slowest = self._slowest(stages, Work(((round(self.sample.mean_input), 0),), 0, 0))
        return Prefiller(
            stages=stages,
            weakest=f"the speed of stage {{name}}.{slowest}",
            stage_s=np.array([np.interp(inputs, knots, stage) for stage in times.T]),
            hop_s=np.interp(inputs, knots, hops),
        ).sized(self.sample)

    def _slowest(self, stages: Sequence[Stage], work: Work) -> int:
        times = self.stage_seconds(stages, work)
        return times.index(max(times))

    def _tightest(self, stages: Sequence[Stage]) -> int:
        blocks = [kv_blocks(self.problem, (stage,), self.problem.limits) for stage in stages]
        return blocks.index(min(blocks))


# ---------------------------------------------------------------- pure parts


def link(
    problem: Problem, source: tuple[str, ...], target: tuple[str, ...]
) -> tuple[float, float, tuple[tuple[str, float], ...]]:
    """(latency_s, bytes/s alone, the machine-level resources it crosses); 0 bytes/s where there is no link."""
    try:
        path = problem.cluster.path(source, target)
    except ConfigError:
        return 0.0, 0.0, ()
    rate = path.bytes_per_s(problem.cluster.capacity_bytes_per_s)
    shared = tuple(use for use in path.usage if not use[0].startswith(("gpu:", "pcie:")))
    return path.latency_s, rate, shared


def _options(counts: Counts) -> Iterator[tuple[Part, ...]]:
    """TP degrees machine by machine; a machine may also be left out, and GPUs that fill no stage idle."""
    machines = [(machine, count) for machine, count in enumerate(counts) if count]
    degrees = [[0, *(tp for tp in TP_DEGREES if tp <= count)] for _, count in machines]
    if np.prod([len(choice) for choice in degrees], dtype=float) > MOST_OPTIONS:
        uniform = [[min(tp, choice[-1]) for choice in degrees] for tp in TP_DEGREES]
        choices: list[tuple[int, ...]] = list(dict.fromkeys(map(tuple, uniform)))
    else:
        choices = list(product(*degrees))
    for choice in choices:
        parts = [Part(m, tp, count // tp) for (m, count), tp in zip(machines, choice, strict=True) if tp]
        if parts:
            yield tuple(parts)


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers >= 1 in proportion to the weights, by largest remainder."""
    exact = np.asarray(weights) / sum(weights) * total
    shares = np.maximum(1, np.floor(exact)).astype(int)
    while (short := total - int(shares.sum())) != 0:
        gap = exact - shares
        place = int(np.argmax(gap)) if short > 0 else int(np.argmin(np.where(shares > 1, gap, np.inf)))
        shares[place] += 1 if short > 0 else -1
    return [int(share) for share in shares]


def shortest_order(counts: Sequence[int], hops: Sequence[Sequence[float]]) -> list[int]:
    """The order of stages with the least sum of handovers; ``counts``: how many alike there are of each kind.

    Exact by dynamic programming over how many of each kind are used (the bitmask of Held and Karp, 1962, with alike
    stages merged); the nearest kind is next where that has too many states.
    """
    kinds = range(len(counts))
    if np.prod([count + 1 for count in counts], dtype=float) * len(counts) > MOST_ORDERS:
        return _nearest_order(counts, hops)

    @cache
    def rest(used: tuple[int, ...], last: int) -> tuple[float, tuple[int, ...]]:
        ways = [(math_sum, (kind, *order)) for kind, math_sum, order in _steps(used, last)]
        return min(ways, default=(0.0, ()))

    def _steps(used: tuple[int, ...], last: int) -> Iterator[tuple[int, float, tuple[int, ...]]]:
        for kind in kinds:
            if used[kind] < counts[kind]:
                after = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
                cost, order = rest(after, kind)
                yield kind, cost + (hops[last][kind] if last >= 0 else 0.0), order

    return list(rest((0,) * len(counts), -1)[1])


def _nearest_order(counts: Sequence[int], hops: Sequence[Sequence[float]]) -> list[int]:
    left = list(counts)
    order = [0]
    left[0] -= 1
    while any(left):
        order.append(min((kind for kind, n in enumerate(left) if n), key=lambda kind: (hops[order[-1]][kind], kind)))
        left[order[-1]] -= 1
    return order
