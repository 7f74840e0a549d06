"""Goodput: the highest arrival rate at which enough requests meet their SLO, found by bisection.

Pure: whoever calls says what share of the requests is within the SLO at a rate and a seed, so nothing here knows the
engine. ``goodput`` is the whole search; ``highest_rate`` and ``bisected_rate`` are the searches of one seed.

All of them are monotone by construction: who passes at every rate where another passes is never given a lower rate,
however noisy both are, since at the first trial where the two differ the other one turns back below it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

from sim.metrics import Columns, Estimate, attainment, estimate
from sim.types import ConfigError, Slo

Criterion = Literal["joint", "separate"]
CRITERIA: tuple[Criterion, ...] = ("joint", "separate")
HALVINGS = 12
"""So often the first rate is halved before a search gives up."""

Attainment = Callable[[float, int], float]
"""Share of the requests within the SLO at a rate (requests/s), with a seed."""


def attained(columns: Columns, slo: Slo, criterion: Criterion = "joint") -> float:
    """Share of the requests within the SLO: in all bounds at once, or (``separate``) in the bound that is met least.

    The separate share reaches 0.9 exactly if the 90th percentile of each latency is within its bound (DistServe's
    search); it is never below the joint one. ``ConfigError`` if the SLO bounds nothing or there are no requests.
    """
    shares = attainment(columns, slo)
    joint = shares.pop("attainment")
    bounds = [share for share in shares.values() if share is not None]
    if joint is None or not bounds:
        what = (
            "there are no requests to judge" if joint is None else "slo: it bounds nothing; set ttft_s, tpot_s or e2e_s"
        )
        raise ConfigError(f"goodput: {what}")
    return joint if criterion == "joint" else min(bounds)


# ---------------------------------------------------------------- one seed


Search = Generator[float, bool, float]
"""Yields the rate to try next, is sent whether it passed, returns the highest rate that did (0: none)."""


def bracketing(start: float, high: float, tolerance: float) -> Search:
    """From ``start`` double (up to ``high``) or halve until two rates enclose the answer, then bisect.

    Ends when they are within ``tolerance`` times the lower one. Returns ``high`` itself if that passed.
    """
    if not 0 < start <= high or not 0 < tolerance < 1:
        raise ConfigError(f"goodput: start {start:g}, highest {high:g}, tolerance {tolerance:g}; "
                          "give 0 < start <= highest and a tolerance between 0 and 1")  # fmt: skip
    good, bad = start, inf
    if (yield start):
        while good < high and bad == inf:
            rate = min(2 * good, high)
            good, bad = (rate, inf) if (yield rate) else (good, rate)
    else:
        for halvings in range(1, HALVINGS + 1):
            good, bad = start / 2**halvings, 2 * start / 2**halvings
            if (yield good):
                break
        else:
            return 0.0
    return good if bad == inf else (yield from halving(good, bad, tolerance * good))


def halving(good: float, bad: float, width: float) -> Search:
    """Bisect between a rate that passes (or 0) and one that does not until they are ``width`` apart."""
    while bad - good > width:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if (yield middle) else (good, middle)
    return good


def bisected_rate(feasible: Callable[[float], bool], search: Search) -> float:
    """What the search returns when every trial is made at once."""
    try:
        rate = next(search)
        while True:
            rate = search.send(feasible(rate))
    except StopIteration as found:
        return float(found.value)


def highest_rate(feasible: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """Largest feasible ``low`` + a multiple of ``step``, up to ``high``; 0 if ``low`` is not feasible.

    Strides double until one fails, then halve: rates far above what is served are slow to simulate.
    """
    if not step > 0 or not 0 < low <= high:
        raise ConfigError(f"rates: low {low}, high {high}, step {step}; give 0 < low <= high and step > 0")
    if not feasible(low):
        return 0.0
    good, most, stride = 0, int((high - low) / step + 1e-9), 1
    while good + stride <= most and feasible(low + (good + stride) * step):
        good += stride
        stride *= 2
    while stride > 1:
        stride //= 2
        if good + stride <= most and feasible(low + (good + stride) * step):
            good += stride
    return low + good * step


# ---------------------------------------------------------------- several seeds


class Trial(NamedTuple):
    """One replay of a search."""

    rate_per_s: float
    seed: int
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What a search found: the mean over the seeds with its 95 % interval, each seed's rate, and every trial."""

    rate: Estimate
    by_seed: dict[int, float]
    trials: tuple[Trial, ...]


def goodput(
    attainment_at: Attainment,
    *,
    target: float,
    seeds: Sequence[int],
    start: float,
    high: float,
    tolerance: float,
    executor: Executor,
    done: Callable[[], None] = lambda: None,
) -> Goodput:
    """Bisect for every seed by itself, all seeds' next trials at the same time; ``done`` is called after each.

    A seed on which no rate passes counts as 0. ``ConfigError`` for settings out of range.
    """
    if not 0 < target <= 1 or not seeds:
        raise ConfigError(f"goodput: target {target:g}, {len(seeds)} seeds; give a target in (0, 1] and a seed")
    searches = {seed: bracketing(start, high, tolerance) for seed in dict.fromkeys(seeds)}
    rates = {seed: next(search) for seed, search in searches.items()}
    found: dict[int, float] = {}
    trials: list[Trial] = []
    while rates:
        for trial in tried(attainment_at, [(rate, seed) for seed, rate in rates.items()], executor, done):
            trials.append(trial)
            try:
                rates[trial.seed] = searches[trial.seed].send(trial.attainment >= target)
            except StopIteration as end:
                found[trial.seed] = end.value
                del rates[trial.seed]
    by_seed = {seed: found[seed] for seed in searches}
    mean = estimate(list(by_seed.values()))
    assert mean is not None
    return Goodput(rate=mean, by_seed=by_seed, trials=tuple(trials))


def tried(
    attainment_at: Attainment,
    points: Sequence[tuple[float, int]],
    executor: Executor,
    done: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Replay every (rate, seed), in the order given."""
    futures = [executor.submit(attainment_at, rate, seed) for rate, seed in points]
    trials = []
    try:
        for (rate, seed), future in zip(points, futures, strict=True):
            trials.append(Trial(rate, seed, future.result()))
            done()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return trials
