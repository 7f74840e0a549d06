"""Request traces: read, make, reshape, describe and write them; and what happens to a cluster meanwhile.

Everything is a stream of ``sim.types.Request`` in order of arrival, with ids 0, 1, 2, ... Read in this order:

- ``formats``: the table of trace formats; ``reader``: a file as a stream (``table`` has the rows and errors)
- ``arrivals`` and ``synthesis``: streams out of distributions; ``sample``: the trace that is shipped
- ``transform``: cut, stretch, new arrival rate, context limit
- ``statistics``, ``write``, ``source``: describe a stream, store it, feed it to the simulator
- ``events``: faults, spot notices and GPUs that join, read from a file or drawn from a seed
"""

from traces.events import gpu_failures, read_events, spot_notices, write_events
from traces.formats import FORMATS, guess_format
from traces.reader import TraceReader, read
from traces.sample import make_sample, sample_path
from traces.source import TraceSource
from traces.statistics import statistics
from traces.synthesis import LENGTHS, Empirical, Fixed, Lengths, Lognormal, Quantiles, Uniform, generate, resample
from traces.transform import ClampedTrace, between, clamp_context, limit, renumber, scale_time, with_rate
from traces.write import write

__all__ = [
    "FORMATS",
    "LENGTHS",
    "ClampedTrace",
    "Empirical",
    "Fixed",
    "Lengths",
    "Lognormal",
    "Quantiles",
    "TraceReader",
    "TraceSource",
    "Uniform",
    "between",
    "clamp_context",
    "generate",
    "gpu_failures",
    "guess_format",
    "limit",
    "make_sample",
    "read",
    "read_events",
    "renumber",
    "resample",
    "sample_path",
    "scale_time",
    "spot_notices",
    "statistics",
    "with_rate",
    "write",
    "write_events",
]
