"""Streams of requests into streams of requests: cut, stretch, mix, resample arrivals, respect a context limit.

Everything but ``by_arrival`` is lazy and in order of arrival, and ids are running numbers again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Literal, get_args

import numpy as np

from sim.types import ConfigError, Request
from traces.arrivals import arrival_times, positive
from traces.table import nearest

Rule = Literal["reject", "truncate", "error"]


def limit(requests: Iterable[Request], n: int) -> Iterator[Request]:
    """The first ``n`` requests."""
    if n < 1:
        raise ConfigError(f"limit is {n}; expected a whole number >= 1")
    return renumber(islice(requests, n))


def between(requests: Iterable[Request], start_s: float, end_s: float) -> Iterator[Request]:
    """Requests with ``start_s <= arrival_s < end_s``; ``start_s`` becomes second 0."""
    if not 0 <= start_s < end_s:
        raise ConfigError(f"between {start_s} and {end_s} s; expected 0 <= start_s < end_s")
    return renumber(_between(requests, start_s, end_s))


def _between(requests: Iterable[Request], start_s: float, end_s: float) -> Iterator[Request]:
    for request in requests:
        if request.arrival_s >= end_s:
            return
        if request.arrival_s >= start_s:
            yield replace(request, arrival_s=request.arrival_s - start_s)


def scale_time(requests: Iterable[Request], factor: float) -> Iterator[Request]:
    """Stretches every interval: a factor of 2 halves the rate."""
    positive("factor", factor)
    return renumber(replace(request, arrival_s=request.arrival_s * factor) for request in requests)


def with_rate(
    requests: Iterable[Request],
    rate_per_s: float,
    *,
    rng: np.random.Generator,
    arrivals: str = "poisson",
    **settings: float | None,
) -> Iterator[Request]:
    """New arrivals at a given rate, the first at 0; lengths and order stay.

    ``arrivals`` and its ``settings`` (such as ``cv``): see ``traces.arrivals``.
    """
    times = arrival_times(arrivals, rate_per_s, rng, **settings)
    numbered = enumerate(zip(requests, times, strict=False))
    return (replace(request, id=number, arrival_s=time) for number, (request, time) in numbered)


def renumber(requests: Iterable[Request]) -> Iterator[Request]:
    """Ids 0, 1, 2, ..."""
    for number, request in enumerate(requests):
        yield request if request.id == number else replace(request, id=number)


def by_arrival(requests: Iterable[Request]) -> Iterator[Request]:
    """In order of arrival (holds them in memory): the requests of a finished closed loop as a trace, say."""
    return renumber(sorted(requests, key=attrgetter("arrival_s")))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Requests of one kind, with their own rate and lengths; ``name`` is what SLOs and results call them.

    ``priority``: of all of them; None: each has its own.
    """

    name: str
    requests: Iterable[Request]
    priority: int | None = None

    def __post_init__(self) -> None:
        if self.name.splitlines() != [self.name]:
            raise ConfigError(f"request class {self.name!r}; expected a name of one line")


def mix(classes: Sequence[RequestClass]) -> Iterator[Request]:
    """Several classes merged in order of arrival; at equal times the class named first comes first.

    Sessions and prefix hashes of different classes are kept apart. ConfigError without classes or for two of one name.
    """
    names = [klass.name for klass in classes]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"classes to mix: {', '.join(names) or 'none'}; expected at least one, with different names")
    streams = [_labelled(klass, number, len(classes)) for number, klass in enumerate(classes)]
    return renumber(merge(*streams, key=attrgetter("arrival_s")))


def _labelled(klass: RequestClass, number: int, of: int) -> Iterator[Request]:
    for request in klass.requests:
        yield replace(
            request,
            klass=klass.name,
            priority=request.priority if klass.priority is None else klass.priority,
            session=None if request.session is None else f"{klass.name}/{request.session}",
            prefix=tuple(block * of + number for block in request.prefix),
        )


def clamp_context(requests: Iterable[Request], max_model_len: int, rule: Rule = "reject") -> ClampedTrace:
    """Requests that fit ``input_tokens + output_tokens <= max_model_len``, and a count of those that do not.

    Longer ones are left out (``reject``), shortened (``truncate``: the end of the prompt goes first, down to
    one token, then the output) or refused (``error``: ConfigError while iterating).
    """
    if max_model_len < 2:
        raise ConfigError(f"max_model_len is {max_model_len}; expected >= 2: one token in, one out")
    if rule not in get_args(Rule):
        raise ConfigError(f"rule is '{rule}'; {nearest(rule, get_args(Rule))}")
    return ClampedTrace(requests, max_model_len, rule)


class ClampedTrace:
    """What ``clamp_context`` makes; ``rejected`` and ``truncated`` count those of the last iteration."""

    __slots__ = ("max_model_len", "rejected", "requests", "rule", "truncated")

    def __init__(self, requests: Iterable[Request], max_model_len: int, rule: Rule) -> None:
        self.requests, self.max_model_len, self.rule = requests, max_model_len, rule
        self.rejected = self.truncated = 0

    def __iter__(self) -> Iterator[Request]:
        self.rejected = self.truncated = 0
        return renumber(self._fitting())

    def _fitting(self) -> Iterator[Request]:
        for request in self.requests:
            if request.input_tokens + request.output_tokens <= self.max_model_len:
                yield request
            elif self.rule == "truncate":
                self.truncated += 1
                yield _truncated(request, self.max_model_len)
            elif self.rule == "reject":
                self.rejected += 1
            else:
                raise ConfigError(
                    f"request {request.id}: {request.input_tokens} input and {request.output_tokens} output tokens "
                    f"exceed max_model_len {self.max_model_len}; choose rule 'reject' or 'truncate'"
                )


def _truncated(request: Request, max_model_len: int) -> Request:
    input_tokens = max(1, max_model_len - request.output_tokens)
    full_blocks = input_tokens // (request.prefix_block_tokens or input_tokens)
    return replace(
        request,
        input_tokens=input_tokens,
        output_tokens=min(request.output_tokens, max_model_len - input_tokens),
        prefix=request.prefix[:full_blocks],
    )
