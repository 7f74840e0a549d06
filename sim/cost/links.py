"""Seconds of collectives and of the KV codec, as pure functions."""

from __future__ import annotations

from math import ceil, inf, log2
from typing import Literal, get_args

from sim.cluster import Link, did_you_mean
from sim.types import ConfigError

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


def collective_seconds(kind: Collective, size_bytes: float, link: Link, n: int) -> float:
    """Seconds of a collective of ``n`` GPUs by the alpha-beta model, the faster of its usual algorithms.

    ``size_bytes``: the whole vector (all_reduce, all_gather, reduce_scatter: as it is on every rank before or
    after), what one rank sends in all (all_to_all), or the message (send). ``link``: one GPU's port, one way.
    Ring: 2(n-1) hops that each carry 1/n of the vector; recursive doubling: log2 n hops of all of it
    (Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005, sections 3-4; half of each for gather and scatter).
    """
    if kind not in get_args(Collective):
        raise ConfigError(f"collective: {did_you_mean(kind, get_args(Collective))}")
    if n < 2:
        return 0.0
    if link.bytes_per_s <= 0:
        raise ConfigError(f"collective: {n} GPUs share a link of {link.bytes_per_s:g} bytes/s; give it bandwidth")
    whole_s = 0.0 if link.bytes_per_s == inf else size_bytes / link.bytes_per_s
    rest = (n - 1) / n
    if kind == "send":
        return link.latency_s + whole_s
    if kind == "all_to_all":
        return (n - 1) * link.latency_s + rest * whole_s
    hops = ceil(log2(n))
    if kind == "all_reduce":
        return min(2 * (n - 1) * link.latency_s + 2 * rest * whole_s, hops * (link.latency_s + whole_s))
    return min(n - 1, hops) * link.latency_s + rest * whole_s


def codec_seconds(kv_bytes: float, compressed_share: float, bandwidth_bytes_per_s: float, efficiency: float) -> float:
    """Seconds one GPU takes to compress (or expand) KV: memory-bound, it reads the one form and writes the other.

    ``compressed_share``: bytes after over bytes before; 1 (no codec) costs nothing. ``efficiency``:
    of the memory bandwidth.
    """
    if compressed_share == 1:
        return 0.0
    return kv_bytes * (1 + compressed_share) / (bandwidth_bytes_per_s * efficiency)
