"""``statistics``: what a trace looks like, in one pass; ``survey``: the same with the histograms behind it.

Memory is bounded however long the trace is: lengths are counted by value (at most as many as a context is
long), gaps by size, arrivals in at most ``Timeline.MOST`` intervals that double when they do not suffice, and of
prefix hashes at most ``Reuse.MOST`` are remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, floor, log2, sqrt

from sim.types import ConfigError, Request

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
GAPS_PER_OCTAVE = 4


def statistics(requests: Iterable[Request]) -> dict[str, float | None]:
    """Size, rate, lengths, burstiness and prefix reuse of a stream; ConfigError if it is empty or out of order.

    ``rate_per_s``: gaps per second. ``p50_input_tokens`` and the like: the least length that this share of
    the requests does not exceed. ``burstiness``: standard deviation of the gaps between arrivals over their
    mean (1 for Poisson). ``prefix_reuse``: share of all input tokens that lie in leading blocks some
    earlier request had, so what an endless cache would save; ``prefix_sample``: share of the hashes that it was
    measured on in the end (1: exact). None where there is nothing to measure it on.
    """
    return survey(requests).statistics


def survey(requests: Iterable[Request]) -> Survey:
    """Counts a stream. ConfigError if it is empty or not in order of arrival."""
    found = Survey()
    for request in requests:
        found.add(request)
    if not found.gaps.requests:
        raise ConfigError("no requests to describe")
    return found


@dataclass(slots=True)
class Survey:
    """A stream, counted: histograms of lengths (tokens -> requests), gaps, arrivals over time, and prefix reuse."""

    inputs: Counter[int] = field(default_factory=Counter)
    outputs: Counter[int] = field(default_factory=Counter)
    gaps: Gaps = field(default_factory=lambda: Gaps())
    timeline: Timeline = field(default_factory=lambda: Timeline())
    reuse: Reuse = field(default_factory=lambda: Reuse())

    def add(self, request: Request) -> None:
        """Count the next request."""
        self.inputs[request.input_tokens] += 1
        self.outputs[request.output_tokens] += 1
        self.gaps.add(request.arrival_s)
        reused = self.reuse.add(request) if request.prefix else 0.0
        self.timeline.add(request.arrival_s - self.gaps.first_s, request.input_tokens, reused)

    @property
    def statistics(self) -> dict[str, float | None]:
        """See ``traces.statistics``."""
        gaps, reuse = self.gaps, self.reuse
        return {
            "requests": gaps.requests,
            "duration_s": gaps.duration_s,
            "rate_per_s": (gaps.requests - 1) / gaps.duration_s if gaps.duration_s else None,
            **_lengths("input", self.inputs),
            **_lengths("output", self.outputs),
            "burstiness": gaps.variation,
            "prefix_reuse": reuse.tokens / _total(self.inputs) if reuse.any else None,
            "prefix_sample": 2.0**-reuse.halvings if reuse.any else None,
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


class Gaps:
    """Gaps between arrivals: mean and variance (Welford's recurrence: no cancellation, no list), and a histogram.

    ``sizes``: requests per bin of a quarter octave, bin ``n`` from ``2**(n/4)`` seconds; None for no gap at all.
    """

    __slots__ = ("first_s", "last_s", "mean_s", "requests", "sizes", "squares")

    def __init__(self) -> None:
        self.requests = 0
        self.first_s = self.last_s = 0.0
        self.mean_s = self.squares = 0.0
        self.sizes = Counter[int | None]()

    def add(self, arrival_s: float) -> None:
        self.requests += 1
        if self.requests == 1:
            self.first_s = arrival_s
        else:
            gap_s = arrival_s - self.last_s
            if gap_s < 0:
                raise ConfigError(f"a request arrives at {arrival_s} s, before the one ahead of it at {self.last_s} s")
            off = gap_s - self.mean_s
            self.mean_s += off / (self.requests - 1)
            self.squares += off * (gap_s - self.mean_s)
            self.sizes[floor(GAPS_PER_OCTAVE * log2(gap_s)) if gap_s else None] += 1
        self.last_s = arrival_s

    @property
    def duration_s(self) -> float:
        return self.last_s - self.first_s

    @property
    def variation(self) -> float | None:
        """Coefficient of variation; None for less than three requests, or if all come at once."""
        return sqrt(self.squares / (self.requests - 1)) / self.mean_s if self.requests > 2 and self.mean_s else None


class Timeline:
    """Requests, input tokens and reused input tokens in equal intervals since the first arrival.

    ``width_s`` is a power of two: it doubles, and neighbours are added, when an arrival lies beyond the last of
    ``MOST`` intervals. The last interval may not have been seen to its end.
    """

    MOST = 2048
    __slots__ = ("input_tokens", "requests", "reused_tokens", "width_s")

    def __init__(self) -> None:
        self.width_s = 2.0**-10
        self.requests: list[float] = []
        self.input_tokens: list[float] = []
        self.reused_tokens: list[float] = []

    def add(self, since_first_s: float, input_tokens: int, reused_tokens: float) -> None:
        place = int(since_first_s / self.width_s)
        while place >= self.MOST:
            self.width_s *= 2
            place //= 2
            for name in ("requests", "input_tokens", "reused_tokens"):
                setattr(self, name, _halved(getattr(self, name)))
        missing = place + 1 - len(self.requests)
        if missing > 0:
            for column in (self.requests, self.input_tokens, self.reused_tokens):
                column.extend([0.0] * missing)
        self.requests[place] += 1
        self.input_tokens[place] += input_tokens
        self.reused_tokens[place] += reused_tokens

    def dispersion(self) -> list[tuple[float, float]]:
        """(window in s, variance over mean of the requests in a window), for windows of which there are 8 and more.

        The index of dispersion for counts: 1 at every window for Poisson, growing with the window where load
        comes in waves. The last interval, seen in part, is left out.
        """
        counts, width_s, found = self.requests[:-1], self.width_s, []
        while len(counts) >= 8:
            mean = sum(counts) / len(counts)
            if mean:
                found.append((width_s, sum((count - mean) ** 2 for count in counts) / len(counts) / mean))
            counts, width_s = _halved(counts[: len(counts) // 2 * 2]), width_s * 2
        return found


def _halved(column: list[float]) -> list[float]:
    """Sums of neighbours."""
    return [sum(column[place : place + 2]) for place in range(0, len(column), 2)]


class Reuse:
    """Input tokens in leading blocks that were there before.

    When more than ``MOST`` hashes are remembered, half of them, chosen by a hash of the hash, are forgotten and
    never looked at again, and the others count double: memory is bounded, and the estimate unbiased where a
    block's hash covers all that stands before it (Waldspurger et al., FAST 2015, section 3).
    """

    MOST = 2**20
    __slots__ = ("any", "halvings", "seen", "tokens")

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.any = False
        self.halvings = 0
        self.tokens = 0.0

    def add(self, request: Request) -> float:
        """Tokens of this request that were there before."""
        block_tokens = request.prefix_block_tokens or 1
        answer = request.input_tokens // block_tokens  # from here on the blocks are not asked, but will be there
        prompt = self._kept(request.prefix[:answer])
        known = 0
        for block in prompt:
            if block not in self.seen:
                break
            known += 1
        reused = float(known * block_tokens << self.halvings)
        self.any = True
        self.tokens += reused
        self.seen.update(prompt[known:], self._kept(request.prefix[answer:]))
        while len(self.seen) > self.MOST:
            self.halvings += 1
            self.seen = set(filter(self._sampled, self.seen))
        return reused

    def _kept(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(filter(self._sampled, blocks)) if self.halvings else blocks

    def _sampled(self, block: int) -> bool:
        return (block * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> (64 - self.halvings) == 0
