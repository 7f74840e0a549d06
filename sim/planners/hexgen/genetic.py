"""HexGen's genetic search: which GPUs form a replica. Mutations only, no crossover, as its authors' scripts have it.

First the number of replicas counts, then (from generation ``COUNTING`` on) the goodput of a quick replay. Mended or
ours: both halves of a split must hold the model; the best partition of every number of replicas enters the second
phase, since merging is too rare to find the way back from too many; equal goodput is told apart by latency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from sim.planners.hexgen.layout import Counts

COUNTING = 100
POPULATION, OFFSPRING, TOURNAMENT, ELITE = 100, 10, 3, 3
MERGE_SHARE = 0.001
"""Of the changes to the number of groups; all others split one."""

Partition = tuple[Counts, ...]
"""Groups in order; all GPUs of a region are in one of its groups."""
Fitness = tuple[float, float]
"""Less is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Genetic:
    """``enough``: whether a group's memory could hold the model; ``valid``: whether a layout does; ``judge``: the
    second phase's fitness. ``region``: of each machine; groups of two regions never mix."""

    region: Sequence[str]
    enough: Callable[[Counts], bool]
    valid: Callable[[Counts], bool]
    judge: Callable[[Partition], Fitness]
    generations: int = 300

    def search(
        self,
        starts: Sequence[Partition],
        rng: np.random.Generator,
        progress: Callable[[int, float], None] | None = None,
    ) -> Partition:
        """The best that comes of these; they must be valid."""
        judge = cache(self.judge)
        first: dict[int, Partition] = {}  # by number of replicas
        more = POPULATION - len(starts)
        population = [*starts, *(self.mutated(starts[turn % len(starts)], rng) for turn in range(more))]
        for generation in range(self.generations):
            counting = generation < COUNTING and generation < self.generations // 2
            fitness = self._by_number if counting else self._by(judge)
            if not counting and first:
                population = list(dict.fromkeys([*first.values(), *population]))
                first = {}
            population.sort(key=lambda one: (fitness(one), one))
            if counting:
                for one in population:
                    if self._holds(one):
                        first.setdefault(len(one), one)
            if progress is not None:
                progress(generation, 0.0 if counting else 1 / max(fitness(population[0])[0], 1e-9))
            children = [self._child(population, fitness, rng) for _ in range(OFFSPRING)]
            population = [*population[:ELITE], *children]
        known = [one for one in dict.fromkeys([*starts, *first.values(), *population]) if self._holds(one)]
        return min(known, key=lambda one: (judge(one), one))

    def _child(
        self, population: Sequence[Partition], fitness: Callable[[Partition], Fitness], rng: np.random.Generator
    ) -> Partition:
        """Of a tournament's winner; a child that is worse gets one more try."""
        drawn = rng.integers(len(population), size=TOURNAMENT).tolist()
        parent = min((population[place] for place in drawn), key=lambda one: (fitness(one), one))
        child = self.mutated(parent, rng)
        return child if fitness(child) <= fitness(parent) else self.mutated(parent, rng)

    def _by_number(self, partition: Partition) -> Fitness:
        return (1 / len(partition), 0.0) if self._holds(partition) else (1e9, 0.0)

    def _by(self, judge: Callable[[Partition], Fitness]) -> Callable[[Partition], Fitness]:
        return lambda partition: judge(partition) if self._holds(partition) else (1e9, 0.0)

    def _holds(self, partition: Partition) -> bool:
        return all(self.valid(group) for group in partition)

    # ------------------------------------------------------------ mutations

    def mutated(self, partition: Partition, rng: np.random.Generator) -> Partition:
        """One region's groups changed; the same if the change left a group without enough memory."""
        regions = list(dict.fromkeys(self._region_of(group) for group in partition))
        region = regions[int(rng.integers(len(regions)))]
        own = [group for group in partition if self._region_of(group) == region]
        others = [group for group in partition if self._region_of(group) != region]
        changed = self._moved(own, rng) if rng.random() < 0.5 else self._regrouped(own, rng)
        if changed is None or not all(self.enough(group) for group in changed):
            return partition
        return tuple(sorted([*others, *changed], reverse=True))

    def _region_of(self, group: Counts) -> str:
        return next(self.region[machine] for machine, count in enumerate(group) if count)

    def _moved(self, groups: list[Counts], rng: np.random.Generator) -> list[Counts] | None:
        """A GPU from one group to another, of the kind that this one has most of if there is one."""
        if len(groups) < 2:
            return None
        a, b = rng.choice(len(groups), size=2, replace=False).tolist()
        source, target = groups[a], groups[b]
        wanted = max(range(len(target)), key=target.__getitem__)
        has = [machine for machine, count in enumerate(source) if count]
        machine = wanted if source[wanted] else has[int(rng.integers(len(has)))]
        if sum(source) == 1:
            return None
        found = list(groups)
        found[a] = _with(source, machine, -1)
        found[b] = _with(target, machine, 1)
        return found

    def _regrouped(self, groups: list[Counts], rng: np.random.Generator) -> list[Counts] | None:
        if rng.random() < MERGE_SHARE and len(groups) > 1:
            a, b = sorted(rng.choice(len(groups), size=2, replace=False).tolist())
            merged = tuple(x + y for x, y in zip(groups[a], groups[b], strict=True))
            return [*(group for place, group in enumerate(groups) if place not in (a, b)), merged]
        place = int(rng.integers(len(groups)))
        half = tuple(count // 2 for count in groups[place])
        rest = tuple(count - part for count, part in zip(groups[place], half, strict=True))
        if not any(half):
            return None
        return [*groups[:place], *groups[place + 1 :], half, rest]


def _with(group: Counts, machine: int, more: int) -> Counts:
    return tuple(count + more * (place == machine) for place, count in enumerate(group))
