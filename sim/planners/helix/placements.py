"""Placements: Helix's, and its paper's baselines, Petals, Swarm, separate pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sim.planners.helix.network import Held, Network, max_flow
from sim.planners.helix.program import solve

PROGRAM_MACHINES = 6
"""Up to so many the program is solved as well; with more, moves find in seconds what HiGHS does not in minutes."""
MOVES = 10_000
Score = tuple[float, float]


def best_placement(network: Network, *, moves: int = MOVES, seed: int = 0) -> list[Held | None]:
    """The placement of largest flow found: the baselines', improved by random moves, and the program's.

    The paper's solver starts from the baselines' placements too, and goes on for hours; ours, for want of a solver
    that does, are moves of one or two machines' layers that do not lower the flow. Equal seeds, equal answers.
    """
    starts = [petals_placement(network, start) for start in range(seed, seed + 4)]
    starts += [swarm_placement(network), separate_placement(network)]
    found = [_improved(network, max(starts, key=lambda held: _score(network, held)), moves, seed)]
    if len(network.machines) <= PROGRAM_MACHINES:
        solved = solve(network)
        found += [solved] if solved is not None else []
    return max(found, key=lambda held: _score(network, held))


def _improved(network: Network, held: list[Held | None], moves: int, seed: int) -> list[Held | None]:
    rng = np.random.default_rng(seed)
    best = _score(network, held)
    for _ in range(moves):
        other = _moved(network, held, rng)
        score = _score(network, other)
        if score >= best:
            held, best = other, score
    return held


def _score(network: Network, held: Sequence[Held | None]) -> Score:
    """Flow, and then how evenly the layers are served: on a plateau of the flow the second points the way."""
    layers = np.zeros(network.num_layers)
    for rates, mine in zip(network.node_tokens_per_s, held, strict=True):
        if mine is not None:
            layers[mine.first : mine.end] += rates[mine.end - mine.first]
    if not layers.min() > 0:
        return 0.0, float(np.count_nonzero(layers)) - network.num_layers - 1e9
    return round(max_flow(network, held)[0], 6), float(np.log(layers).sum())


def _moved(network: Network, held: Sequence[Held | None], rng: np.random.Generator) -> list[Held | None]:
    """One machine with other layers, that begin or end where others do; sometimes a second one shifted by a layer."""
    moved, count = list(held), len(held)
    i = int(rng.integers(count))
    layers = int(rng.integers(1, len(network.node_tokens_per_s[i]) + 1))
    others = [mine for j, mine in enumerate(held) if j != i and mine is not None]
    bounds = sorted({0, network.num_layers}.union(*others) if others else {0, network.num_layers})
    at = bounds[int(rng.integers(len(bounds)))]
    first = at if rng.integers(2) else at - layers
    first = max(0, min(first, network.num_layers - layers))
    moved[i] = Held(first, first + layers)
    if rng.integers(2):
        j = int(rng.integers(count))
        mine = moved[j]
        if mine is not None and j != i:
            first = mine.first + int(rng.integers(-1, 2))
            layers = mine.end - mine.first + int(rng.integers(-1, 2))
            if first >= 0 and first + layers <= network.num_layers and layers in network.node_tokens_per_s[j]:
                moved[j] = Held(first, first + layers)
    return moved


def petals_placement(network: Network, seed: int) -> list[Held | None]:
    """Nodes in random order, each with its most layers where the layers' throughputs, sorted, are lowest (Petals)."""
    order = np.random.default_rng(seed).permutation(len(network.machines))
    layers = np.zeros(network.num_layers)
    held: list[Held | None] = [None] * len(network.machines)
    for i in order:
        count = min(network.machines[i].most_layers, network.num_layers)
        starts = range(network.num_layers - count + 1)
        first = min(starts, key=lambda start: sorted(layers[start : start + count]))
        layers[first : first + count] += network.node_tokens_per_s[i][count]
        held[i] = Held(first, first + count)
    return held


def swarm_placement(network: Network) -> list[Held | None]:
    """Equal stages that every machine can hold; the fastest machines first, each to the weakest stage (Swarm)."""
    smallest = min(machine.most_layers for machine in network.machines)
    stages = -(-network.num_layers // smallest)
    if stages > len(network.machines):
        return [None] * len(network.machines)
    bounds = [network.num_layers * stage // stages for stage in range(stages + 1)]
    ranges = [Held(first, end) for first, end in pairwise(bounds)]
    able = [0.0] * stages
    held: list[Held | None] = [None] * len(network.machines)
    rate = [network.node_tokens_per_s[i][smallest] for i in range(len(network.machines))]
    for i in sorted(range(len(rate)), key=lambda i: -rate[i]):
        weakest = min(range(stages), key=lambda stage: able[stage])
        able[weakest] += rate[i]
        held[i] = ranges[weakest]
    return held


def separate_placement(network: Network) -> list[Held | None]:
    """One pipeline for each kind of machine that can hold the model among its own, in equal stages."""
    held: list[Held | None] = [None] * len(network.machines)
    for kind in dict.fromkeys(machine.kind for machine in network.machines):
        nodes = [i for i, machine in enumerate(network.machines) if machine.kind == kind]
        bounds = [network.num_layers * stage // len(nodes) for stage in range(len(nodes) + 1)]
        pieces = [Held(first, end) for first, end in pairwise(bounds)]
        if all(h.end - h.first in network.node_tokens_per_s[i] for i, h in zip(nodes, pieces, strict=True)):
            for i, piece in zip(nodes, pieces, strict=True):
                held[i] = piece
    return held
