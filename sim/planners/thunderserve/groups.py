"""Groups of GPUs: how many of each machine serve one copy of the model, in which phase. Start, moves, and keys.

The GPUs of a machine are alike, so a group counts them by machine and needs no names. Groups in sorted order are the
key of a solution: two that differ only in which GPU of a machine is whose are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sim.cluster import Cluster
from sim.types import Role

Counts = tuple[int, ...]
"""GPUs of each machine, in the cluster's order."""


class Group(NamedTuple):
    """GPUs that hold one copy of the model, and what they do with it."""

    counts: Counts
    role: Role

    @property
    def flipped(self) -> Group:
        return Group(self.counts, "decode" if self.role == "prefill" else "prefill")


Grouping = tuple[Group, ...]
PHASES: tuple[Role, ...] = ("prefill", "decode")


def canonical(groups: Iterable[Group]) -> Grouping:
    return tuple(sorted(groups))


def has_both_phases(groups: Iterable[Group]) -> bool:
    return {group.role for group in groups} == set(PHASES)


def plus(a: Counts, b: Counts) -> Counts:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def minus(a: Counts, b: Counts) -> Counts:
    return tuple(x - y for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- the start


def agglomerate(cluster: Cluster, free: Counts, holds: Callable[[Counts], bool]) -> list[Counts]:
    """Groups that each hold the model, of GPUs with fast links between them; empty if all GPUs together do not.

    Average linkage on 1/bandwidth; a cluster is closed as soon as it holds the model. What is left over in the
    end joins the closed cluster that shares most machines with it.
    """
    machines = [machine for machine, count in enumerate(free) for _ in range(count)]
    open_clusters = {leaf: _only(machine, len(free)) for leaf, machine in enumerate(machines)}
    closed: list[Counts] = []

    def close_if_whole(place: int) -> None:
        if any(open_clusters[place]) and holds(open_clusters[place]):
            closed.append(open_clusters[place])
            open_clusters[place] = (0,) * len(free)

    for leaf in range(len(machines)):
        close_if_whole(leaf)
    for step, (a, b) in enumerate(_merges(cluster, machines)):
        open_clusters[len(machines) + step] = plus(open_clusters.pop(a), open_clusters.pop(b))
        close_if_whole(len(machines) + step)
    rest = next(iter(open_clusters.values()), ())
    if closed and any(rest):
        near = max(range(len(closed)), key=lambda place: sum(map(min, closed[place], rest)))
        closed[near] = plus(closed[near], rest)
    return closed


def _only(machine: int, machines: int) -> Counts:
    return tuple(int(place == machine) for place in range(machines))


def _merges(cluster: Cluster, machines: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Which two clusters join, in order: leaves are numbered first, then every join."""
    if len(machines) < 2:
        return
    from scipy.cluster.hierarchy import linkage

    ids = [cluster.gpu_ids.index(cluster.nodes[machine].gpu_ids[0]) for machine in machines]
    neighbours = [cluster.gpu_ids.index(cluster.nodes[machine].gpu_ids[-1]) for machine in machines]
    rates = cluster.bandwidth_matrix_bytes_per_s()[np.ix_(ids, neighbours)]
    with np.errstate(divide="ignore"):
        distance = 1 / np.minimum(rates, rates.T)
    linked = distance[np.isfinite(distance)]
    distance[~np.isfinite(distance)] = 10 * max(linked.max(initial=0.0), 1.0)
    for a, b, *_ in linkage(distance[np.triu_indices(len(ids), 1)], method="average"):
        yield int(a), int(b)


def two_even(cluster: Cluster, free: Counts) -> list[Counts]:
    """All GPUs in two groups of about the same memory, the largest dealt out first."""
    halves, sizes = [[0] * len(free), [0] * len(free)], [0, 0]
    order = sorted(range(len(free)), key=lambda machine: -cluster.nodes[machine].gpu.memory_bytes)
    for machine in np.repeat(order, [free[place] for place in order]).tolist():
        smaller = sizes.index(min(sizes))
        halves[smaller][machine] += 1
        sizes[smaller] += cluster.nodes[machine].gpu.memory_bytes
    return [tuple(half) for half in halves]


def halves(free: Counts) -> list[Counts]:
    """Both phases on every machine: half of its GPUs each, so that KV need not leave it."""
    half = tuple((count + place % 2) // 2 for place, count in enumerate(free))
    return [half, minus(free, half)]


def by_intensity(cluster: Cluster, parts: Sequence[Counts], dtype: str) -> list[Counts]:
    """The groups with the most FLOP/s per byte/s of memory bandwidth first: they suit prefill."""

    def intensity(counts: Counts) -> float:
        flops = sum(n * node.gpu.flops_for(dtype) for n, node in zip(counts, cluster.nodes, strict=True))
        return flops / sum(n * node.gpu.bandwidth_bytes_per_s for n, node in zip(counts, cluster.nodes, strict=True))

    return sorted(parts, key=lambda counts: (-intensity(counts), counts))


# ---------------------------------------------------------------- moves


class Step(NamedTuple):
    """A neighbour and the move that leads to it."""

    move: str
    grouping: Grouping


def neighbour(grouping: Grouping, rng: np.random.Generator) -> Step | None:
    """One random move: flip, split, merge or move (ThunderServe's four); None if this one is not possible here."""
    move = ("flip", "split", "merge", "move")[int(rng.integers(4))]
    made = {"flip": _flip, "split": _split, "merge": _merge, "move": _move}[move](list(grouping), rng)
    return None if made is None or not has_both_phases(made) else Step(move, canonical(made))


def flips(grouping: Sequence[Role]) -> Iterator[tuple[Role, ...]]:
    """Every change of one role that leaves both phases."""
    for place, role in enumerate(grouping):
        other: Role = "decode" if role == "prefill" else "prefill"
        changed = (*grouping[:place], other, *grouping[place + 1 :])
        if set(changed) == set(PHASES):
            yield changed


def _pick(groups: list[Group], rng: np.random.Generator) -> Group:
    return groups.pop(int(rng.integers(len(groups))))


def _phase(rng: np.random.Generator) -> Role:
    return PHASES[int(rng.integers(2))]


def _flip(groups: list[Group], rng: np.random.Generator) -> list[Group]:
    return [_pick(groups, rng).flipped, *groups]


def _split(groups: list[Group], rng: np.random.Generator) -> list[Group] | None:
    """In two, evenly by machine; odd ones go to either side in turn."""
    whole = _pick(groups, rng).counts
    if sum(whole) < 2:
        return None
    half, odd = [], int(rng.integers(2))
    for count in whole:
        half.append((count + odd) // 2 if count % 2 else count // 2)
        odd ^= count % 2
    one = tuple(half)
    if not any(one) or one == whole:
        return None
    return [Group(one, _phase(rng)), Group(minus(whole, one), _phase(rng)), *groups]


def _merge(groups: list[Group], rng: np.random.Generator) -> list[Group] | None:
    if len(groups) < 3:
        return None
    return [Group(plus(_pick(groups, rng).counts, _pick(groups, rng).counts), _phase(rng)), *groups]


def _move(groups: list[Group], rng: np.random.Generator) -> list[Group] | None:
    """Some GPUs of one machine go from one group to another."""
    if len(groups) < 2:
        return None
    source, target = _pick(groups, rng), _pick(groups, rng)
    machine = int(rng.choice(np.flatnonzero(source.counts)))
    taken = int(rng.integers(1, source.counts[machine] + 1))
    part = tuple(taken if place == machine else 0 for place in range(len(source.counts)))
    left = minus(source.counts, part)
    moved = Group(plus(target.counts, part), target.role)
    return [moved, Group(left, source.role), *groups] if any(left) else [moved, *groups]
