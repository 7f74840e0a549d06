"""Why models share GPUs: mean latencies of two equal models on two GPUs, by queueing theory (AlpaServe, section 3).

A request takes ``d`` seconds on one GPU, arrivals are Poisson, ``r`` is the total rate times ``d`` (below 2), ``p`` the
share of the first model's requests. Everything is relative to M/D/1.
"""

from __future__ import annotations

from math import sqrt


def md1_s(rate_per_s: float, service_s: float) -> float:
    """Mean latency of M/D/1, service included; infinite at saturation."""
    use = rate_per_s * service_s
    return service_s + use * service_s / (2 * (1 - use)) if use < 1 else float("inf")


def simple_s(r: float, d: float = 1.0, p: float = 0.5) -> float:
    """Each model on a GPU of its own."""
    return sum(share * md1_s(share * r / d, d) for share in (p, 1 - p) if share)


def pipelined_s(r: float, d: float, whole_s: float, stage_s: float) -> float:
    """Both models over a pipeline of both GPUs: a request takes ``whole_s``, at most ``stage_s`` in a stage."""
    rate_per_s = r / d
    use = rate_per_s * stage_s
    return whole_s + use * stage_s / (2 * (1 - use)) if use < 1 else float("inf")


def most_uniform_overhead(r: float) -> float:
    """alpha: a pipeline whose two stages take ``alpha d / 2`` each is as good as two GPUs apart, for ``p`` 1/2."""
    return (r * r - 8 + sqrt(64 - 96 * r + 56 * r**2 - 12 * r**3 + r**4)) / (3 * (r * r - 2 * r))


def most_uneven_overhead(r: float) -> float:
    """beta: the same where the stages add up to ``d``, and the longer one takes ``beta d / 2``."""
    return (sqrt(r * r - 4 * r + 8) - r) / (2 - r)
