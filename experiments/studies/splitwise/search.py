"""The searches over machine counts behind Splitwise's cluster figures, at a share of their size or whole.

``Search`` asks ``World.feasible``; its verdicts may be kept in a file, so that a long study that was interrupted goes
on where it was. Delete that file when schedulers or costs have changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

from experiments.runs.progress import Log
from experiments.studies.splitwise.world import Letter, World
from sim.planners.provisioning import Design, Feasible, Throughput, fewest_machines, most_requests

RATE_STEP_PER_S = 5.0
MOST_STEPS = 100

ROUNDING = 1e-9
Resource = Mapping[Letter, float]
"""Dollars per hour, power or places of one machine."""


class Scale(NamedTuple):
    """How much of the evaluation is run: share of the machines (and of the rates), seconds of the trace."""

    machines: float
    duration_s: float

    @property
    def note(self) -> str:
        return "" if self == FULL else f"{self.machines:g} of the machines and rate, {self.duration_s:g} s"

    @property
    def rate_step_per_s(self) -> float:
        return max(1.0, RATE_STEP_PER_S * self.machines)


FULL, HALF, QUICK = Scale(1.0, 120.0), Scale(0.5, 60.0), Scale(0.15, 30.0)
GUESS = Scale(0.2, 60.0)


@dataclass(slots=True)
class Verdicts:
    """What was found feasible, kept in a file of JSON lines if there is one."""

    path: Path | None = None
    known: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.known.update(pair for line in lines for pair in json.loads(line).items())

    def feasible(self, world: World, design: Design, rate_per_s: float) -> bool:
        key = json.dumps([*asdict(world).values(), *design, rate_per_s])
        if key not in self.known:
            self.known[key] = world.feasible(design, rate_per_s)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: self.known[key]}) + "\n")
        return self.known[key]


@dataclass(frozen=True, slots=True)
class Search:
    """Best designs at a scale. Budgets, rates and bounds are given at full size.

    Searches begin where the same search at a fifth of the size ended, which saves most of the long replays.
    """

    scale: Scale
    log: Log
    verdicts: Verdicts
    told: set[str] = field(default_factory=set)

    def most(self, world: World, per_machine: Resource, budget: float) -> Throughput | None:
        """The design of highest rate among those that cost at most ``budget``, in what ``per_machine`` counts."""
        here = replace(world, duration_s=self.scale.duration_s)
        designs = _designs(here, per_machine, budget * self.scale.machines)
        small = self._smaller()
        guess = small.most(world, per_machine, budget) if small else None
        start = guess and self._start(guess, designs)
        step = self.scale.rate_step_per_s
        found = most_requests(self._feasible(here), designs, low=step, high=step * MOST_STEPS, step=step, start=start)
        self._say(here, found)
        return found

    def rate(self, world: World, design: Design) -> float:
        """The highest rate of one design of this scale; 0 if it serves none."""
        here = replace(world, duration_s=self.scale.duration_s)
        step = self.scale.rate_step_per_s
        found = most_requests(self._feasible(here), [design], low=step, high=step * MOST_STEPS, step=step)
        self._say(here, found)
        return found.rate_per_s if found else 0.0

    def fewest(self, world: World, per_machine: Resource, rate_per_s: float, most: Design) -> Design | None:
        """The design with the least of what ``per_machine`` counts that serves the rate."""
        here = replace(world, duration_s=self.scale.duration_s)
        small = self._smaller()
        guess = small.fewest(world, per_machine, rate_per_s, most) if small else None
        found = fewest_machines(
            self._feasible(here),
            rate_per_s * self.scale.machines,
            partial(here.amount, per_machine=per_machine),
            most=_scaled(most, self.scale.machines),
            start=guess and _scaled(guess, self.scale.machines / GUESS.machines),
        )
        self._say(here, found)
        return found

    def _smaller(self) -> Search | None:
        return Search(GUESS, self.log, self.verdicts, self.told) if self.scale.machines > 2 * GUESS.machines else None

    def _start(self, guess: Throughput, designs: list[Design]) -> Throughput:
        """A little below what the small search promises."""
        share = _prompt_share(guess.design)
        design = min(designs, key=lambda design: abs(_prompt_share(design) - share))
        return Throughput(design, 0.9 * guess.rate_per_s * self.scale.machines / GUESS.machines)

    def _feasible(self, world: World) -> Feasible:
        return partial(self.verdicts.feasible, world)

    def _say(self, world: World, found: object) -> None:
        how = "as splitwise-sim" if world.compat else "corrected"
        line = f"{world.name}, {world.trace}, {how}, {self.scale.machines:g} of full size: {found}"
        if line not in self.told:
            self.told.add(line)
            self.log.say(line)


def _designs(world: World, per_machine: Resource, budget: float) -> list[Design]:
    """Machines for the whole budget, the share of prompt machines rising; a baseline has one design."""
    most = int(budget / per_machine[world.prompt] + ROUNDING)
    if world.token is None:
        return [Design(most, 0)]
    each = per_machine[world.token]
    splits = [
        Design(prompts, int((budget - prompts * per_machine[world.prompt]) / each + ROUNDING))
        for prompts in range(1, most + 1)
    ]
    return [design for design in splits if design.tokens]


def _prompt_share(design: Design) -> float:
    return design.prompts / sum(design)


def _scaled(design: Design, factor: float) -> Design:
    return Design(*(max(1, ceil(count * factor - ROUNDING)) for count in design))
