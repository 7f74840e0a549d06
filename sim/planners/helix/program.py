"""The placement as a mixed-integer program (Helix, ASPLOS 2025, section 4), with partial inference, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import numpy as np

from sim.planners.helix.network import Held, Network


def solve(network: Network, *, gap: float = 0.005, branches: int = 20_000) -> list[Held | None] | None:
    """The placement of largest flow, within ``gap`` of the bound or after so many branches; None if none was found."""
    from scipy.optimize import milp

    model = _Milp(network)
    solved = milp(
        model.cost, constraints=model.constraints(), integrality=model.whole, bounds=model.bounds(),
        options={"node_limit": branches, "mip_rel_gap": gap},
    )  # fmt: skip
    return None if solved.x is None else model.placement(solved.x)


class _Milp:
    """Columns: first layer of each node; which number of layers it holds; flow and use of each link; two flags of each
    inner link, for partial inference: the next node begins no later than this one ends, and ends later."""

    def __init__(self, network: Network) -> None:
        self.network = network
        nodes = range(len(network.machines))
        self.links: list[tuple[int | None, int | None]] = [(None, i) for i in nodes] + [(i, None) for i in nodes]
        self.links += [(i, j) for i in nodes for j in nodes if i != j]
        names: list[Any] = [("s", i) for i in nodes]
        names += [("b", i, k) for i in nodes for k in network.node_tokens_per_s[i]]
        names += [(letter, *link) for letter in "fd" for link in self.links]
        names += [(letter, *link) for letter in ("c1", "c2") for link in self.links if None not in link]
        self.column = {name: number for number, name in enumerate(names)}
        self.whole = np.array([0 if name[0] == "f" else 1 for name in names])
        self.cost = np.zeros(len(names))
        for i in nodes:
            self.cost[self.column["f", None, i]] = -1.0
        self._rows: list[tuple[dict[Any, float], float, float]] = []

    def bounds(self) -> Any:
        from scipy.optimize import Bounds

        upper = np.ones(len(self.column))
        for name, column in self.column.items():
            if name[0] == "s":
                upper[column] = self.network.num_layers - 1
            elif name[0] == "f":
                upper[column] = self._capacity(name[1], name[2])
        return Bounds(0, upper)

    def constraints(self) -> Any:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        self._rows = []
        for i, rates in enumerate(self.network.node_tokens_per_s):
            self._node(i, rates)
        for link in self.links:
            self._link(*link)
        entries = [
            (row, self.column[name], value)
            for row, (terms, _, _) in enumerate(self._rows)
            for name, value in terms.items()
        ]
        rows, columns, values = zip(*entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._rows), len(self.column)))
        return LinearConstraint(matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows])

    def _node(self, i: int, rates: Mapping[int, float]) -> None:
        held = {("b", i, k): 1.0 for k in rates}
        self._row(held, 1, 1)
        self._row(self._end(i), -inf, self.network.num_layers)
        into = {("f", a, b): 1.0 for a, b in self.links if b == i}
        self._row(into | {("f", a, b): -1.0 for a, b in self.links if a == i}, 0, 0)
        self._row(into | {("b", i, k): -rate for k, rate in rates.items()}, -inf, 0)

    def _link(self, a: int | None, b: int | None) -> None:
        layers = self.network.num_layers
        self._row({("f", a, b): 1.0, ("d", a, b): -self._capacity(a, b)}, -inf, 0)
        if a is None:  # used: b begins at layer 0
            self._row({("s", b): 1.0, ("d", a, b): layers}, -inf, layers)
        elif b is None:  # used: a ends at the last layer
            self._row({("d", a, b): float(layers)} | _minus(self._end(a)), -inf, 0)
        else:
            self._row({("s", b): 1.0, ("c1", a, b): layers + 1.0} | _minus(self._end(a)), -inf, layers + 1)
            longer = self._end(b)
            for name, value in self._end(a).items():
                longer[name] = longer.get(name, 0.0) - value
            self._row(longer | {("c2", a, b): -(layers + 1.0)}, -layers, inf)
            self._row({("d", a, b): 2.0, ("c1", a, b): -1.0, ("c2", a, b): -1.0}, -inf, 0)

    def _end(self, i: int) -> dict[Any, float]:
        return {("s", i): 1.0} | {("b", i, k): float(k) for k in self.network.node_tokens_per_s[i]}

    def _row(self, terms: dict[Any, float], low: float, high: float) -> None:
        self._rows.append((terms, low, high))

    def _capacity(self, a: int | None, b: int | None) -> float:
        """No more than the nodes at its ends could pass: a tight bound makes a tight relaxation."""
        ends = [max(self.network.node_tokens_per_s[i].values()) for i in (a, b) if i is not None]
        if a is None or b is None:
            node = b if a is None else a
            assert node is not None
            return min(*ends, self.network.end_tokens_per_s[node])
        return min(*ends, self.network.link_tokens_per_s[a, b])

    def placement(self, solution: Any) -> list[Held | None]:
        held: list[Held | None] = []
        for i, rates in enumerate(self.network.node_tokens_per_s):
            first = round(solution[self.column["s", i]])
            layers = max(rates, key=lambda k, i=i: solution[self.column["b", i, k]])  # type: ignore[misc]
            held.append(Held(first, first + layers))
        return held


def _minus(terms: Mapping[Any, float]) -> dict[Any, float]:
    return {name: -value for name, value in terms.items()}
