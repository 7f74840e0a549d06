"""``RequestStream``: the requests of a scenario's workload, read or drawn anew by every iteration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.scenario.workload import GenerateSpec, LengthsSpec, StreamSpec, WorkloadSpec
from sim.outside import is_file
from sim.policy import Source
from sim.types import ConfigError, Request
from traces import (
    ClosedLoop,
    Fixed,
    Lengths,
    Lognormal,
    Quantiles,
    RequestClass,
    Sessions,
    TraceReader,
    TraceSource,
    Uniform,
    between,
    clamp_context,
    generate,
    generate_sessions,
    limit,
    mix,
    read,
    sample_path,
    scale_time,
    with_rate,
)

Spec = TypeVar("Spec", bound=StreamSpec)
SAMPLE = "sample"
ARRIVALS_STREAM, GENERATE_STREAM, THINK_STREAM = 100, 101, 102
"""Spawn keys of this module's random streams; the engine's own are 0 and up."""


class RequestStream:
    """Requests in order of arrival, and the source that feeds them to the simulator.

    ``skipped`` and ``truncated`` count those of the last whole iteration. With the rule ``reject`` a request over
    ``max_model_len`` stays in the stream: the engine rejects it and says so in the result.

    ``at_least`` so many requests come, where arrivals are drawn: distributions go on, traces begin anew, with sessions
    and prefixes of their own.
    """

    def __init__(
        self, workload: WorkloadSpec, *, seed: int, max_model_len: int | None, at_least: int | None = None
    ) -> None:
        self.workload = workload
        self.at_least = at_least
        self.seed = seed
        self.max_model_len = max_model_len
        self.rule = workload.too_long
        self._readers = {
            name: open_trace(stream, f"workload.mix.{name}" if name else "workload")
            for name, stream in workload.streams.items()
            if stream.generate is None
        }
        self.truncated = 0

    @property
    def skipped(self) -> int:
        """Requests without input or output tokens that the traces' readers left out."""
        return sum(reader.skipped for reader in self._readers.values())

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was decided about the traces' files, what of them is not used, and what looks wrong."""
        return tuple(f"{reader.path.name}: {remark}" for reader in self._readers.values() for remark in reader.remarks)

    def source(self) -> Source:
        """What feeds the simulator: an open loop, or one in which requests wait for answers."""
        spec, seed = self.workload, self._seed(THINK_STREAM)
        if (loop := spec.closed_loop) is not None:
            return ClosedLoop(self, users=loop.clients, think_s=loop.think_s, think_cv=loop.think_cv, seed=seed)
        if (talk := spec.sessions) is not None:
            return Sessions(self, **talk.model_dump(), seed=seed)
        for name, reader in self._readers.items():
            if reader.delayed:
                place = f"workload.mix.{name}.trace" if name else "workload.trace"
                raise ConfigError(
                    f"{place}: turns of {reader.path.name} wait for the turn before them (delay, think_s); "
                    "set workload.sessions, as in {inputs: new}, or {inputs: whole} if lengths count the whole prompt"
                )
        return TraceSource(self)

    def __iter__(self) -> Iterator[Request]:
        self.truncated = 0
        stream = self._unclamped()
        if self.rule == "reject" or self.max_model_len is None:
            yield from stream
            return
        clamped = clamp_context(stream, self.max_model_len, rule=self.rule)
        yield from clamped
        self.truncated = clamped.truncated

    def _unclamped(self) -> Iterable[Request]:
        spec = self.workload
        if not spec.mix:
            return self._paced("", self._extended(spec), self._rate_per_s, ())
        rate, shares = self._rate_per_s, sum(klass.share for klass in spec.mix.values())
        parts = [
            RequestClass(
                name=name,
                requests=self._paced(
                    name, self._extended(klass), None if rate is None else rate * klass.share / shares, (place,)
                ),
            )
            for place, (name, klass) in enumerate(spec.mix.items())
        ]
        merged = _cut(mix(parts), self._extended(spec))
        return merged if self.at_least is None else limit(merged, self.at_least)

    def _extended(self, spec: Spec) -> Spec:
        """The stream with no fewer requests than ``at_least``; a trace is repeated where it is read."""
        least = self.at_least
        if least is None:
            return spec
        known: dict[str, Any] = {}
        if spec.limit is not None and (spec.generate is not None or (isinstance(spec, WorkloadSpec) and spec.mix)):
            known["limit"] = max(spec.limit, least)
        if spec.generate is not None:
            more = {"requests": max(spec.generate.requests, least)}
            known["generate"] = spec.generate.model_copy(update=more)
        return spec.model_copy(update=known)

    @property
    def _rate_per_s(self) -> float | None:
        """Clients deal with requests in order whatever their arrivals: any rate keeps the classes' shares."""
        return self.workload.rate if self.workload.closed_loop is None else 1.0

    def _paced(self, name: str, spec: StreamSpec, rate_per_s: float | None, key: tuple[int, ...]) -> Iterable[Request]:
        """One class: read or drawn, cut, sent at its rate, marked. ``key`` tells its random streams from others'."""
        pace: dict[str, Any] = {"arrivals": spec.arrivals, "cv": spec.cv, **spec.arrival_options}
        if spec.generate is not None:
            assert rate_per_s is not None
            stream = _cut(_generated(spec.generate, rate_per_s, self._seed(GENERATE_STREAM, *key), pace), spec)
        else:
            stream = _cut(self._readers[name], spec)
            if self.at_least is not None:
                stream = repeated(partial(_cut, self._readers[name], spec), self.at_least)
            if rate_per_s is not None:
                rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ARRIVALS_STREAM, *key)))
                stream = with_rate(stream, rate_per_s, rng=rng, **pace)
        marks = spec.marks
        return (replace(request, **marks) for request in stream) if marks else stream

    def _seed(self, *key: int) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1)[0])


def repeated(once: Callable[[], Iterable[Request]], at_least: int) -> Iterator[Request]:
    """A recording, begun anew until ``at_least`` requests have come; arrivals are for whoever draws them."""
    count = 0
    for turn in itertools.count():
        before = count
        for request in once():
            if turn and count >= at_least:
                return
            yield replace(
                request,
                id=count,
                session=f"{request.session}/{turn}" if turn and request.session is not None else request.session,
                prefix=tuple(hash((turn, block)) for block in request.prefix) if turn else request.prefix,
            )
            count += 1
        if count >= at_least or count == before:
            return


def _cut(stream: Iterable[Request], spec: StreamSpec) -> Iterable[Request]:
    if spec.start_s or spec.end_s is not None:
        stream = between(stream, spec.start_s, inf if spec.end_s is None else spec.end_s)
    if spec.limit is not None:
        stream = limit(stream, spec.limit)
    if spec.time_scale is not None:
        stream = scale_time(stream, spec.time_scale)
    return stream


def _generated(spec: GenerateSpec, rate_per_s: float, seed: int, pace: dict[str, Any]) -> Iterator[Request]:
    shape: dict[str, Any] = {
        "input": lengths(spec.input),
        "output": lengths(spec.output),
        "rank_correlation": spec.rank_correlation,
        "seed": seed,
        **pace,
    }
    if spec.turns is None:
        return generate(spec.requests, rate_per_s, **shape)
    return generate_sessions(spec.requests, rate_per_s, turns=lengths(spec.turns), **shape)


def open_trace(stream: StreamSpec, place: str = "workload") -> TraceReader:
    """The stream's trace file, its format known; ``place`` is its key in the scenario, for errors."""
    name = stream.trace or SAMPLE
    path = sample_path() if name == SAMPLE else Path(name)
    if not is_file(path):
        raise ConfigError(f"{place}.trace: {name!r} is not a file, here or beside the scenario; check the path")
    return read(path, stream.format, sort=stream.sort, **stream.format_options)


def lengths(spec: LengthsSpec) -> Lengths:
    """The distribution a scenario describes."""
    if spec.fixed is not None:
        return Fixed(tokens=spec.fixed)
    if spec.uniform is not None:
        return Uniform(low_tokens=spec.uniform[0], high_tokens=spec.uniform[1])
    if spec.quantiles is not None:
        return Quantiles(points=spec.quantiles)
    assert spec.mean is not None
    assert spec.median is not None
    return Lognormal(mean_tokens=spec.mean, median_tokens=spec.median, max_tokens=spec.max)
