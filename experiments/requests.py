"""``RequestStream``: the requests of a scenario's workload, read or drawn anew by every iteration."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

import numpy as np

from experiments.scenario import GenerateSpec, LengthsSpec, WorkloadSpec
from sim.types import ConfigError, Request
from traces import (
    Fixed,
    Lengths,
    Lognormal,
    Quantiles,
    TraceReader,
    Uniform,
    between,
    clamp_context,
    generate,
    limit,
    read,
    sample_path,
    scale_time,
    with_rate,
)

SAMPLE = "sample"
ARRIVALS_STREAM, GENERATE_STREAM = 100, 101
"""Spawn keys of this module's random streams; the engine's own are 0 and up."""


class RequestStream:
    """Requests in order of arrival. ``skipped`` and ``truncated`` count those of the last whole iteration.

    With the rule ``reject`` a request over ``max_model_len`` stays in the stream: the engine rejects it and says
    so in the result.
    """

    def __init__(self, workload: WorkloadSpec, *, seed: int, max_model_len: int | None) -> None:
        self.workload = workload
        self.seed = seed
        self.max_model_len = max_model_len
        self.rule = workload.too_long
        self._reader = None if workload.generate is not None else open_trace(workload)
        self.truncated = 0

    @property
    def skipped(self) -> int:
        """Requests without input or output tokens that the trace's reader left out."""
        return 0 if self._reader is None else self._reader.skipped

    def __iter__(self) -> Iterator[Request]:
        self.truncated = 0
        stream = self._unclamped()
        if self.rule == "reject" or self.max_model_len is None:
            yield from stream
            return
        clamped = clamp_context(stream, self.max_model_len, rule=self.rule)
        yield from clamped
        self.truncated = clamped.truncated

    def _unclamped(self) -> Iterator[Request]:
        spec = self.workload
        stream = iter(self._reader) if self._reader is not None else self._generated(spec.generate)
        if spec.start_s or spec.end_s is not None:
            stream = between(stream, spec.start_s, inf if spec.end_s is None else spec.end_s)
        if spec.limit is not None:
            stream = limit(stream, spec.limit)
        if spec.time_scale is not None:
            stream = scale_time(stream, spec.time_scale)
        if spec.rate is not None and self._reader is not None:
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ARRIVALS_STREAM,)))
            stream = with_rate(stream, spec.rate, rng=rng, arrivals=spec.arrivals, cv=spec.cv, **spec.arrival_options)
        return stream

    def _generated(self, spec: GenerateSpec | None) -> Iterator[Request]:
        assert spec is not None
        assert self.workload.rate is not None
        return generate(
            spec.requests,
            self.workload.rate,
            input=lengths(spec.input),
            output=lengths(spec.output),
            arrivals=self.workload.arrivals,
            cv=self.workload.cv,
            **self.workload.arrival_options,
            rank_correlation=spec.rank_correlation,
            seed=int(np.random.SeedSequence(self.seed, spawn_key=(GENERATE_STREAM,)).generate_state(1)[0]),
        )


def open_trace(workload: WorkloadSpec) -> TraceReader:
    """The workload's trace file, its format known."""
    name = workload.trace or SAMPLE
    path = sample_path() if name == SAMPLE else Path(name)
    if not path.is_file():
        raise ConfigError(f"workload.trace: {name!r} is not a file, here or beside the scenario; check the path")
    return read(path, workload.format, sort=workload.sort, **workload.format_options)


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
