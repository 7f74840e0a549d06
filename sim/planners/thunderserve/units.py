"""What a replica could be on this cluster, and what each would carry: the columns of the capacity LP.

Machines that are alike form a kind. A ``Unit`` is one replica on GPUs of one kind (of several, where no kind holds the
model by itself) in one phase or in both, with one parallel configuration. Its rate is what it goes on serving while the
mean time of a token keeps the SLO: the rates of an upper bound, without queues and without chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import inf
from typing import NamedTuple

import numpy as np

from sim.cluster import Node
from sim.memory import kv_blocks
from sim.planners.thunderserve.parallel import TP_DEGREES, Layouts, Part
from sim.planners.thunderserve.replay import Decoder, Floats, Prefiller, safe_load
from sim.types import Role, Stage, Work

ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")
BATCH_TOKENS = 2048
"""Of a step of a replica that does both phases, where the limits name none (as its batcher has it)."""
BATCHED_TOKENS = (4096, 16384)
"""Of prompts in one step, when what they gain by batching is looked at."""
MOST_MACHINES = 4
"""Of a pipeline over machines of one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Machines that are alike: places in the cluster, GPUs of each that are free."""

    machines: tuple[int, ...]
    node: Node
    count: int

    @property
    def gpus(self) -> int:
        return len(self.machines) * self.count


class Slot(NamedTuple):
    """GPUs on one machine of a kind."""

    kind: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One possible replica. ``stages`` lie on example machines, slot by slot.

    ``rate_per_s``: the most that it serves; ``safe_per_s``: where its queue, shared with no other, keeps the SLO too.
    """

    role: Role
    slots: tuple[Slot, ...]
    stages: tuple[Stage, ...]
    rate_per_s: float
    safe_per_s: float

    def between(self, caution: float) -> float:
        """From the most (0) to what is safe (1)."""
        return self.rate_per_s + caution * (self.safe_per_s - self.rate_per_s)

    @property
    def gpus(self) -> int:
        return sum(slot.gpus for slot in self.slots)

    @property
    def home(self) -> int:
        """The kind whose network port its KV crosses."""
        return self.slots[-1 if self.role == "prefill" else 0].kind


class Units:
    """All units of a problem, priced once."""

    def __init__(self, layouts: Layouts, free: Sequence[Sequence[str]]) -> None:
        self.layouts = layouts
        self.problem, self.sample = layouts.problem, layouts.sample
        self.kinds = kinds_of(layouts, free)
        self.token_s = self._longest_token_s()
        self._known: dict[tuple[tuple[Stage, ...], Role], tuple[float, float]] = {}

    @cached_property
    def all(self) -> tuple[Unit, ...]:
        """Of several configurations on as many GPUs of a kind, those with the highest rate, at most and safely;
        and all without a pipeline, as one would lay them out by hand."""
        found: list[Unit] = []
        for role in ROLES:
            alike: dict[tuple[Slot, ...], list[Unit]] = defaultdict(list)
            for parts in self._configurations():
                for unit in self._priced(parts, role):
                    alike[unit.slots].append(unit)
            for several in alike.values():
                best = (max(several, key=lambda unit: unit.rate_per_s), max(several, key=lambda unit: unit.safe_per_s))
                plain = (unit for unit in several if len(unit.stages) == 1)
                found.extend({unit.stages: unit for unit in (*best, *plain)}.values())
        return tuple(found)

    # ------------------------------------------------------------ which

    def _configurations(self) -> Iterator[tuple[Part, ...]]:
        lonely: list[int] = []
        for place, kind in enumerate(self.kinds):
            inside = [(Part(kind.machines[0], tp, stages),) for tp, stages in _shapes(kind.count)]
            inside = [parts for parts in inside if self._heads_divide(parts)]
            yield from inside
            if not any(self._holds(parts) for parts in inside):
                lonely.append(place)
                yield from self._over_machines(kind)
        for place in lonely:
            yield from self._with_others(place)

    def _heads_divide(self, parts: Sequence[Part]) -> bool:
        return all(self.problem.model.num_attention_heads % part.tp == 0 for part in parts)

    def _holds(self, parts: tuple[Part, ...]) -> bool:
        return next(self.layouts.splits(parts, "decode"), None) is not None

    def _over_machines(self, kind: Kind) -> Iterator[tuple[Part, ...]]:
        for machines in range(2, min(MOST_MACHINES, len(kind.machines)) + 1):
            for tp in (tp for tp in TP_DEGREES if tp <= kind.count):
                parts = tuple(Part(machine, tp, kind.count // tp) for machine in kind.machines[:machines])
                if self._heads_divide(parts):
                    yield parts

    def _with_others(self, place: int) -> Iterator[tuple[Part, ...]]:
        """A machine of this kind and part of one or two others, the widest TP on each."""
        kind, others = self.kinds[place], [at for at in range(len(self.kinds)) if at != place]
        for number in (1, 2):
            for chosen in combinations(others, number):
                for width in (1, 2, 4, 8):
                    ends = [self._widest(kind, kind.count), *(self._widest(self.kinds[at], width) for at in chosen)]
                    if all(width <= self.kinds[at].count for at in chosen):
                        yield tuple(ends)

    def _widest(self, kind: Kind, gpus: int) -> Part:
        heads = self.problem.model.num_attention_heads
        tp = max(tp for tp in TP_DEGREES if gpus % tp == 0 and heads % tp == 0)
        return Part(kind.machines[0], tp, gpus // tp)

    # ------------------------------------------------------------ at what rate

    def _priced(self, parts: tuple[Part, ...], role: Role) -> Iterator[Unit]:
        kind_of = {machine: place for place, kind in enumerate(self.kinds) for machine in kind.machines}
        slots = tuple(Slot(kind_of[part.machine], part.tp * part.stages) for part in parts)
        for stages in self.layouts.splits(parts, "decode" if role == "mixed" else role):
            rate, safe = self.rates(stages, role)
            if rate > 0:
                yield Unit(role=role, slots=slots, stages=stages, rate_per_s=rate, safe_per_s=safe)

    def rates(self, stages: tuple[Stage, ...], role: Role) -> tuple[float, float]:
        """Requests/s at most, and safely; 0 if the model has no room or the SLO cannot be kept."""
        if (stages, role) not in self._known:
            self._known[stages, role] = self._rates(stages, role)
        return self._known[stages, role]

    def _rates(self, stages: tuple[Stage, ...], role: Role) -> tuple[float, float]:
        limits = self.problem.limits
        if kv_blocks(self.problem, stages, limits) * limits.block_size < self.sample.longest_tokens:
            return 0.0, 0.0
        if role == "decode":
            return self._decode(stages)
        server = self.layouts.server(stages, "prefill")
        assert isinstance(server, Prefiller)
        safe = safe_load(server, server.alone_s, self.sample, self.problem.slo)
        if not safe:
            return 0.0, 0.0
        rate = self._prompts_per_s(server) if role == "prefill" else self._mixed(stages)
        return rate, safe * rate

    def _prompts_per_s(self, server: Prefiller) -> float:
        """One by one, or in batches of so many tokens if those are faster: short prompts gain most by company."""
        best = server.capacity_per_s
        for size in BATCHED_TOKENS:
            total_s, batch = 0.0, list[tuple[int, int]]()
            for tokens in [*self.sample.inputs.tolist(), size]:  # the last is not counted
                if batch and sum(chunk[0] for chunk in batch) + tokens > size:
                    total_s += max(self.layouts.stage_seconds(server.stages, Work(tuple(batch), 0, 0)))
                    batch = []
                batch.append((tokens, 0))
            best = max(best, len(self.sample.inputs) / total_s)
        return best

    def _decode(self, stages: tuple[Stage, ...]) -> tuple[float, float]:
        """Safely: whole requests have room, and tokens a tenth of their time."""
        server = self.layouts.server(stages, "decode")
        assert isinstance(server, Decoder)
        found = []
        for most, token_s in (
            (self._most_seqs(server.kv_tokens), self.token_s),
            (server.most_seqs, 0.9 * self.token_s),
        ):
            seqs = np.arange(1, most + 1)
            times_s = server.step_s[seqs] + server.step_s_per_context[seqs] * self.sample.mean_context
            found.append(float(np.where(times_s <= token_s, seqs / times_s, 0.0).max()) / self._steps)
        return found[0], 0.95 * found[1]

    def _mixed(self, stages: tuple[Stage, ...]) -> float:
        """Per step a request's prompt tokens for each of its output tokens: evenly, or in full steps now and then.

        The second has decodes of their own in between, which some models price lower (CUDA graphs). The faster counts.
        """
        limits, sample = self.problem.limits, self.sample
        budget = limits.max_num_batched_tokens or BATCH_TOKENS
        per_token, context = sample.mean_input / self._steps, sample.mean_context
        most = self._most_seqs(kv_blocks(self.problem, stages, limits) * limits.block_size)
        best = 0.0
        for seqs in np.unique(np.geomspace(1, most, 48).round().astype(int)).tolist():
            batch = seqs / len(stages)
            full = (budget - batch) / (batch * per_token)  # steps that the tokens of a full one last
            if full < 1:
                break
            even_s, full_s, none_s = (
                self._step_s(stages, _work(batch, tokens, sample.mean_input, context), batch)
                for tokens in (batch * per_token, budget - batch, 0.0)
            )
            token_s = min(even_s, full_s / full + none_s * (1 - 1 / full))
            if token_s <= self.token_s:
                best = max(best, seqs / token_s / self._steps)
        return best

    def _step_s(self, stages: tuple[Stage, ...], work: Work, batch: float) -> float:
        times = self.layouts.stage_seconds(stages, work)
        through = sum(times) + (len(times) - 1) * self.layouts.hop_seconds(stages, work.tokens)
        return max(through, min(len(times), batch * len(times)) * max(times))

    def _most_seqs(self, kv_tokens: int) -> int:
        """On average over their life they hold half of their answer."""
        return max(1, min(self.problem.limits.max_num_seqs, int(kv_tokens / self.sample.mean_context)))

    @property
    def _steps(self) -> float:
        return max(float((self.sample.outputs - 1).mean()), 1 / len(self.sample.outputs))

    def _longest_token_s(self) -> float:
        """The mean time of a token that leaves the SLO's share of the requests within TPOT and E2E."""
        slo, steps = self.problem.slo, np.maximum(self.sample.outputs - 1, 1)
        allowed: Floats = np.full(len(steps), inf if slo.tpot_s is None else slo.tpot_s)
        if slo.e2e_s is not None:
            allowed = np.minimum(allowed, slo.e2e_s / steps)
        allowed[self.sample.outputs <= 1] = inf
        place = int(np.floor((1 - slo.attainment) * len(allowed) + 1e-9))
        return float(np.sort(allowed)[min(place, len(allowed) - 1)])


def kinds_of(layouts: Layouts, free: Sequence[Sequence[str]]) -> tuple[Kind, ...]:
    """Machines of the same GPUs, region, port and lines, with as many GPUs free."""
    cluster = layouts.cluster
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for machine, node in enumerate(cluster.nodes):
        if free[machine]:
            own = node.name if any(node.name in pair for pair in cluster.pairs) else ""
            alike[node.gpu, len(free[machine]), node.region, node.nic_bytes_per_s, own].append(machine)
    return tuple(
        Kind(machines=tuple(machines), node=cluster.nodes[machines[0]], count=len(free[machines[0]]))
        for machines in alike.values()
    )


def _shapes(count: int) -> Iterator[tuple[int, int]]:
    """(TP, stages) on powers of two of a machine's GPUs, and on all of them."""
    for gpus in sorted({*(width for width in TP_DEGREES if width <= count), count}):
        yield from ((tp, gpus // tp) for tp in TP_DEGREES if gpus % tp == 0)


def _work(batch: float, prompt_tokens: float, mean_input: float, context: float) -> Work:
    """A step of whole prompts and a part of one, besides the decodes."""
    whole, rest = divmod(prompt_tokens, mean_input)
    size, left = max(1, round(mean_input)), round(rest)
    chunks = ((size, 0),) * int(whole) + (((left, round((mean_input - left) / 2)),) if left else ())
    seqs = max(1, round(batch))
    return Work(chunks, seqs, round(seqs * context))
