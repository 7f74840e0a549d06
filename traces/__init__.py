"""Request traces: read, fetch, make, reshape, describe and write them; and what happens to a cluster meanwhile.

Everything is a stream of ``sim.types.Request`` in order of arrival, with ids 0, 1, 2, ... Read in this order:

- ``formats``: the table of trace formats; ``guess``: which one a file is in, by its content; ``reader``: a file as a
  stream (``wrapping`` has compression and containers, ``table`` the rows and errors); ``fetch``: public traces
- ``arrivals`` and ``synthesis``: streams out of distributions; ``sample``: the trace that is shipped
- ``transform``: cut, stretch, mix, new arrival rate, context limit
- ``statistics``, ``write``: describe a stream, store it
- ``source``: feed a stream to the simulator, as an open loop, a closed loop, or conversations
- ``events``: faults, spot notices and GPUs that join, read from a file or drawn from a seed
"""

from traces.arrivals import ARRIVALS, arrival_times, settings_of
from traces.cluster.events import gpu_failures, read_events, spot_notices, write_events
from traces.fetch import fetch
from traces.formats import FORMATS
from traces.guess import guess_format
from traces.public import PUBLIC_TRACES, PublicTrace
from traces.reader import TraceReader, read
from traces.sample import make_sample, sample_path
from traces.source import Chains, ClosedLoop, Sessions, TraceSource, unroll
from traces.statistics import Survey, statistics, survey
from traces.synthesis import (
    LENGTHS,
    Empirical,
    Fixed,
    Lengths,
    Lognormal,
    Quantiles,
    Uniform,
    generate,
    generate_sessions,
    resample,
)
from traces.transform import (
    ClampedTrace,
    RequestClass,
    between,
    by_arrival,
    clamp_context,
    limit,
    mix,
    renumber,
    scale_time,
    with_rate,
)
from traces.write import write

__all__ = [
    "ARRIVALS",
    "FORMATS",
    "LENGTHS",
    "PUBLIC_TRACES",
    "Chains",
    "ClampedTrace",
    "ClosedLoop",
    "Empirical",
    "Fixed",
    "Lengths",
    "Lognormal",
    "PublicTrace",
    "Quantiles",
    "RequestClass",
    "Sessions",
    "Survey",
    "TraceReader",
    "TraceSource",
    "Uniform",
    "arrival_times",
    "between",
    "by_arrival",
    "clamp_context",
    "fetch",
    "generate",
    "generate_sessions",
    "gpu_failures",
    "guess_format",
    "limit",
    "make_sample",
    "mix",
    "read",
    "read_events",
    "renumber",
    "resample",
    "sample_path",
    "scale_time",
    "settings_of",
    "spot_notices",
    "statistics",
    "survey",
    "unroll",
    "with_rate",
    "write",
    "write_events",
]
