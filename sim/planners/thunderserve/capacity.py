"""The capacity LP: the most that a cluster carries, and a split of its GPUs that comes near to it.

Variables: how many replicas of each ``Unit``, and the KV flow from each kind of machine to each. Rows: GPUs of a kind
(by width, so that groups fit machines), prompts computed and tokens decoded against the flow, network ports, lines
between regions. In fractions of replicas it is an upper bound; in whole numbers (HiGHS' branch and bound, to a gap and
a number of nodes, never by the clock) a layout. In the manner of Melange's and HexGen-2's programs; the form is ours.

What the bound takes for granted: every replica keeps the SLO's mean time of a token, and is of one GPU type unless no
type holds the model by itself. Queues and chance are left out, so no plan reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.planners.thunderserve.parallel import link
from sim.planners.thunderserve.units import Kind, Unit, Units
from sim.types import Role

GAP = 0.01
"""Of the optimum, at which branch and bound ends."""
NODES = 2000
SPARE = 0.01
"""Worth of a request/s that could be served against one that is: GPUs that are left take part."""
FRAGILE = 0.05
"""Worth of what a GPU's loss takes with it, on average over the GPUs, against what is served."""
NIC = "nic:"


class Row(NamedTuple):
    """usage @ x <= limit."""

    name: str
    usage: NDArray[np.float64]
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """How far each phase may be loaded, and which units may be taken. ``caution``: from the most a unit serves (0) to
    what is safe (1)."""

    prefill: float = 1.0
    decode: float = 1.0
    mixed: float = 1.0
    caution: float = 0.0
    roles: tuple[Role, ...] = ("prefill", "decode", "mixed")

    def of(self, unit: Unit) -> float:
        """Requests/s that the unit is taken to serve."""
        part = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}[unit.role]
        return part * unit.between(self.caution)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The LP's optimum. ``adds``: by resource, requests/s that one more of it would add (a GPU; a tenth of a link)."""

    rate_per_s: float
    binds: str
    adds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Replicas by unit, in whole numbers, and the rate they carry by the LP at the loads they were chosen for."""

    counts: tuple[tuple[Unit, int], ...]
    rate_per_s: float

    @property
    def replicas(self) -> int:
        return sum(count for _, count in self.counts)


class Capacity:
    """One cluster's program. ``kv_bytes``: of a mean request on the way. ``prices``: $/h of a GPU by kind."""

    def __init__(self, units: Units, kv_bytes: float, prices: Sequence[float] = ()) -> None:
        self.units = units.all
        self.kinds = units.kinds
        self.kv_bytes = kv_bytes
        self.prices = prices
        self._problem = units.problem
        self._flow_per_s = max((unit.rate_per_s for unit in self.units), default=1.0)
        """Unit of the flows: near 1 is where the solver's tolerances are meant for."""
        self._pairs = [(a, b) for a, b in product(range(len(self.kinds)), repeat=2) if a == b or self._linked(a, b)]

    @property
    def _size(self) -> int:
        return len(self.units) + len(self._pairs)

    # ------------------------------------------------------------ rows

    @cached_property
    def rows(self) -> list[Row]:
        return [*self._gpu_rows(), *self._link_rows()]

    def _gpu_rows(self) -> list[Row]:
        """Of each kind and width: groups at least so wide, in widths, against those that fit its machines."""
        rows = []
        for place, kind in enumerate(self.kinds):
            widths = sorted({slot.gpus for unit in self.units for slot in unit.slots if slot.kind == place})
            for width in widths:
                usage = np.zeros(self._size)
                for at, unit in enumerate(self.units):
                    usage[at] = sum(slot.gpus // width for slot in unit.slots if slot.kind == place)
                rows.append(Row(f"gpu {place} {width}", usage, len(kind.machines) * (kind.count // width)))
        return rows

    def _flow_rows(self, loads: Loads) -> list[Row]:
        """What leaves a kind's prefill units, and what comes to its decode units, against what they can."""
        rows = []
        for end, role in enumerate(("prefill", "decode")):
            for place in range(len(self.kinds)):
                usage = np.zeros(self._size)
                for at, unit in enumerate(self.units):
                    if unit.role == role and unit.home == place:
                        usage[at] = -loads.of(unit) / self._flow_per_s
                for at, pair in enumerate(self._pairs):
                    usage[len(self.units) + at] = pair[end] == place
                rows.append(Row(f"{role} {place}", usage, 0.0))
        return rows

    def _link_rows(self) -> list[Row]:
        """Ports of all machines of a kind together, lines as they are; inside a kind KV may stay on its machine."""
        usage: dict[str, NDArray[np.float64]] = {}
        limits: dict[str, float] = {}
        for at, (a, b) in enumerate(self._pairs):
            if a == b:
                continue
            for name, share in self._way(a, b)[2]:
                key, ports = name, 1
                if name.startswith(NIC):
                    way = name.rsplit(":", 1)[1]
                    place = a if way == "out" else b
                    key, ports = f"network port ({way}) of {self._called(place)}", len(self.kinds[place].machines)
                usage.setdefault(key, np.zeros(self._size))[len(self.units) + at] += (
                    share * self.kv_bytes * self._flow_per_s
                )
                limits[key] = ports * self._problem.cluster.capacity_bytes_per_s[name]
        return [Row(key, used / limits[key], 1.0) for key, used in usage.items()]

    def _linked(self, a: int, b: int) -> bool:
        return self._way(a, b)[1] > 0

    def _way(self, a: int, b: int) -> tuple[float, float, tuple[tuple[str, float], ...]]:
        one, other = self.kinds[a].node, self.kinds[b].node
        return link(self._problem, one.gpu_ids[:1], other.gpu_ids[-1:])

    def _called(self, place: int) -> str:
        kind = self.kinds[place]
        alike = [one for one in self.kinds if one.node.gpu.name == kind.node.gpu.name]
        return kind.node.gpu.name if len(alike) == 1 else f"{kind.node.gpu.name} ({kind.node.name})"

    # ------------------------------------------------------------ what is carried

    def _served(self, loads: Loads) -> NDArray[np.float64]:
        """Requests/s of each variable: flows, and units that do both phases."""
        worth = np.full(self._size, self._flow_per_s)
        worth[: len(self.units)] = [loads.of(unit) if unit.role == "mixed" else 0.0 for unit in self.units]
        return worth

    def bound(self) -> Bound:
        """The upper bound, and what its optimum lacks most."""
        from scipy.optimize import linprog

        if not self.units:
            return Bound(rate_per_s=0.0, binds="no GPU type holds the model within the SLO")
        loads = Loads()
        rows = [*self.rows, *self._flow_rows(loads)]
        solved = linprog(
            -self._served(loads), A_ub=np.array([row.usage for row in rows]), b_ub=[row.limit for row in rows],
            method="highs",
        )  # fmt: skip
        if solved.x is None or solved.fun is None:
            return Bound(rate_per_s=0.0, binds="no GPU type holds the model within the SLO")
        adds: dict[str, float] = {}
        for row, dual in zip(rows, -solved.ineqlin.marginals, strict=True):
            kind, _, rest = row.name.partition(" ")
            if kind == "gpu":
                place, width = map(int, rest.split())
                name = self._called(place)
                adds[name] = adds.get(name, 0.0) + float(dual) / width
            elif kind not in ("prefill", "decode"):
                adds[row.name] = float(dual) * row.limit / 10
        binds = max(adds, key=lambda name: adds[name] * self._stock(name), default="nothing")
        return Bound(rate_per_s=float(-solved.fun), binds=binds, adds=adds)

    def _stock(self, name: str) -> int:
        return sum(kind.gpus for place, kind in enumerate(self.kinds) if self._called(place) == name) or 10

    # ------------------------------------------------------------ whole numbers

    def shape(self, loads: Loads) -> Shape | None:
        """The layout that carries most; GPUs that are left take part, and wide groups count as fragile."""
        served, total = self._served(loads), max(1, sum(kind.gpus for kind in self.kinds))
        worth = served.copy()
        for at, unit in enumerate(self.units):
            worth[at] += loads.of(unit) * (SPARE - FRAGILE * unit.gpus / total)
        return self._solved(-worth, [], loads)

    def cheapest(self, rate_per_s: float, loads: Loads) -> Shape | None:
        """The layout with the least rent that carries the rate; None if none does."""
        cost = np.zeros(self._size)
        for at, unit in enumerate(self.units):
            cost[at] = sum(slot.gpus * self.prices[slot.kind] for slot in unit.slots)
        enough = Row("rate", -self._served(loads) / rate_per_s, -1.0)
        return self._solved(cost, [enough], loads)

    def _solved(self, cost: NDArray[np.float64], more: Sequence[Row], loads: Loads) -> Shape | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        if not self.units:
            return None
        rows = [*self.rows, *self._flow_rows(loads), *more]
        matrix, limits = np.array([row.usage for row in rows]), np.array([row.limit for row in rows])
        whole = np.concatenate((np.ones(len(self.units), int), np.zeros(len(self._pairs), int)))
        most = np.full(self._size, np.inf)
        most[: len(self.units)] = [np.inf if unit.role in loads.roles else 0.0 for unit in self.units]
        solved = milp(
            cost, constraints=LinearConstraint(matrix, ub=limits), integrality=whole, bounds=Bounds(0, most),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )  # fmt: skip
        if solved.x is None:
            return None
        counts = np.round(solved.x[: len(self.units)]).astype(int).tolist()
        chosen = tuple((unit, count) for unit, count in zip(self.units, counts, strict=True) if count)
        return Shape(counts=chosen, rate_per_s=float(self._served(loads) @ solved.x)) if chosen else None


def kinds_used(shape: Shape, kinds: Sequence[Kind]) -> dict[str, int]:
    """GPUs by type."""
    used: dict[str, int] = {}
    for unit, count in shape.counts:
        for slot in unit.slots:
            name = kinds[slot.kind].node.gpu.name
            used[name] = used.get(name, 0) + slot.gpus * count
    return used
