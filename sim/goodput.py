"""Goodput: the highest arrival rate at which enough requests meet their SLO, found by bisection.

Pure: whoever calls says what share of the requests is within the SLO at a rate and a seed, so nothing here knows the
engine. ``goodput`` is the whole search; ``highest_rate`` and ``bisected_rate`` are the searches of one seed.

What a trial must be like is one rule for all: as many requests as ``trial_requests`` says, judged by ``sustained``.

All of them are monotone by construction: who passes at every rate where another passes is never given a lower rate,
however noisy both are, since at the first trial where the two differ the other one turns back below it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import Literal, NamedTuple

import numpy as np

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


# ---------------------------------------------------------------- what a trial must be like

LEAST_REQUESTS = 300
SPANS = 4.0
"""Ours: a trial lasts so many times as long as a request may take. Fewer requests would only fill the queues."""
BINS = 8
GROWTH = 0.02
GROWTH_SURE = 3.0
"""Ours: a queue grows if, over the last three quarters of the arrivals, requests take longer by so many seconds a
second, along a line that is so many standard errors steep."""


def longest_s(slo: Slo, mean_output_tokens: float) -> float | None:
    """Seconds that a mean request may take within the SLO (of classes, the most); None if it bounds nothing."""
    times = [longest_s(one, mean_output_tokens) for one in slo.classes.values()]
    if slo.tpot_s is not None:
        times.append((slo.ttft_s or 0.0) + slo.tpot_s * max(0.0, mean_output_tokens - 1))
        if slo.e2e_s is not None:
            times[-1] = min(slo.e2e_s, times[-1] or inf)
    elif slo.e2e_s is not None or slo.ttft_s is not None:
        times.append(slo.ttft_s if slo.e2e_s is None else slo.e2e_s)  # TTFT alone does not say how long answers take
    return max((time for time in times if time), default=None)


def trial_requests(slo: Slo, mean_output_tokens: float, rate_per_s: float) -> int:
    """Requests that a trial at this rate takes at least."""
    life_s = longest_s(slo, mean_output_tokens) or 0.0
    return max(LEAST_REQUESTS, ceil(SPANS * life_s * rate_per_s))


def growing(columns: Columns) -> bool:
    """Whether requests take longer and longer while they arrive: less is served than comes.

    Where a part of what comes is left over, the wait of who comes grows by that part of each second. It is seen in the
    seconds from arrival to end, less what they owe to the request's own length (by least squares, since a trace's
    lengths drift), averaged over ``BINS`` groups in order of arrival. Who was refused or failed does not count; who is
    still running has taken until the end of the run at least.
    """
    kept = np.flatnonzero(np.isin(columns["outcome"], ("completed", "running")))
    kept = kept[np.argsort(columns["arrival_s"][kept], kind="stable")][len(kept) // 4 :]
    if len(kept) < 4 * BINS:
        return False
    arrival_s = columns["arrival_s"][kept]
    e2e_s = columns["e2e_s"][kept]
    end_s = float(np.nanmax(columns["arrival_s"] + np.where(np.isnan(columns["e2e_s"]), 0.0, columns["e2e_s"])))
    taken_s = np.where(np.isnan(e2e_s), end_s - arrival_s, e2e_s)
    lengths = [columns[name][kept].astype(float) for name in ("input_tokens", "output_tokens")]
    table = np.column_stack([np.ones(len(kept)), *lengths, arrival_s - arrival_s[0]])
    by_length = np.linalg.lstsq(table, taken_s, rcond=None)[0][1:3]
    queued_s = taken_s - table[:, 1:3] @ by_length
    groups = np.array_split(np.arange(len(kept)), BINS)
    x = np.array([arrival_s[group].mean() for group in groups])
    y = np.array([queued_s[group].mean() for group in groups])
    x = x - x.mean()
    if not x @ x > 0:
        return False
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    error = sqrt(float(rest @ rest) / (BINS - 2) / float(x @ x))
    return slope > GROWTH and slope > GROWTH_SURE * error


def sustained(columns: Columns, slo: Slo, criterion: Criterion = "joint") -> float:
    """The share within the SLO as ``attained`` has it, and 0 where the queue grows: that rate is beyond what is served.

    Raises as ``attained`` does.
    """
    share = attained(columns, slo, criterion)
    return 0.0 if growing(columns) else share


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
