"""Requests out of distributions: ``generate`` from fitted lengths, ``resample`` from a recorded trace.

A distribution of lengths is its quantile function: it maps numbers of (0, 1) to tokens. That is all that is
needed to draw from it, and to draw inputs and outputs that are correlated. One seed gives streams of random
numbers for arrivals, lengths and turns, so that changing one leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, pi, sin, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sim.types import ConfigError, Request
from traces.arrivals import arrival_times

DRAWS = 4096  # lengths drawn at once; the stream of lengths does not depend on it


class Lengths(Protocol):
    """A distribution of token counts."""

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens that the given shares of the requests do not exceed; rounded to whole tokens >= 1 by the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Always the same."""

    tokens: int

    def __post_init__(self) -> None:
        _ascending("fixed lengths", self.tokens)

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(share.shape, float(self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Every whole number from ``low_tokens`` to ``high_tokens``, both included."""

    low_tokens: int
    high_tokens: int

    def __post_init__(self) -> None:
        _ascending("uniform lengths", self.low_tokens, self.high_tokens)

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = np.floor(share * (self.high_tokens - self.low_tokens + 1))
        tokens: NDArray[np.float64] = np.minimum(self.low_tokens + steps, self.high_tokens)
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Lognormal by its mean and median; cut at ``max_tokens``, which lowers the mean."""

    mean_tokens: float
    median_tokens: float
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _ascending("lognormal lengths (median, mean)", self.median_tokens, self.mean_tokens)
        if self.max_tokens is not None:
            _ascending("lognormal lengths (median, max)", self.median_tokens, self.max_tokens)

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.special import ndtri

        spread = sqrt(2 * log(self.mean_tokens / self.median_tokens))
        tokens = self.median_tokens * np.exp(spread * ndtri(share))
        return np.minimum(tokens, np.inf if self.max_tokens is None else self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A table of (share, tokens) from (0, least) to (1, most), linear in between."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.points]
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or sorted(set(shares)) != shares:
            raise ConfigError(f"quantile table with shares {shares}; expected ascending numbers from 0 to 1")
        _ascending("quantile table", *(tokens for _, tokens in self.points))

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        shares, tokens = zip(*self.points, strict=True)
        found: NDArray[np.float64] = np.interp(share, shares, tokens)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Empirical:
    """The lengths of a sample, each as likely as it is frequent there."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        _ascending("sampled lengths", *sorted(self.tokens))

    def quantile(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        ordered = np.sort(np.array(self.tokens, dtype=np.float64))
        tokens: NDArray[np.float64] = ordered[np.minimum((share * len(ordered)).astype(np.int64), len(ordered) - 1)]
        return tokens


LENGTHS: dict[str, type[Lengths]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "lognormal": Lognormal,
    "quantiles": Quantiles,
    "empirical": Empirical,
}


def generate(
    count: int,
    rate_per_s: float,
    *,
    input: Lengths,  # noqa: A002
    output: Lengths,
    arrivals: str = "poisson",
    rank_correlation: float = 0.0,
    seed: int = 0,
    **settings: float | None,
) -> Iterator[Request]:
    """``count`` requests with drawn arrivals (by ``traces.arrivals``, with its ``settings``) and lengths.

    ``rank_correlation``: Spearman's, of input and output tokens, by a Gaussian copula. The first
    requests do not depend on ``count``. ConfigError for settings out of range.
    """
    _check_count(count)
    _check_correlation(rank_correlation)
    arrivals_rng, lengths_rng, _ = _streams(seed)
    times = arrival_times(arrivals, rate_per_s, arrivals_rng, **settings)
    pairs = _pairs(count, input, output, rank_correlation, lengths_rng)
    return (
        Request(id=number, arrival_s=time, input_tokens=pair[0], output_tokens=pair[1])
        for number, (pair, time) in enumerate(zip(pairs, times, strict=False))
    )


def generate_sessions(
    count: int,
    rate_per_s: float,
    *,
    turns: Lengths,
    input: Lengths,  # noqa: A002
    output: Lengths,
    arrivals: str = "poisson",
    rank_correlation: float = 0.0,
    seed: int = 0,
    **settings: float | None,
) -> Iterator[Request]:
    """The turns of ``count`` conversations that begin at ``rate_per_s``: feed them to ``traces.Sessions``.

    ``turns``: how many a conversation has. ``input``: a turn's new text. All turns carry the time at which
    their conversation begins. The first conversations do not depend on ``count``.
    """
    _check_count(count)
    _check_correlation(rank_correlation)
    arrivals_rng, lengths_rng, turns_rng = _streams(seed)
    times = arrival_times(arrivals, rate_per_s, arrivals_rng, **settings)
    numbers = np.maximum(1, np.rint(turns.quantile(turns_rng.random(count)))).astype(np.int64).tolist()
    owners = (owner for owner, number in zip(enumerate(times), numbers, strict=False) for _ in range(number))
    pairs = _pairs(sum(numbers), input, output, rank_correlation, lengths_rng)
    return (
        Request(id=number, arrival_s=time, input_tokens=pair[0], output_tokens=pair[1], session=str(session))
        for number, (pair, (session, time)) in enumerate(zip(pairs, owners, strict=True))
    )


def resample(
    requests: Iterable[Request],
    count: int,
    rate_per_s: float,
    *,
    arrivals: str = "poisson",
    seed: int = 0,
    **settings: float | None,
) -> Iterator[Request]:
    """``count`` requests drawn from a trace with replacement, each whole: its input and output stay together.

    Holds the trace in memory. ConfigError for settings out of range or an empty trace.
    """
    _check_count(count)
    sample = list(requests)
    if not sample:
        raise ConfigError("cannot resample a trace without requests")
    arrivals_rng, lengths_rng, _ = _streams(seed)
    times = arrival_times(arrivals, rate_per_s, arrivals_rng, **settings)
    drawn = (sample[int(lengths_rng.random() * len(sample))] for _ in range(count))
    numbered = enumerate(zip(drawn, times, strict=False))
    return (replace(request, id=number, arrival_s=time) for number, (request, time) in numbered)


def _pairs(
    count: int, input_: Lengths, output: Lengths, rank_correlation: float, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    from scipy.special import ndtr

    linear = 2 * sin(pi * rank_correlation / 6)  # Pearson's, of normals with that rank correlation
    for start in range(0, count, DRAWS):
        first, second = rng.standard_normal((DRAWS, 2))[: count - start].T
        second = linear * first + sqrt(max(0.0, 1 - linear**2)) * second
        columns = [law.quantile(ndtr(normal)) for law, normal in ((input_, first), (output, second))]
        inputs, outputs = (np.maximum(1, np.rint(column)).astype(np.int64).tolist() for column in columns)
        yield from zip(inputs, outputs, strict=True)


def _streams(seed: int) -> list[np.random.Generator]:
    """Random numbers for arrivals, for lengths, and for turns of conversations."""
    return [np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3)]


def _check_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"count is {count}; expected a whole number >= 1")


def _check_correlation(rank_correlation: float) -> None:
    if not -1 <= rank_correlation <= 1:
        raise ConfigError(f"rank_correlation is {rank_correlation}; expected -1 to 1")


def _ascending(what: str, *tokens: float) -> None:
    if not tokens or tokens[0] < 1 or any(b < a for a, b in pairwise(tokens)):
        raise ConfigError(f"{what}: {', '.join(map(str, tokens)) or 'none'}; expected ascending token counts >= 1")
