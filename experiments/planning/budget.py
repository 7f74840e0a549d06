"""Which machines to rent within a budget: ``phasewise plan --budget``.

What is offered are machines of one GPU type each (``offered``). Of the types that give most FLOP/s, memory bandwidth
or memory for a dollar, ``purchases`` takes as many machines as the budget allows, of one type or of two in several
proportions, and for one type also fewer. Each purchase is planned in the shortest way; the most promising ones are
searched further by ``plan.found``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from experiments.planning.plan import Found, Option, Progress, found, ranked, tried
from experiments.scenario.cluster import NodeSpec
from experiments.scenario.file import Scenario
from experiments.scenario.resolve import Setup, resolve
from sim.cluster import Gpu, gpu, gpus
from sim.planners.hexgen2 import HexGen2
from sim.planners.thunderserve import TabuSearch
from sim.types import ConfigError, InfeasibleError

SIZES = (8, 4, 2, 1)
"""GPUs of a machine: eight where NVLink joins them, else four; fewer where that is over the budget."""
PARTS = (0.25, 0.5, 0.75)
"""Of the budget that goes to the first of two types, or to one type alone if not all of it is spent."""
TYPES_FOR_EACH = 2
"""Types kept for each of FLOP/s, bandwidth and memory per dollar."""
MOST_GPUS = 64
"""Of one purchase; more of a large budget stays unspent."""
BRIEF_STEPS = 20
BRIEF_REQUESTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An offer: so many GPUs of one type."""

    gpu: Gpu
    count: int

    @property
    def name(self) -> str:
        return f"{self.count}x{self.gpu.name}"


Purchase = tuple[tuple[Machine, int], ...]
"""Machines and how many of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """Offers with a price, and names of types whose price is unknown."""

    machines: tuple[Machine, ...]
    spot: bool
    unpriced: tuple[str, ...]

    def usd_per_hour(self, machine: Machine) -> float:
        price = price_of(machine.gpu, self.spot)
        assert price is not None
        return machine.count * price

    def cost(self, purchase: Purchase) -> float:
        return sum(self.usd_per_hour(machine) * number for machine, number in purchase)


def price_of(kind: Gpu, spot: bool) -> float | None:
    return kind.usd_per_hour_spot if spot else kind.usd_per_hour


def offered(scenario: Scenario, budget_usd_per_hour: float, machines: str | None) -> Market:
    """``machines``: "8xA100-80G-SXM,4xL40S"; None: every GPU of the catalogue that runs the dtype's kernels.

    Prices are those of the scenario's own nodes where they state some, else the catalogue's.
    """
    spot = scenario.cluster.pricing == "spot"
    own = {
        node.gpu.lower(): price
        for node in scenario.cluster.nodes
        if (price := node.usd_per_hour_spot if spot else node.usd_per_hour) is not None
    }
    priced, unpriced = [], []
    for machine in _named(machines) if machines is not None else _catalogue():
        price = own.get(machine.gpu.name.lower(), price_of(machine.gpu, spot))
        if not price:
            unpriced.append(machine.gpu.name)
            continue
        gpu_ = machine.gpu
        kind = replace(gpu_, usd_per_hour_spot=price) if spot else replace(gpu_, usd_per_hour=price)
        sizes = [machine.count] if machines is not None else [size for size in SIZES if size <= machine.count]
        fitting = [size for size in sizes if size * price <= budget_usd_per_hour]
        priced.append(Machine(gpu=kind, count=fitting[0] if fitting else sizes[-1]))
    market = Market(machines=tuple(priced), spot=spot, unpriced=tuple(unpriced))
    _check(market, budget_usd_per_hour)
    return market


def _check(market: Market, budget_usd_per_hour: float) -> None:
    if not market.machines:
        raise ConfigError(
            f"--budget: no price is known of {', '.join(market.unpriced)}; set usd_per_hour on a node of the scenario"
        )
    cheapest = min(market.machines, key=market.usd_per_hour)
    if market.usd_per_hour(cheapest) > budget_usd_per_hour:
        raise InfeasibleError(
            f"--budget {budget_usd_per_hour:g}: the cheapest machine, {cheapest.name}, costs "
            f"{market.usd_per_hour(cheapest):.3g} $/h; give at least that"
        )


def _catalogue() -> Iterator[Machine]:
    for kind in gpus():
        if kind.name != "CPU":
            yield Machine(gpu=kind, count=8 if kind.nvlink_bytes_per_s is not None else 4)


def _named(text: str) -> Iterator[Machine]:
    for part in text.split(","):
        number, times, name = part.strip().partition("x")
        if not times or not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--machines {part.strip()!r}: write GPUs and type, as in 8xA100-80G-SXM,4xL40S")
        yield Machine(gpu=gpu(name), count=int(number))


# ---------------------------------------------------------------- what to buy


def purchases(market: Market, budget_usd_per_hour: float, dtype: str) -> list[Purchase]:
    """Of one type as many as go, and fewer; of two types in several proportions."""
    kinds = promising(market, dtype)
    bought: dict[Purchase, None] = {}
    for kind in kinds:
        for part in (1.0, *PARTS):
            _add(bought, ((kind, _number(market, kind, part * budget_usd_per_hour)),))
    for one, other in combinations(kinds, 2):
        for part in PARTS:
            first = _number(market, one, part * budget_usd_per_hour)
            left = budget_usd_per_hour - first * market.usd_per_hour(one)
            room = (MOST_GPUS - first * one.count) // other.count
            _add(bought, ((one, first), (other, min(room, _number(market, other, left)))))
    return list(bought)


def promising(market: Market, dtype: str) -> list[Machine]:
    """The best types for a dollar in each of FLOP/s, bandwidth and memory."""
    spot, kept = market.spot, dict[Machine, None]()
    worths: tuple[Callable[[Gpu], float], ...] = (
        lambda kind: kind.flops_for(dtype),
        lambda kind: kind.bandwidth_bytes_per_s,
        lambda kind: kind.memory_bytes,
    )
    for worth in worths:
        order = sorted(market.machines, key=lambda one: -worth(one.gpu) / (price_of(one.gpu, spot) or 1.0))
        kept.update(dict.fromkeys(order[:TYPES_FOR_EACH]))
    return list(kept)


def _number(market: Market, machine: Machine, usd_per_hour: float) -> int:
    return min(MOST_GPUS // machine.count, int(usd_per_hour / market.usd_per_hour(machine) + 1e-9))


def _add(bought: dict[Purchase, None], purchase: Purchase) -> None:
    if all(number > 0 for _, number in purchase):
        bought[purchase] = None


# ---------------------------------------------------------------- plans of what is bought


def within(
    scenario: Scenario, market: Market, budget_usd_per_hour: float, *,
    top: int, seconds: float | None, progress: Progress,
) -> Found:  # fmt: skip
    """The best plan on each of the ``top`` most promising purchases. ``InfeasibleError`` if none holds the model."""
    first = resolve(scenario)
    todo = purchases(market, budget_usd_per_hour, first.problem.model.dtype)
    quick: list[Option] = []
    reasons: list[str] = []
    for number, purchase in enumerate(todo, 1):
        try:
            option = found(shortened(_setup(scenario, purchase), 0)).options[0]
        except ConfigError as error:
            reasons.append(str(error))
        else:
            quick.append(option if option.predicted is not None else tried(option, BRIEF_REQUESTS))
        progress(number, max((_share(one) for one in quick), default=0.0))
    if not quick:
        raise InfeasibleError(
            f"--budget {budget_usd_per_hour:g}: of {len(todo)} purchases none serves; the last: {reasons[-1]}"
        )
    options = []
    for one in _promising_first(quick)[:top]:
        again = found(shortened(one.setup, BRIEF_STEPS), seconds=seconds).options[0]
        options.append(again)
        progress(len(todo) + len(options), max(map(_share, options)))
    return Found(options=tuple(options))


def shortened(setup: Setup, steps: int) -> Setup:
    """The same with a search of so few steps."""
    planner = setup.system.planner
    if isinstance(planner, TabuSearch):
        planner = replace(planner, n_steps=min(steps, planner.n_steps))
    elif isinstance(planner, HexGen2):
        planner = replace(planner, patience=min(steps, planner.patience))
    return replace(setup, system=replace(setup.system, planner=planner))


def _setup(scenario: Scenario, purchase: Purchase) -> Setup:
    """The scenario on the machines that are bought."""
    nodes = tuple(
        NodeSpec(
            gpu=machine.gpu.name,
            count=machine.count,
            nodes=number,
            usd_per_hour=machine.gpu.usd_per_hour,
            usd_per_hour_spot=machine.gpu.usd_per_hour_spot,
        )
        for machine, number in purchase
    )
    cluster = scenario.cluster.model_copy(update={"nodes": nodes})
    return resolve(scenario.model_copy(update={"cluster": cluster}))


def _share(option: Option) -> float:
    return option.simulated or 0.0 if option.predicted is None else option.predicted.attainment


def _promising_first(options: Sequence[Option]) -> list[Option]:
    """As they will be ranked, with the prediction in place of a simulation where there is one."""
    return ranked([replace(option, simulated=_share(option)) for option in options], by_price=True)


def unknown(names: Collection[str]) -> str:
    """The line that names what was left out."""
    return f"left out, since their price is unknown: {', '.join(names)}"
