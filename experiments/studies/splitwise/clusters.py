"""Splitwise's cluster figures (ISCA 2024, sections 6.2 to 6.5): machines for a goal, in its simulator and in ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from experiments.studies.published import Basis, Comparison, Kind, row
from experiments.studies.splitwise.search import Resource, Search
from experiments.studies.splitwise.world import POWER, USD_PER_HOUR, Letter, World
from sim.planners.provisioning import Design, Throughput

EACH: Resource = {"A": 1.0, "H": 1.0, "C": 1.0}
"""A machine is a machine."""
POWER_BUDGET = 40 * POWER["H"]
USD_BUDGET = 40 * USD_PER_HOUR["H"]
"""Of 40 DGX-H100: what all clusters of section 6.2, and those of equal cost of section 6.3, may take."""

OVERLOAD_PER_S = 4.0
"""Conversations a machine and second: several times what any serves."""

Kinds = tuple[Letter, Letter | None]
"""Prompt and token machines; None: both phases on all."""
AA: Kinds = ("A", "A")
HH: Kinds = ("H", "H")
HA: Kinds = ("H", "A")
HHCAP: Kinds = ("H", "C")
BASE_A: Kinds = ("A", None)
BASE_H: Kinds = ("H", None)


def clusters(theirs: Search, ours: Search) -> Iterator[Comparison]:
    """Every row of the cluster evaluation, in splitwise-sim's model and in the corrected one."""
    for search, compat in ((theirs, True), (ours, False)):
        rows = Clusters(search, compat)
        yield from rows.cheapest()
        yield from rows.splits()
        yield from rows.equal_power()
        yield from rows.equal_cost()
        yield from rows.equal_rate()
        yield from rows.wrong_workload()
        yield from rows.batch_job()


class Clusters:
    """The rows in one model of the machines; searches that several rows need are kept by ``search.verdicts``."""

    def __init__(self, search: Search, compat: bool) -> None:
        self.search = search
        self.compat = compat
        self.basis: Basis = "splitwise-sim's model" if compat else "measured profile"
        self.label = "splitwise-sim" if compat else "corrected"
        self.scale = search.scale.machines

    def world(self, kinds: Kinds, trace: str) -> World:
        return World(prompt=kinds[0], token=kinds[1], trace=trace, compat=self.compat)

    def most(self, kinds: Kinds, trace: str, per_machine: Resource = POWER, budget: float = POWER_BUDGET) -> Throughput:
        """The best cluster; no machines and no requests if none serves any."""
        return self.search.most(self.world(kinds, trace), per_machine, budget) or Throughput(Design(0, 0), 0.0)

    # ------------------------------------------------------------ how many machines

    def cheapest(self) -> Iterator[Comparison]:
        """Figure 12: the cheapest Splitwise-HH for coding at 70 requests/s."""
        found = self.search.fewest(self.world(HH, "coding"), EACH, 70.0, Design(45, 12))
        for role, printed, ours in (
            ("prompt", 27, found and found.prompts),
            ("token", 3, found and found.tokens),
            ("all", 30, found and sum(found)),
        ):
            what = f"Splitwise-HH ({self.label}), coding 70 req/s, {role} machines"
            yield self.row("Fig. 12", what, printed * self.scale, ours, "", kind="aim")

    def splits(self) -> Iterator[Comparison]:
        """Section 6.2: the best split of 70 DGX-A100 or 40 DGX-H100."""
        for kinds, trace, machines, prompts in (
            (AA, "coding", 70, 55),
            (HH, "coding", 40, 35),
            (HH, "conversation", 40, 25),
        ):
            found = self.most(kinds, trace)
            what = f"Splitwise-{kinds[0]}{kinds[1]} ({self.label}), {trace}, prompt machines of {machines}"
            note = f"{found.rate_per_s:g} req/s"
            yield self.row("Sec. 6.2", what, prompts * self.scale, found.design.prompts, "", kind="aim", note=note)

    # ------------------------------------------------------------ what they serve

    def equal_power(self) -> Iterator[Comparison]:
        """Figure 18a. HA is cheaper than 40 DGX-H100 only (70 DGX-A100 cost less), so that is its baseline."""
        yield self.gain("Fig. 18a", AA, BASE_A, 2.15, "equal power and cost", POWER, POWER_BUDGET)
        yield self.gain("Fig. 18a", HA, BASE_H, 1.18, "equal power", POWER, POWER_BUDGET)
        design = self.most(HA, "conversation").design
        saved = 100 * (1 - self.world(HA, "conversation").amount(design, USD_PER_HOUR) / (USD_BUDGET * self.scale))
        what = f"Splitwise-HA ({self.label}), equal power: cheaper than Baseline-H100 by"
        yield self.row("Fig. 18a", what, 10, saved if sum(design) else None, "%", note=f"{_machines(design)} machines")

    def equal_cost(self) -> Iterator[Comparison]:
        yield self.gain("Fig. 18b", AA, BASE_H, 1.4, "equal cost", USD_PER_HOUR, USD_BUDGET)
        machines = sum(self.most(AA, "conversation", USD_PER_HOUR, USD_BUDGET).design)
        what = f"Splitwise-AA ({self.label}), equal cost: power over Baseline-H100"
        ours = machines / (POWER_BUDGET * self.scale) or None
        yield self.row("Fig. 18b", what, 1.25, ours, "x", note=f"{machines} machines")

    def gain(
        self, where: str, kinds: Kinds, base: Kinds, printed: float, what: str, per_machine: Resource, budget: float
    ) -> Comparison:
        split, plain = (self.most(each, "conversation", per_machine, budget) for each in (kinds, base))
        ours = split.rate_per_s / plain.rate_per_s if plain.rate_per_s else None
        names = [self.world(each, "conversation").name for each in (kinds, base)]
        note = (
            f"{_machines(split.design)} for {split.rate_per_s:g}/s, {plain.design.prompts} for {plain.rate_per_s:g}/s"
        )
        return self.row(where, f"{names[0]} ({self.label}) over {names[1]}, {what}", printed, ours, "x", note=note)

    def equal_rate(self) -> Iterator[Comparison]:
        """Figure 19: the machines of least power, and least cost, that serve what 40 DGX-H100 do."""
        rate = self.most(BASE_H, "conversation").rate_per_s / self.scale
        cases = (
            ("Fig. 19a", HHCAP, POWER, POWER_BUDGET, "power"),
            ("Fig. 19b", AA, USD_PER_HOUR, USD_BUDGET, "cost"),
        )
        for where, kinds, per_machine, budget, what in cases:
            world = self.world(kinds, "conversation")
            most = Design(*(int(budget / per_machine[kind]) for kind in kinds if kind))
            found = self.search.fewest(world, per_machine, rate, most) if rate else None
            ours = found and 100 * (1 - world.amount(found, per_machine) / (budget * self.scale))
            note = (
                f"{_machines(found)} machines for {rate * self.scale:g}/s" if found else "none serves its rate for less"
            )
            yield self.row(where, f"{world.name} ({self.label}), equal rate: less {what} by", 25, ours, "%", note=note)

    def wrong_workload(self) -> Iterator[Comparison]:
        """Figure 20a: conversations on the cluster provisioned for coding, over one provisioned for conversations."""
        for kinds, printed in ((AA, 1.0), (HH, 1.0), (HA, 0.93), (HHCAP, 0.93)):
            wrong, right = self.most(kinds, "coding").design, self.most(kinds, "conversation")
            world = self.world(kinds, "conversation")
            rate = self.search.rate(world, wrong) if sum(wrong) else 0.0
            ours = rate / right.rate_per_s if right.rate_per_s else None
            note = f"{_machines(wrong)} for {rate:g}/s, {_machines(right.design)} for {right.rate_per_s:g}/s"
            what = f"{world.name} ({self.label}), conversations on a cluster for coding, rate kept"
            yield self.row("Fig. 20a", what, printed, ours, "x", note=note)

    def batch_job(self) -> Iterator[Comparison]:
        """Section 6.5: far too many requests, no limit on latency; requests per second and dollar."""
        best = []
        for base in (BASE_A, BASE_H):
            world = replace(self.world(base, "conversation"), duration_s=self.search.scale.duration_s / 4)
            design = Design(round(POWER_BUDGET * self.scale / POWER[base[0]]), 0)
            result = world.replay(design, OVERLOAD_PER_S * sum(design))
            best.append(len(result.rows.requests) / result.makespan_s / world.amount(design, USD_PER_HOUR))
        what = f"Baseline-A100 over Baseline-H100 ({self.label}), batch job, requests per dollar"
        yield self.row("Sec. 6.5", what, 0.89 / 0.75, best[0] / best[1], "x", kind="direction")

    def row(
        self, where: str, what: str, published: float, ours: float | None, unit: str,
        *, kind: Kind = "ratio", note: str = "",
    ) -> Comparison:  # fmt: skip
        notes = "; ".join(filter(None, (self.search.scale.note, note)))
        return row(where, what, published, ours, unit, self.basis, kind=kind, note=notes)


def _machines(design: Design) -> str:
    return f"{design.prompts}P + {design.tokens}T"
