"""Layouts worth a look, before anything is simulated: near-optimal ones by the capacity program, and their neighbours.

``Survey`` holds one cluster's units, program and placer. ``shapes`` asks the program at several loads of the phases,
with and without groups that do both; ``neighbours`` changes a layout by one step. The phases' loads matter because
queues and chance cost one phase more than the other, by an amount that only a replay or a simulation tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import combinations, product

from sim.planners.thunderserve.capacity import Capacity, Loads, Shape
from sim.planners.thunderserve.orchestrate import Links
from sim.planners.thunderserve.parallel import Layouts
from sim.planners.thunderserve.place import Placed, Placer
from sim.planners.thunderserve.replay import Sample
from sim.planners.thunderserve.units import Kind, Slot, Unit, Units
from sim.policy import Problem
from sim.transfers import Quantized
from sim.types import Plan, Role

SPLIT: tuple[Role, ...] = ("prefill", "decode")
RATIOS = ((1.0, 1.0), (0.8, 1.0), (1.0, 0.8))
"""Loads of prefill and decode."""
CAUTION = (0.25, 0.6, 1.0)
LOADS = tuple(
    Loads(prefill=prefill, decode=decode, caution=caution, roles=roles)
    for caution, (prefill, decode), roles in product(CAUTION, RATIOS, (SPLIT, (*SPLIT, "mixed")))
) + tuple(Loads(caution=caution, roles=("mixed",)) for caution in CAUTION)
CHEAP_LOADS = (1.1, 1.0, 0.92, 0.85, 0.78, 0.7, 0.6, 0.5)
"""Loads for which the least rent is looked for."""
TP_OF_SIMPLE = (1, 2, 4)


class Survey:
    """``without``: GPUs that are gone. ``prices``: $/h by GPU type, for the least rent."""

    def __init__(
        self, problem: Problem, transfer: Quantized, without: Collection[str] = (), *, spot: bool = False
    ) -> None:
        free = [[gpu for gpu in node.gpu_ids if gpu not in without] for node in problem.cluster.nodes]
        self.problem = problem
        self.layouts = Layouts(problem, Sample.of(problem))
        self.units = Units(self.layouts, free)
        links = Links(self.layouts, transfer)
        self.placer = Placer(self.units, links, free)
        prices = [kind.node.gpu.usd_per_hour_spot if spot else kind.node.gpu.usd_per_hour for kind in self.kinds]
        self.priced = all(price is not None for price in prices)
        self.capacity = Capacity(self.units, float(links.sent_bytes.mean()), [price or 0.0 for price in prices])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return self.units.kinds

    def shapes(self, *, colocated: bool = True) -> list[Shape]:
        """Near-optimal layouts at several loads and cautions; ``colocated``: groups may do both phases."""
        found: dict[tuple[tuple[Unit, int], ...], Shape] = {}
        for one in (one for one in LOADS if colocated or "mixed" not in one.roles):
            shape = self.capacity.shape(one)
            if shape is not None:
                found.setdefault(shape.counts, shape)
        return list(found.values())

    def cheap(self, rate_per_s: float, *, colocated: bool = True) -> list[Shape]:
        """Layouts of little rent that carry the rate at several loads."""
        roles: tuple[Role, ...] = (*SPLIT, "mixed") if colocated else SPLIT
        found: dict[tuple[tuple[Unit, int], ...], Shape] = {}
        for load in CHEAP_LOADS:
            shape = self.capacity.cheapest(
                rate_per_s, Loads(prefill=load, decode=load, mixed=load, caution=CAUTION[1], roles=roles)
            )
            if shape is not None:
                found.setdefault(shape.counts, shape)
        return list(found.values())

    def split_by_type(self) -> Iterator[tuple[str, Shape]]:
        """Every division of the GPU types into prefill and decode, at TP 1, 2 and 4: what one would lay out by hand."""
        names = list(dict.fromkeys(kind.node.gpu.name for kind in self.kinds))
        for size in range(1, len(names)):
            for chosen in combinations(names, size):
                for tp in TP_OF_SIMPLE:
                    counts = self._uniform(chosen, tp)
                    if counts is not None:
                        yield f"{' + '.join(chosen)} prefill, TP {tp}", Shape(counts=counts, rate_per_s=0.0)

    def _uniform(self, prefill: Collection[str], tp: int) -> tuple[tuple[Unit, int], ...] | None:
        """All of a type in one phase; where ``tp`` GPUs do not hold the model, the fewest that do."""
        counts: list[tuple[Unit, int]] = []
        for place, kind in enumerate(self.kinds):
            role: Role = "prefill" if kind.node.gpu.name in prefill else "decode"
            able = [
                unit for unit in self.units.all
                if unit.role == role and len(unit.slots) == 1 and unit.slots[0].kind == place
                and unit.gpus >= tp and len(unit.stages) == 1
            ]  # fmt: skip
            if not able:
                return None
            unit = min(able, key=lambda one: (one.gpus, -one.rate_per_s))
            counts.append((unit, len(kind.machines) * (kind.count // unit.gpus)))
        return tuple(counts) if {unit.role for unit, _ in counts} == set(SPLIT) else None

    # ------------------------------------------------------------ one step away

    def neighbours(self, shape: Shape, *, colocated: bool = True) -> list[Placed]:
        """Layouts one step away, placed, the one that is likely to carry most first."""
        seen = {frozenset(shape.counts)}
        placed = []
        for counts in self._steps(Counter(dict(shape.counts))):
            key = frozenset((unit, count) for unit, count in counts.items() if count > 0)
            if key in seen or not (colocated or all(unit.role != "mixed" for unit, _ in key)):
                continue
            seen.add(key)
            found = self.placer.of(Shape(counts=tuple(sorted(key, key=self._order)), rate_per_s=0.0))
            if found is not None:
                placed.append(found)
        return sorted(placed, key=lambda one: -one.likely_per_s)

    def _order(self, pair: tuple[Unit, int]) -> int:
        return self.units.all.index(pair[0])

    def _steps(self, now: Counter[Unit]) -> Iterator[Counter[Unit]]:
        by_slots: dict[tuple[Slot, ...], list[Unit]] = {}
        for unit in self.units.all:
            by_slots.setdefault(unit.slots, []).append(unit)
        held = [unit for unit, count in now.items() if count > 0]
        for unit in held:
            for other in by_slots[unit.slots]:  # another phase or configuration
                yield now + Counter([other]) - Counter([unit])
            yield from self._resized(now, unit, by_slots)
        for one, other in combinations(held, 2):  # two types change phases
            for a in (u for u in by_slots[one.slots] if u.role == other.role):
                for b in (u for u in by_slots[other.slots] if u.role == one.role):
                    if one.role != other.role:
                        yield now + Counter([a, b]) - Counter([one, other])
        for unit in self.units.all:  # GPUs that are left
            yield now + Counter([unit])

    def _resized(
        self, now: Counter[Unit], unit: Unit, by_slots: dict[tuple[Slot, ...], list[Unit]]
    ) -> Iterator[Counter[Unit]]:
        """In two halves of any phases, or with another of its kind and width."""
        if len(unit.slots) > 1:
            return
        kind, gpus = unit.slots[0]
        for a, b in product(by_slots.get((Slot(kind, gpus // 2),), ()), repeat=2):
            if gpus % 2 == 0:
                yield now + Counter([a, b]) - Counter([unit])
        for wide in by_slots.get((Slot(kind, 2 * gpus),), ()):
            for other in [u for u, count in now.items() if u.slots == unit.slots and count > (u == unit)]:
                yield now + Counter([wide]) - Counter([unit]) - Counter([other])

    # ------------------------------------------------------------ the shape of a plan

    def shape_of(self, plan: Plan) -> Shape | None:
        """A plan's replicas as units; None if one of them is none."""
        kind_of = {machine: place for place, kind in enumerate(self.kinds) for machine in kind.machines}
        index = {node.name: place for place, node in enumerate(self.problem.cluster.nodes)}
        counts: Counter[Unit] = Counter()
        for replica in plan.replicas:
            gpus = Counter(kind_of.get(index[self.problem.cluster.node(gpu).name], -1) for gpu in replica.gpus)
            cuts = [(stage.tp, stage.num_layers) for stage in replica.stages]
            alike = (
                unit for unit in self.units.all
                if unit.role == replica.role and Counter({slot.kind: slot.gpus for slot in unit.slots}) == gpus
                and [(stage.tp, stage.num_layers) for stage in unit.stages] == cuts
            )  # fmt: skip
            found = next(alike, None)
            if found is None:
                return None
            counts[found] += 1
        return Shape(counts=tuple(sorted(counts.items(), key=self._order)), rate_per_s=0.0)


def signature(plan: Plan, types: dict[str, str]) -> tuple[tuple[str, tuple[tuple[str, int, int], ...]], ...]:
    """What tells layouts apart: phases, GPU types (``types``, by GPU), TP and layers; not which GPU of a machine."""
    return tuple(
        sorted(
            (one.role, tuple((types[stage.gpus[0]], stage.tp, stage.num_layers) for stage in one.stages))
            for one in plan.replicas
        )
    )
