"""``statistics``: what a trace looks like, in one pass over its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import ceil, sqrt

from sim.types import ConfigError, Request

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def statistics(requests: Iterable[Request]) -> dict[str, float | None]:
    """Size, rate, lengths, burstiness and prefix reuse of a stream; ConfigError if it is empty.

    ``rate_per_s``: gaps per second. ``p50_input_tokens`` and the like: the least length that this share of
    the requests does not exceed. ``burstiness``: standard deviation of the gaps between arrivals over their
    mean (1 for Poisson). ``prefix_reuse``: share of all input tokens that lie in leading blocks some
    earlier request had, so what an endless cache would save. None where there is nothing to measure
    it on. Memory grows with the number of distinct lengths and hashes only.
    """
    inputs, outputs = Counter[int](), Counter[int]()
    gaps, reuse = _Gaps(), _Reuse()
    for request in requests:
        inputs[request.input_tokens] += 1
        outputs[request.output_tokens] += 1
        gaps.add(request.arrival_s)
        reuse.add(request)
    number = inputs.total()
    if not number:
        raise ConfigError("no requests to describe")
    return {
        "requests": number,
        "duration_s": gaps.duration_s,
        "rate_per_s": (number - 1) / gaps.duration_s if gaps.duration_s else None,
        **_lengths("input", inputs),
        **_lengths("output", outputs),
        "burstiness": gaps.variation(),
        "prefix_reuse": reuse.tokens / _total(inputs) if reuse.seen else None,
    }


def _total(histogram: Counter[int]) -> int:
    return sum(tokens * number for tokens, number in histogram.items())


def _lengths(name: str, histogram: Counter[int]) -> dict[str, float]:
    quantiles = {f"{quantile}_{name}_tokens": _quantile(histogram, share) for quantile, share in QUANTILES.items()}
    return {
        f"mean_{name}_tokens": _total(histogram) / histogram.total(),
        f"min_{name}_tokens": min(histogram),
        **quantiles,
        f"max_{name}_tokens": max(histogram),
    }


def _quantile(histogram: Counter[int], share: float) -> int:
    rank = ceil(share * histogram.total())
    for tokens in sorted(histogram):
        rank -= histogram[tokens]
        if rank <= 0:
            return tokens
    raise AssertionError("the ranks of a histogram add up to its total")


class _Gaps:
    """Mean and variance of the gaps between arrivals (Welford's recurrence: no cancellation, no list)."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = 0.0
        self.number = 0
        self.mean_s = 0.0
        self.squares = 0.0

    def add(self, arrival_s: float) -> None:
        if self.first_s is None:
            self.first_s = arrival_s
        else:
            self.number += 1
            off = arrival_s - self.last_s - self.mean_s
            self.mean_s += off / self.number
            self.squares += off * (arrival_s - self.last_s - self.mean_s)
        self.last_s = arrival_s

    @property
    def duration_s(self) -> float:
        return self.last_s - (self.first_s or 0.0)

    def variation(self) -> float | None:
        return sqrt(self.squares / self.number) / self.mean_s if self.number > 1 and self.mean_s else None


class _Reuse:
    """Input tokens in leading blocks that were there before."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.tokens = 0

    def add(self, request: Request) -> None:
        known = 0
        for block in request.prefix:
            if block not in self.seen:
                break
            known += 1
        self.tokens += known * (request.prefix_block_tokens or 0)
        self.seen.update(request.prefix)
