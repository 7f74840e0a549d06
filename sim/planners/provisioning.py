"""How many prompt and token machines: Splitwise's provisioning (ISCA 2024, section 4.4), by simulated replays.

A replay tells, for so many prompt machines, token machines and requests per second, how often the slowest requests were
slowed down against the same requests alone on a reference machine. A design is feasible if all nine slowdowns meet
their limits (table 6). Whoever calls gives the replay, so nothing here knows the engine.

Start with ``most_requests`` (a fixed set of machines: iso-power, iso-cost) and ``fewest_machines`` (a fixed rate:
iso-throughput). Both assume that a machine more, or a request per second less, makes no design infeasible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.cost import StageCost
from sim.goodput import highest_rate
from sim.types import PS_PER_S, ConfigError, Work

PERCENTILES = (50, 90, 99)
METRICS = ("ttft", "tpot", "e2e")


class Alone(NamedTuple):
    """Seconds a request takes by itself on an idle machine."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def alone(cost: StageCost, input_tokens: int, output_tokens: int) -> Alone:
    """One whole prompt, then one decode step per further token; ``tpot_s`` is NaN for a single token."""
    first_ps = cost.line(Work(((input_tokens, 0),), 0, 0)).first_ps
    decode_ps, done, steps = 0, 0, output_tokens - 1
    while done < steps:
        line = cost.line(Work((), 1, input_tokens + 1 + done))
        count = min(line.iterations, steps - done)
        decode_ps += count * line.first_ps + line.slope_ps * (count * (count - 1) // 2)
        done += count
    tpot_s = decode_ps / steps / PS_PER_S if steps else float("nan")
    return Alone(first_ps / PS_PER_S, tpot_s, (first_ps + decode_ps) / PS_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowdownLimits:
    """Largest slowdown at the 50th, 90th and 99th percentile, each; the defaults are the paper's table 6."""

    ttft: tuple[float, float, float] = (2.0, 3.0, 6.0)
    tpot: tuple[float, float, float] = (1.25, 1.5, 5.0)
    e2e: tuple[float, float, float] = (1.25, 1.5, 5.0)

    def __post_init__(self) -> None:
        for metric in METRICS:
            limits = getattr(self, metric)
            if len(limits) != len(PERCENTILES) or not all(limit > 0 for limit in limits):
                raise ConfigError(f"slowdown limits: {metric} is {limits}; it must be three numbers > 0")

    def allowed(self, metric: str, count: int) -> list[tuple[float, int]]:
        """For each limit, how many of ``count`` requests may exceed it."""
        ranks = [-(-(count - 1) * percentile // 100) for percentile in PERCENTILES]
        return [(limit, count - 1 - rank) for limit, rank in zip(getattr(self, metric), ranks, strict=True)]

    def met(self, measured: Mapping[str, Sequence[float]]) -> bool:
        return all(
            value <= limit
            for metric in METRICS
            for value, limit in zip(measured[metric], getattr(self, metric), strict=True)
        )


def slowdowns(columns: Mapping[str, NDArray[Any]], by_request: Sequence[Alone]) -> dict[str, tuple[float, ...]]:
    """Slowdown of each metric at each percentile, over all requests; one that did not complete is infinitely slow.

    ``columns``: as in ``Result.columns``; ``by_request``: its requests alone, in the same order. A request of one
    token has no TPOT and is left out of that metric's percentiles.
    """
    reference = np.array(by_request, dtype=float)
    completed = columns["outcome"] == "completed"
    found = {}
    for place, metric in enumerate(METRICS):
        ratio = np.where(completed, columns[f"{metric}_s"] / reference[:, place], np.inf)
        ratio = ratio[~np.isnan(reference[:, place])]
        places = np.percentile(ratio, PERCENTILES, method="higher") if ratio.size else np.zeros(len(PERCENTILES))
        found[metric] = tuple(float(value) for value in places)
    return found


class Design(NamedTuple):
    """So many prompt machines and token machines."""

    prompts: int
    tokens: int


Feasible = Callable[[Design, float], bool]
"""Whether a design serves so many requests per second within all limits."""


class Throughput(NamedTuple):
    design: Design
    rate_per_s: float


def most_requests(
    feasible: Feasible,
    designs: Sequence[Design],
    *,
    low: float,
    high: float,
    step: float,
    start: Throughput | None = None,
) -> Throughput | None:
    """The design with the highest rate; ``None`` if none serves ``low``. Of equal ones the first.

    ``designs`` in order of their share of prompt machines, over which the rate rises to a peak and falls. It looks at
    every eighth, then, at half the distance each time, around the best, and last at all that serve the best rate. It
    bisects the rate only of a design that does better than the best so far. ``start``, one of the designs and a guess
    of its rate, stands for the first round and saves most of the replays; it changes no answer while there is one peak.
    """
    if not designs:
        raise ConfigError("provisioning: there are no designs to choose from; allow more machines")
    best: Throughput | None = None
    if start is not None and low <= start.rate_per_s <= high:
        near = low + int((start.rate_per_s - low) / step) * step
        best = _better(feasible, start.design, None, near, high, step)
        best = best or _better(feasible, start.design, None, low, high, step)
    tried: set[Design] = set() if best is None else {best.design}
    stride = max(1, len(designs) // 8)
    while stride:
        before = best
        for design in designs[::stride] if best is None else _beside(designs, best.design, stride):
            if design not in tried:
                tried.add(design)
                best = _better(feasible, design, best, low, high, step)
        if best is None or best == before:
            stride //= 2
    return best and _along_the_top(feasible, designs, best, high, step)


def _along_the_top(
    feasible: Feasible, designs: Sequence[Design], best: Throughput, high: float, step: float
) -> Throughput:
    """Rates are multiples of a step: beyond neighbours that do no better another may.

    Those that serve the best rate lie side by side, so only where they end is searched for; all of them are asked for a
    step more.
    """
    place = designs.index(best.design)
    for side in (designs[place + 1 :], designs[:place][::-1]):
        for design in side[: _how_many(feasible, side, best.rate_per_s)]:
            best = _better(feasible, design, best, best.rate_per_s, high, step) or best
    return best


def _how_many(feasible: Feasible, designs: Sequence[Design], rate_per_s: float) -> int:
    """How many of the first designs serve the rate; behind one that does not, none does."""
    good, stride = 0, 1
    while good + stride <= len(designs) and feasible(designs[good + stride - 1], rate_per_s):
        good += stride
        stride *= 2
    while stride > 1:
        stride //= 2
        if good + stride <= len(designs) and feasible(designs[good + stride - 1], rate_per_s):
            good += stride
    return good


def _better(
    feasible: Feasible, design: Design, best: Throughput | None, low: float, high: float, step: float
) -> Throughput | None:
    """This design at its highest rate if that beats the best, which stays otherwise."""
    start = low if best is None else best.rate_per_s + step
    rate = highest_rate(partial(feasible, design), start, high, step) if start <= high else 0.0
    return Throughput(design, rate) if rate else best


def _beside(designs: Sequence[Design], centre: Design, stride: int) -> list[Design]:
    place = designs.index(centre)
    return [designs[other] for other in (place - stride, place + stride) if 0 <= other < len(designs)]


def fewest_machines(
    feasible: Feasible,
    rate_per_s: float,
    price: Callable[[Design], float],
    *,
    most: Design,
    start: Design | None = None,
) -> Design | None:
    """The cheapest design with up to ``most`` machines of either kind that serves the rate; ``None`` if none does.

    ``price``: dollars, watts or machines; it must rise in both counts. For each number of token machines it tries the
    most prompt machines that would still be cheaper than the best so far, and goes on only where they suffice.
    ``start``, a guess, saves replays if it serves the rate.
    """
    best = start if start is not None and feasible(start, rate_per_s) else None
    for tokens in range(1, most.tokens + 1):
        affordable = [
            prompts
            for prompts in range(1, most.prompts + 1)
            if best is None or price(Design(prompts, tokens)) < price(best)
        ]
        if not affordable or not feasible(Design(affordable[-1], tokens), rate_per_s):
            continue
        low, high = 0, affordable[-1]  # infeasible, feasible
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if feasible(Design(middle, tokens), rate_per_s) else (middle, high)
        best = Design(high, tokens)
    return best
