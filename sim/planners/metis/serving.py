"""Metis for serving: the GPUs in a prefill and a decode pool, each laid out by Metis's search with a cost of its own.

Ours throughout, after the planner of ``training.py``. Its type orders, device groups, layers by an exact cut and shares
by speed stay. In place of a training step: prompts per second and the time of one (prefill), tokens per second and the
time of a step (decode); memory is the engine's, a hard bound of every cut. Data parallelism inside a stage becomes
replicas, each a chain of one tensor-parallel group per stage, fed by shares; so all stages of a pool have the same
degree of it, and mixed types within a stage are mixed replicas. No queues are modelled: the limits bound the mean
request alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from math import inf
from typing import NamedTuple

from sim.planners.metis.balance import Floats, cut
from sim.planners.metis.groups import device_groups, type_orders
from sim.planners.metis.stages import Gpus, Stages
from sim.policy import Problem
from sim.types import InfeasibleError, Plan, Replica, Role, Stage

Chain = tuple[Gpus, ...]
"""The GPUs of a replica, stage by stage."""
Taken = tuple[int, ...]
"""GPUs of each type, in alphabetical order of the types."""


class Pool(NamedTuple):
    """A layout of one phase. ``rates_per_s``: requests that each chain computes; ``time_s``: the slowest chain's, of a
    mean prompt or of a decode step."""

    chains: tuple[Chain, ...]
    bounds: tuple[int, ...]
    rates_per_s: tuple[float, ...]
    time_s: float

    @property
    def rate_per_s(self) -> float:
        return sum(self.rates_per_s)


class Found(NamedTuple):
    """Both pools, and what a mean prompt's KV takes from one to the other."""

    prefill: Pool
    decode: Pool
    kv_s: float

    @property
    def rate_per_s(self) -> float:
        return min(self.prefill.rate_per_s, self.decode.rate_per_s)

    def better_than(self, other: Found | None) -> bool:
        """By requests per second, then by what the stronger pool has over, then by the time to the first token."""
        return other is None or self._worth() > other._worth()

    def _worth(self) -> tuple[float, float, float]:
        both = self.prefill.rate_per_s + self.decode.rate_per_s
        return round(self.rate_per_s, 9), round(both, 9), -self.prefill.time_s - self.kv_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Metis:
    """The split and the two layouts that serve most mean requests per second.

    ``exhaustive``: every degree of data parallelism, not only the largest that memory allows. ``max_stages``: of a
    pipeline; None: as many as layers. A cluster of 32 GPUs of four types takes about a minute.
    """

    variance: float = 1.0
    max_permute_len: int | None = 4
    max_tp: int = 4
    max_stages: int | None = 8
    exhaustive: bool = False
    _last: list[tuple[Problem, Found]] = field(default_factory=list, repr=False, compare=False)

    def plan(self, problem: Problem) -> Plan:
        return planned(problem, self.search(problem))

    def explain(self, problem: Problem) -> Iterator[str]:
        found = self.search(problem)
        for role, pool in (("prefill", found.prefill), ("decode", found.decode)):
            chain = " > ".join(
                f"{len(gpus)} {problem.cluster.gpu(gpus[0]).name}, layers {a} to {b}"
                for gpus, (a, b) in zip(pool.chains[0], pairwise(pool.bounds), strict=True)
            )
            what = "a mean prompt" if role == "prefill" else "a step"
            yield (
                f"{role}: {len(pool.chains)} replica(s), the first {chain}; {pool.rate_per_s:.3g} requests/s, "
                f"{what} takes {pool.time_s:.3g} s at most"
            )

    def search(self, problem: Problem) -> Found:
        """The best pools within the SLO. ``InfeasibleError`` says what is missing."""
        if not (self._last and self._last[0][0] is problem):
            self._last[:] = [(problem, Search(self, problem).best())]
        return self._last[0][1]


class Search:
    """Pools of one problem; the same GPUs in the same phase are laid out once."""

    def __init__(self, settings: Metis, problem: Problem) -> None:
        self.settings, self.problem = settings, problem
        self.stages = Stages(problem)
        cluster, slo = problem.cluster, problem.slo
        self.types = {
            kind: tuple(gpu for gpu in cluster.gpu_ids if cluster.gpu(gpu).name == kind)
            for kind in sorted({node.gpu.name for node in cluster.nodes})
        }
        self.ttft_s = inf if slo.ttft_s is None else slo.ttft_s
        whole = inf if slo.e2e_s is None else (slo.e2e_s - (slo.ttft_s or 0.0)) / self.stages.steps
        self.step_s = min(whole, inf if slo.tpot_s is None else slo.tpot_s)
        self._known: dict[tuple[Taken, Role], list[Pool]] = {}
        self._first_s = self._step_s = inf  # the least of any two pools

    # ------------------------------------------------------------ the split

    def splits(self) -> Iterator[tuple[Taken, Taken]]:
        """GPUs of each type in prefill and in decode: whole machines, or of a single one a power of two on one side."""
        totals = [len(gpus) for gpus in self.types.values()]
        for taken in product(*(self._steps(kind) for kind in self.types)):
            rest = tuple(total - count for total, count in zip(totals, taken, strict=True))
            if self._holds(taken) and self._holds(rest):
                yield taken, rest

    def _steps(self, kind: str) -> list[int]:
        machines = [node.count for node in self.problem.cluster.nodes if node.gpu.name == kind]
        total = sum(machines)
        if len(machines) > 1:
            return list(accumulate(machines, initial=0))
        powers = [1 << k for k in range(total.bit_length())]
        return sorted({0, total, *powers, *(total - power for power in powers)})

    def _holds(self, taken: Taken) -> bool:
        """Whether the weights are less than the memory, before any layout."""
        cluster, model = self.problem.cluster, self.problem.model
        memory = sum(
            count * cluster.gpu(gpus[0]).memory_bytes for count, gpus in zip(taken, self.types.values(), strict=True)
        )
        share = self.problem.limits.gpu_memory_utilization
        return memory * share >= model.weight_bytes(0, model.num_layers)

    def best(self) -> Found:
        best: Found | None = None
        for prefill, decode in self.splits():
            for one, other in product(self.pool(prefill, "prefill"), self.pool(decode, "decode")):
                self._step_s = min(other.time_s, self._step_s)
                found = Found(one, other, 0.0)
                if other.time_s > self.step_s or not found.better_than(best):
                    continue
                found = found._replace(kv_s=self._kv_s(one, other))
                first_s = one.time_s + found.kv_s
                self._first_s = min(first_s, self._first_s)
                if first_s < inf and first_s <= self.ttft_s and found.better_than(best):
                    best = found
        if best is None:
            raise InfeasibleError(self._missing())
        return best

    def _kv_s(self, prefill: Pool, decode: Pool) -> float:
        """Of the slowest way."""
        return max(self.stages.kv_s(flat(a), flat(b)) for a, b in product(prefill.chains, decode.chains))

    def _missing(self) -> str:
        """Why there is no plan, in numbers."""
        problem, tokens = self.problem, self.stages.sample.longest_tokens
        if self._step_s == inf:
            need = problem.model.weight_bytes(0, problem.model.num_layers)
            return (
                f"cluster: no two pools of its {len(problem.cluster.gpu_ids)} GPUs each hold {problem.model.name} "
                f"({need / 1e9:.1f} GB) and KV for {tokens} tokens; add GPUs, take a smaller model or raise "
                "gpu_memory_utilization, system.max_tp or system.max_stages"
            )
        if self._step_s > self.step_s:
            what, least, limit = "a decode step", self._step_s, self.step_s
        elif self._first_s < inf:
            what, least, limit = "a mean prompt and its KV's way", self._first_s, self.ttft_s
        else:
            return (
                "cluster.links: no KV gets from all prefill to all decode replicas of any two pools; link all machines"
            )
        return (
            f"slo: {what} takes {least:.3g} s at least, and the limit is {limit:.3g} s; raise it, or set "
            "system.exhaustive"
        )

    # ------------------------------------------------------------ a pool

    def pool(self, taken: Taken, role: Role) -> list[Pool]:
        """Of the layouts, those that no other beats in both rate and time; prefill from the front of each type's GPUs,
        decode from the back."""
        if (taken, role) not in self._known:
            self._known[taken, role] = front(self._layouts(taken, role))
        return self._known[taken, role]

    def _layouts(self, taken: Taken, role: Role) -> Iterator[Pool]:
        for ranks in self._orders(taken, role):
            most = min(len(ranks), self.problem.model.num_layers, self.settings.max_stages or len(ranks))
            for stages in range(1, most + 1):
                for groups in device_groups(
                    len(ranks), stages, variance=self.settings.variance, max_permute_len=self.settings.max_permute_len
                ):
                    yield from self._intra(ranks, groups, role)

    def _orders(self, taken: Taken, role: Role) -> Iterator[Gpus]:
        """The pool's GPUs, type after type in every order."""
        mine = {
            kind: gpus[:count] if role == "prefill" else gpus[len(gpus) - count :]
            for (kind, gpus), count in zip(self.types.items(), taken, strict=True)
            if count
        }
        for order in type_orders(mine):
            yield tuple(gpu for kind in order for gpu in mine[kind])

    def _intra(self, ranks: Gpus, groups: Sequence[int], role: Role) -> Iterator[Pool]:
        """Data parallelism first: its largest degree that memory allows, or all."""
        degree = min(groups)
        while degree:
            found = list(self.cuts(chains(ranks, groups, degree), role)) if self._allowed(groups, degree) else []
            yield from found
            if found and not self.settings.exhaustive:
                return
            degree //= 2

    def _allowed(self, groups: Sequence[int], degree: int) -> bool:
        heads = self.problem.model.num_attention_heads
        return all(size // degree <= self.settings.max_tp and heads % (size // degree) == 0 for size in groups)

    def cuts(self, replicas: tuple[Chain, ...], role: Role) -> Iterator[Pool]:
        """These replicas with the best layers for their stages; nothing where they have no room."""
        kinds = tuple(tuple(self.stages.kind(gpus) for gpus in chain) for chain in replicas)
        if not all(all(chain) for chain in kinds):
            return
        yield from self._prefills(replicas, kinds) if role == "prefill" else self._decodes(replicas, kinds)

    # ------------------------------------------------------------ phases

    def _prefills(self, replicas: tuple[Chain, ...], kinds: tuple[Chain, ...]) -> Iterator[Pool]:
        """Rate with steps as full as their budget allows, the time of one prompt alone."""
        stages = self.stages
        bounds = cut([stages.prefill(together, stages.prompts) for together in zip(*kinds, strict=True)])
        if bounds is None:
            return
        full = {chain: [stages.prefill((kind,), stages.prompts) for kind in chain] for chain in set(kinds)}
        alone = {chain: sum(at([stages.prefill((kind,), 1) for kind in chain], bounds)) for chain in set(kinds)}
        rates = {chain: stages.prompts / max(at(times, bounds)) for chain, times in full.items()}
        time_s = max(
            alone[chain] + sum(stages.hops_s(gpus, tokens) for tokens in stages.prompt)
            for gpus, chain in zip(replicas, kinds, strict=True)
        )
        if time_s < inf:
            yield Pool(replicas, bounds, tuple(rates[chain] for chain in kinds), time_s)

    def _decodes(self, replicas: tuple[Chain, ...], kinds: tuple[Chain, ...]) -> Iterator[Pool]:
        """The largest batch that memory and the limit of a step allow, or the smallest; more is never slower a token.

        As many micro-batches as stages, each of a power of two.
        """
        low, high = 0, (self.problem.limits.max_num_seqs // len(replicas[0])).bit_length()
        found = self._decode(replicas, kinds, 1)
        while low + 1 < high and found is not None:
            middle = (low + high) // 2
            larger = self._decode(replicas, kinds, 1 << middle)
            if larger is None or larger.time_s > self.step_s:
                high = middle
            else:
                low, found = middle, larger
        if found is not None:
            yield found

    def _decode(self, replicas: tuple[Chain, ...], kinds: tuple[Chain, ...], sequences: int) -> Pool | None:
        stages, depth = self.stages, len(replicas[0])
        batch = min(sequences * depth, self.problem.limits.max_num_seqs)
        bounds = cut([stages.decode(together, sequences, batch) for together in zip(*kinds, strict=True)])
        if bounds is None:
            return None
        each = {chain: at([stages.decode((kind,), sequences, batch) for kind in chain], bounds) for chain in set(kinds)}
        steps = [
            max(sum(each[chain]) + stages.hops_s(gpus, sequences), depth * max(each[chain]))
            for gpus, chain in zip(replicas, kinds, strict=True)
        ]
        if max(steps) == inf:
            return None
        return Pool(replicas, bounds, tuple(batch / step / stages.steps for step in steps), max(steps))


# ---------------------------------------------------------------- pure parts


def chains(ranks: Gpus, groups: Sequence[int], degree: int) -> tuple[Chain, ...]:
    """Stages are runs of ranks, and a replica has the next part of each."""
    ends = list(accumulate(groups))
    return tuple(
        tuple(
            ranks[end - size + turn * size // degree : end - size + (turn + 1) * size // degree]
            for size, end in zip(groups, ends, strict=True)
        )
        for turn in range(degree)
    )


def at(times: Sequence[Floats], bounds: Sequence[int]) -> list[float]:
    """Of each stage, for its layers."""
    return [float(time[a, b]) for time, (a, b) in zip(times, pairwise(bounds), strict=True)]


def front(pools: Iterator[Pool]) -> list[Pool]:
    """By rate, without those that a faster one of no less rate beats; of equal ones the first."""
    kept: list[Pool] = []
    for pool in sorted(pools, key=lambda pool: (-pool.rate_per_s, pool.time_s)):
        if not kept or pool.time_s < kept[-1].time_s:
            kept.append(pool)
    return kept


def flat(chain: Chain) -> Gpus:
    return tuple(gpu for gpus in chain for gpu in gpus)


def planned(problem: Problem, found: Found) -> Plan:
    """Replicas of both pools; every pair by its rates' shares."""
    replicas = [*_replicas(found.prefill, "prefill"), *_replicas(found.decode, "decode")]
    count = len(found.prefill.chains)
    return Plan(
        replicas=tuple(replicas),
        shares={
            (a.name, b.name): p / found.prefill.rate_per_s * d / found.decode.rate_per_s
            for a, p in zip(replicas[:count], found.prefill.rates_per_s, strict=True)
            for b, d in zip(replicas[count:], found.decode.rates_per_s, strict=True)
        },
    )


def _replicas(pool: Pool, role: Role) -> Iterator[Replica]:
    for number, chain in enumerate(pool.chains):
        stages: list[Stage] = [
            Stage(name=f"{role}{number}.{place}", gpus=gpus, first_layer=a, end_layer=b)
            for place, (gpus, (a, b)) in enumerate(zip(chain, pairwise(pool.bounds), strict=True))
        ]
        yield Replica(name=f"{role}{number}", role=role, stages=tuple(stages))
