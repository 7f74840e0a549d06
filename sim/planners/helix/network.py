"""What machines and links pass: a machine's throughput with so many layers, and the max-flow of a placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_FLOW = 1e-9
"""Tokens per second that are the solver's rounding, not a flow."""


class Held(NamedTuple):
    """Layers of a node: ``first <= layer < end``."""

    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """The requests and the fill of KV that throughput is estimated for; the defaults are the artifact's."""

    input_tokens: int = 750
    output_tokens: int = 240
    kv_share: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a node could do. ``most_layers``: with half of its memory for weights; ``fit_layers``: at all;
    ``typical_layers``: in a placement, for the mean over machines."""

    name: str
    gpus: tuple[str, ...]
    kind: str
    most_layers: int
    fit_layers: int
    typical_layers: int
    kv_tokens: Mapping[int, int]
    """KV tokens that fit beside so many layers."""
    prompt_s: Callable[[int], float]
    """Seconds of one layer for a prompt of so many tokens."""
    decode_s: Callable[[int], float]
    """Seconds of one layer for so many decoding sequences."""


class Throughput:
    """Tokens per second, prompts and answers together, of a machine with so many layers (section 3 of the paper).

    How much of the KV that fits belongs to requests whose token is here now depends on how long a token is
    elsewhere: a layer there takes the mean over the machines, each by its typical layers, where a layer of a
    machine takes the inverse of what this very estimate says; that is settled in ten rounds, as in the artifact.
    Rounding may leave it swinging between two values, so ``first_layer_s`` (seconds of a layer, by kind of machine;
    default: of 100 decodes) can matter.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        num_layers: int,
        typical: Typical | None = None,
        first_layer_s: Mapping[str, float] | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.typical = typical or Typical()
        kinds = {machine.kind: machine for machine in machines}
        self._layer_s = dict(first_layer_s or {kind: machine.decode_s(100) for kind, machine in kinds.items()})
        held = {kind: sum(m.typical_layers for m in machines if m.kind == kind) for kind in kinds}
        self._elsewhere_s = 0.0
        for _ in range(10):
            self._elsewhere_s = sum(held[kind] * self._layer_s[kind] for kind in kinds) / sum(held.values())
            self._layer_s = {
                kind: 1 / (machine.typical_layers * self.tokens_per_s(machine, machine.typical_layers))
                for kind, machine in kinds.items()
            }
        self._elsewhere_s = sum(held[kind] * self._layer_s[kind] for kind in kinds) / sum(held.values())

    def tokens_per_s(self, machine: Machine, layers: int) -> float:
        """With so many layers, of 1 to ``fit_layers``."""
        of = self.typical
        here_s = layers * self._layer_s[machine.kind]
        here = here_s / (here_s + (self.num_layers - layers) * self._elsewhere_s)
        requests = int(of.kv_share * machine.kv_tokens[layers]) / (of.input_tokens + of.output_tokens) * here
        prompts = requests / of.output_tokens
        decodes = max(1, round(requests))
        if prompts >= 1:
            tokens = of.input_tokens + of.output_tokens
            return tokens / (layers * (machine.prompt_s(of.input_tokens) + machine.decode_s(of.output_tokens)))
        new = max(1, round(of.input_tokens * prompts))
        batch_s = machine.prompt_s(int(new / prompts)) + machine.decode_s(decodes) / prompts
        return (new + decodes) / prompts / (layers * batch_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Machines, what they can pass with so many layers, and tokens per second of the links between them."""

    machines: tuple[Machine, ...]
    num_layers: int
    node_tokens_per_s: tuple[Mapping[int, float], ...]
    link_tokens_per_s: Mapping[tuple[int, int], float]
    end_tokens_per_s: tuple[float, ...]

    @property
    def upper_bound(self) -> float:
        """Tokens per second if no layer were computed twice and no link ever full."""
        return sum(max(k * rate for k, rate in rates.items()) for rates in self.node_tokens_per_s) / self.num_layers


Flows = dict[tuple[int | None, int | None], float]
"""Tokens per second from node to node; None is the coordinator."""


def max_flow(network: Network, held: Sequence[Held | None]) -> tuple[float, Flows]:
    """The largest flow of a placement (None: a node not used), and how it goes. Any hop may skip layers held twice."""
    from scipy.optimize import linprog

    edges = list(_edges(network, held))
    if not edges:
        return 0.0, {}
    into = _incidence([target for _, target, _ in edges], len(held))
    out = _incidence([source for source, _, _ in edges], len(held))
    most = [0.0 if h is None else network.node_tokens_per_s[i][h.end - h.first] for i, h in enumerate(held)]
    cost = np.array([-1.0 if source is None else 0.0 for source, _, _ in edges])
    bounds = [(0.0, capacity) for *_, capacity in edges]
    balance = np.zeros(len(held))
    solved = linprog(cost, A_ub=into, b_ub=np.array(most), A_eq=into - out, b_eq=balance, bounds=bounds, method="highs")
    assert solved.x is not None, "no flow at all is always possible"
    assert solved.fun is not None
    flows = {edge[:2]: float(flow) for edge, flow in zip(edges, solved.x, strict=True) if flow > LEAST_FLOW}
    return float(-solved.fun), flows


Edge = tuple[int | None, int | None, float]


def _edges(network: Network, held: Sequence[Held | None]) -> Iterator[Edge]:
    """Hops that the layers allow (source, target, tokens per second of the link)."""
    for i, mine in enumerate(held):
        if mine is None:
            continue
        if mine.first == 0:
            yield None, i, network.end_tokens_per_s[i]
        if mine.end == network.num_layers:
            yield i, None, network.end_tokens_per_s[i]
        for j, other in enumerate(held):
            if j != i and other is not None and other.first <= mine.end < other.end:
                yield i, j, network.link_tokens_per_s[i, j]


def _incidence(ends: Sequence[int | None], nodes: int) -> NDArray[np.float64]:
    """1 where an edge (column) ends at a node (row)."""
    matrix = np.zeros((nodes, len(ends)))
    for column, node in enumerate(ends):
        if node is not None:
            matrix[node, column] = 1.0
    return matrix
