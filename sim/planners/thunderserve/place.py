"""From a shape (replicas by unit) to a plan: GPUs by name, and the shares of the traffic that load them evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sim.planners.thunderserve.balance import Balance, Resource, balanced
from sim.planners.thunderserve.capacity import Shape
from sim.planners.thunderserve.orchestrate import LINK_SHARE, Links
from sim.planners.thunderserve.replay import Floats
from sim.planners.thunderserve.units import ROLES, Unit, Units
from sim.types import Plan, Replica, Role

LIKELY = 0.4
"""How cautious the likely rates are: queues that are shared by several replicas wait less than each by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A plan, its shares balanced by what its replicas are likely to serve.

    ``rate_per_s``: the most that it could carry by the LP; ``likely_per_s``: the same with the likely rates.
    """

    plan: Plan
    rate_per_s: float
    likely_per_s: float
    binds: str
    loss: float
    """The largest part of a phase's capacity that one GPU's loss takes with it."""


class Placer:
    """Places shapes, and balances any plan. Machines are those of ``free`` (by machine of the cluster)."""

    def __init__(self, units: Units, links: Links, free: Sequence[Sequence[str]]) -> None:
        self._units, self._links, self._free = units, links, free
        self._cluster = units.problem.cluster
        self._rate_per_s = units.problem.workload.rate_per_s
        self._traffic = self._rate_per_s * float(links.sent_bytes.mean())

    def of(self, shape: Shape) -> Placed | None:
        """Phases apart or side by side on the machines, whichever the links like better; None if it does not fit."""
        best: Placed | None = None
        for spread in (False, True):
            replicas = self._replicas(shape, spread)
            found = None if replicas is None else self.balance(replicas)
            if found is not None and (best is None or found.likely_per_s > best.likely_per_s * (1 + 1e-9)):
                best = found
        return best

    # ------------------------------------------------------------ which GPUs

    def _replicas(self, shape: Shape, spread: bool) -> list[Replica] | None:
        left = [list(gpus) for gpus in self._free]
        here: Counter[tuple[int, Role]] = Counter()
        numbers: Counter[Role] = Counter()
        found = []
        todo = [unit for unit, count in shape.counts for _ in range(count)]
        for unit in sorted(todo, key=lambda unit: -max(slot.gpus for slot in unit.slots)):
            machines = self._machines(unit, left, here if spread else None)
            if machines is None:
                return None
            taken = [
                iter([left[m].pop(0) for _ in range(slot.gpus)]) for m, slot in zip(machines, unit.slots, strict=True)
            ]
            here.update((machine, unit.role) for machine in machines)
            found.append(self._replica(unit, f"{unit.role}{numbers[unit.role]}", taken))
            numbers[unit.role] += 1
        return sorted(found, key=lambda one: ROLES.index(one.role))

    def _machines(
        self, unit: Unit, left: Sequence[Sequence[str]], here: Counter[tuple[int, Role]] | None
    ) -> list[int] | None:
        """The fullest machine with room, or (``here``) the one with the fewest replicas of the phase; none twice."""
        chosen: list[int] = []
        for slot in unit.slots:
            able = [m for m in self._units.kinds[slot.kind].machines if len(left[m]) >= slot.gpus and m not in chosen]
            if not able:
                return None
            alike = {m: 0 if here is None else here[m, unit.role] for m in able}
            chosen.append(min(able, key=lambda m: (alike[m], len(left[m]), m)))
        return chosen

    def _replica(self, unit: Unit, name: str, taken: Sequence[Iterable[str]]) -> Replica:
        example = {self._cluster.node(stage.gpus[0]).name: None for stage in unit.stages}
        slot_of = self._slot_of(unit, list(example))
        sources = [iter(gpus) for gpus in taken]
        stages = []
        for number, stage in enumerate(unit.stages):
            source = sources[slot_of[self._cluster.node(stage.gpus[0]).name]]
            stages.append(replace(stage, name=f"{name}.{number}", gpus=tuple(next(source) for _ in stage.gpus)))
        return Replica(name=name, role=unit.role, stages=tuple(stages))

    def _slot_of(self, unit: Unit, examples: Sequence[str]) -> dict[str, int]:
        """Which slot an example machine stands for."""
        open_slots = list(range(len(unit.slots)))
        slot_of = {}
        for name in examples:
            machine = next(place for place, node in enumerate(self._cluster.nodes) if node.name == name)
            slot = next(s for s in open_slots if machine in self._units.kinds[unit.slots[s].kind].machines)
            open_slots.remove(slot)
            slot_of[name] = slot
        return slot_of

    # ------------------------------------------------------------ who sends to whom

    def balance(self, replicas: Sequence[Replica]) -> Placed | None:
        """None if a phase is missing, or the SLO cannot be kept by one of them."""
        by_role: dict[Role, list[Replica]] = {"prefill": [], "decode": [], "mixed": []}
        for replica in replicas:
            by_role[replica.role].append(replica)
        if bool(by_role["prefill"]) != bool(by_role["decode"]):
            return None
        linked, shared = self._ways(by_role["prefill"], by_role["decode"])
        most, likely = (
            {role: self._rates(some, caution) for role, some in by_role.items()} for caution in (0.0, LIKELY)
        )
        if any((some <= 0).any() for some in likely.values()):
            return None
        found, limit = (
            balanced(p / self._rate_per_s, d / self._rate_per_s, m / self._rate_per_s, linked, shared)
            for p, d, m in ([rates[role] for role in ROLES] for rates in (likely, most))
        )
        if found is None or limit is None:
            return None
        return Placed(
            plan=Plan(replicas=tuple(replicas), shares=_shares(by_role, found)),
            rate_per_s=limit.headroom * self._rate_per_s,
            likely_per_s=found.headroom * self._rate_per_s,
            binds=_named(found.binds, by_role),
            loss=max(float(some.max() / some.sum()) for some in likely.values() if len(some)),
        )

    def _rates(self, replicas: Sequence[Replica], caution: float) -> Floats:
        layouts = self._units.layouts
        rates = np.array([self._units.rates(layouts.on_example(one), one.role) for one in replicas]).reshape(-1, 2)
        found: Floats = rates[:, 0] + caution * (rates[:, 1] - rates[:, 0])
        return found

    def _ways(
        self, prefills: Sequence[Replica], decodes: Sequence[Replica]
    ) -> tuple[NDArray[np.bool_], list[Resource]]:
        linked = np.zeros((len(prefills), len(decodes)), dtype=bool)
        usage: dict[str, Floats] = {}
        for i, a in enumerate(prefills):
            for j, b in enumerate(decodes):
                _, rate, shared = self._links.of(a.stages, b.stages)
                linked[i, j] = rate > 0
                for name, share in shared:
                    usage.setdefault(name, np.zeros(linked.shape))[i, j] = share
        capacity = self._cluster.capacity_bytes_per_s
        rows = [
            Resource(name=name, usage=used * self._traffic / (LINK_SHARE * capacity[name]))
            for name, used in usage.items()
        ]
        return linked, rows


def _shares(by_role: dict[Role, list[Replica]], found: Balance) -> dict[tuple[str, str], float]:
    shares = {
        (a.name, b.name): float(found.pairs[i, j])
        for i, a in enumerate(by_role["prefill"])
        for j, b in enumerate(by_role["decode"])
        if found.pairs[i, j] > 0
    }
    shares.update(
        {(one.name, one.name): float(found.mixed[i]) for i, one in enumerate(by_role["mixed"]) if found.mixed[i]}
    )
    return shares


def _named(name: str, by_role: dict[Role, list[Replica]]) -> str:
    """``prefill 0`` as the phase's replicas are called together, a link by its name."""
    role, _, place = name.partition(" ")
    return f"the {role} replicas" if role in by_role and place.isdecimal() else f"link {name}"
