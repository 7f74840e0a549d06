"""Seconds of collectives and of the KV codec, as pure functions.

Collectives over a link that was stated take the textbook's alpha-beta time. Over the catalogue's NVLink and PCIe they
take what serving engines of 2025 reach there: NCCL, and vLLM's own all-reduce, which has every GPU read its peers
directly, for vectors below 8 MiB where NVLink joins the GPUs or there are only two.

What they reach is ``Reached``, which ``experiments/fidelity/cases/links.py`` fits and judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log2
from typing import Literal, get_args

from sim.cluster import Link, did_you_mean
from sim.types import ConfigError

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

DIRECT_BYTES, DIRECT_GPUS = 8 * 2**20, 8
"""vLLM's own all-reduce takes vectors below this, of at most so many GPUs (vLLM 0.19, custom_all_reduce.py)."""
ADDING_BYTES_PER_S = 350e9
"""Of a GPU's NVLink, from which on switches add what passes (NVLink SHARP): Hopper and later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Shares of the rate that a send reaches, and seconds before the first byte.

    Least relative error on every other size of all-reduces of 8 KiB to 512 MiB: aiconfigurator's A100, H100, L40S and
    RTX PRO 6000 (095f58a, Apache-2.0), APEX+'s V100 over PCIe (MIT).

    ``one_shot_s``, ``two_shot_s``, ``direct_share``: directly over NVLink; every GPU reads all vectors, or adds a part
    of each and reads the other sums. ``ring_s``, ``ring_share``: NCCL over NVLink; ``adding_share``: with eight GPUs on
    switches that add. ``pair_s``, ``pair_share``: two PCIe cards. ``hop_s``, ``host_share``: rings of more, across host
    bridges and sockets, where machines differ sevenfold.
    """

    one_shot_s: float = 5.03e-6
    two_shot_s: float = 11.47e-6
    direct_share: float = 0.883
    ring_s: float = 31.8e-6
    ring_share: float = 0.860
    adding_share: float = 1.218
    pair_s: float = 6.69e-6
    pair_share: float = 0.703
    hop_s: float = 2.06e-6
    host_share: float = 0.281


REACHED = Reached()


def collective_seconds(kind: Collective, size_bytes: float, link: Link, n: int, reached: Reached = REACHED) -> float:
    """Seconds of a collective of ``n`` GPUs, the faster of its usual algorithms.

    ``size_bytes``: the whole vector (all_reduce, all_gather, reduce_scatter: as it is on every rank before or
    after), what one rank sends in all (all_to_all), or the message (send). ``link``: one GPU's port, one way.
    """
    if kind not in get_args(Collective):
        raise ConfigError(f"collective: {did_you_mean(kind, get_args(Collective))}")
    if n < 2:
        return 0.0
    if link.bytes_per_s <= 0:
        raise ConfigError(f"collective: {n} GPUs share a link of {link.bytes_per_s:g} bytes/s; give it bandwidth")
    if kind == "send":
        return link.latency_s + size_bytes / link.bytes_per_s
    if link.medium is None:
        return _textbook_s(kind, size_bytes, link, n)
    if kind == "all_reduce":
        return _all_reduce_s(size_bytes, link, n, reached)
    return _ring_s(size_bytes, link, n, reached) / 2


def _textbook_s(kind: Collective, size_bytes: float, link: Link, n: int) -> float:
    """Ring: 2(n-1) hops that each carry 1/n of the vector; recursive doubling: log2 n hops of all of it.

    Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005, sections 3-4; half of each for gather and scatter.
    """
    whole_s = 0.0 if link.bytes_per_s == inf else size_bytes / link.bytes_per_s
    rest = (n - 1) / n
    if kind == "all_to_all":
        return (n - 1) * link.latency_s + rest * whole_s
    hops = ceil(log2(n))
    if kind == "all_reduce":
        return min(2 * (n - 1) * link.latency_s + 2 * rest * whole_s, hops * (link.latency_s + whole_s))
    return min(n - 1, hops) * link.latency_s + rest * whole_s


def _all_reduce_s(size_bytes: float, link: Link, n: int, reached: Reached) -> float:
    if link.medium == "pcie" or size_bytes >= DIRECT_BYTES or n > DIRECT_GPUS:
        return _ring_s(size_bytes, link, n, reached)
    read_s = size_bytes / (link.bytes_per_s * reached.direct_share)
    return min(reached.one_shot_s + (n - 1) * read_s, reached.two_shot_s + 2 * (n - 1) / n * read_s)


def _ring_s(size_bytes: float, link: Link, n: int, reached: Reached) -> float:
    """NCCL's all-reduce; of two PCIe cards also vLLM's own, which takes as long."""
    if link.medium == "nvlink":
        adding = n >= DIRECT_GPUS and link.bytes_per_s >= ADDING_BYTES_PER_S
        start_s, share = reached.ring_s, reached.adding_share if adding else reached.ring_share
    elif n == 2:
        start_s, share = reached.pair_s, reached.pair_share
    else:
        start_s, share = 2 * (n - 1) * reached.hop_s, reached.host_share
    return start_s + 2 * (n - 1) / n * size_bytes / (link.bytes_per_s * share)


def codec_seconds(kv_bytes: float, compressed_share: float, bandwidth_bytes_per_s: float, efficiency: float) -> float:
    """Seconds one GPU takes to compress (or expand) KV: memory-bound, it reads the one form and writes the other.

    ``compressed_share``: bytes after over bytes before; 1 (no codec) costs nothing. ``efficiency``:
    of the memory bandwidth.
    """
    if compressed_share == 1:
        return 0.0
    return kv_bytes * (1 + compressed_share) / (bandwidth_bytes_per_s * efficiency)
