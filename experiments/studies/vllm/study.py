"""vLLM's tables and figures beside ours: ``python -m experiments.studies.vllm --out docs/studies/vllm [--quick]``.

Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention (SOSP 2023; arXiv
2309.06180).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, Study, row
from experiments.studies.vllm.sharing import chats, preemption, prefixes, samples, savings
from experiments.studies.vllm.world import (
    ALPACA,
    BASELINES,
    BLOCK,
    LONGEST,
    OPT_13B,
    OPT_66B,
    OPT_175B,
    SHAREGPT,
    Deployment,
    serve,
    served_rate,
)
from sim import Request, Result
from sim.batchers import reserved_tokens
from sim.batchers.reserving import Reserve
from sim.model import model

INTRO = """
vLLM (SOSP 2023) keeps KV in blocks instead of contiguous reservations. Slots, shares of memory and savings are
arithmetic; rates come from simulated traffic. The paper prints the mean lengths of ShareGPT (161 and 338 tokens) and
Alpaca (19 and 58) only: lognormals of those means are ours, as are the sentences of the translations and the latency
(1 s per token of output, mean) at which a rate counts as served. No profile of these GPUs and of an engine of 2023 is
public: step times are our roofline's at its defaults.

Orca's regions are powers of two of blocks, as its buddy allocator gives them; free blocks that such an allocator cannot
join are left out. Orca serves the samples of a request as requests of their own. Which beam of a search goes on depends
on the text, which traces do not tell: ours descend at random and so share more blocks than those of the paper. Rates
and gains that the paper prints for three models together ("1.7-2.7x") are set against the middle of their range.

Regenerate with `python -m experiments.studies.vllm --out docs/studies/vllm`.
"""
PRINTED_SLOTS: dict[Deployment, float] = {OPT_13B: 15.7e3, OPT_66B: 9.7e3, OPT_175B: 60.1e3}
OVERLOAD = {"ShareGPT": (20.0, 1 / 4), "Alpaca": (400.0, 1 / 20)}
"""Requests per second that nobody serves, and for which share of the time."""


class Scale(NamedTuple):
    """Seconds of arrivals, and how finely rates are searched."""

    duration_s: float
    precision: float


FULL, QUICK = Scale(1800.0, 0.05), Scale(120.0, 0.2)
SHORTER = 6
"""Loads of short requests run for so much less time: at tens of requests a second that is plenty."""


def study(scale: Scale, log: Log, cache: Path | None = None) -> Iterator[Comparison]:
    duration_s, precision = scale
    yield from slots()
    yield from shares()
    yield from batched(duration_s)
    yield from rates(duration_s, precision, log)
    yield from samples(duration_s / SHORTER, precision, log)
    yield from savings()
    yield from prefixes(duration_s / SHORTER, precision, log)
    yield from chats(duration_s, precision, log)
    yield from preemption(duration_s, precision)


def slots() -> Iterator[Comparison]:
    """Table 1: tokens that fit."""
    for place, printed in PRINTED_SLOTS.items():
        note = f"{place.kv_gib:g} GiB over {model(place.name).kv_bytes_per_token() / 2**20:.4g} MiB a token"
        what = f"{place.name}, {place.tp} x {place.gpu.removesuffix('-SXM')}, KV slots"
        yield row("Table 1", what, printed, place.tokens, "", "arithmetic", kind="exact", note=note)


def shares() -> Iterator[Comparison]:
    """Figure 2: which share of the KV memory taken holds tokens, while requests decode."""
    requests = SHAREGPT.requests(1.0, 4000)
    printed: dict[Reserve | None, float] = {None: 96.3, "max": 20.4, "pow2": 26.8, "oracle": 38.2}
    for reserve, share in printed.items():
        held = taken = 0
        for request in requests:
            lengths = np.arange(request.input_tokens, request.input_tokens + request.output_tokens)
            held += int(lengths.sum())
            blocks = -(-lengths // BLOCK) if reserve is None else region_blocks(reserve, request)
            taken += int(np.broadcast_to(blocks, lengths.shape).sum()) * BLOCK
        note = "" if reserve is None else "without free blocks that are apart, which theirs includes"
        label = "vLLM" if reserve is None else f"Orca ({reserve.title()})"
        what = f"{label}, share of KV memory that holds tokens"
        yield row("Fig. 2", what, share, 100 * held / taken, "%", "arithmetic", note=note)


def region_blocks(reserve: Reserve, request: Request) -> int:
    """Of a buddy allocator: the next power of two."""
    tokens = reserved_tokens(reserve, request.input_tokens, request.output_tokens, LONGEST)
    blocks = -(-tokens // BLOCK)
    return 1 << (blocks - 1).bit_length()


def batched(duration_s: float) -> Iterator[Comparison]:
    """Figure 13: requests in a batch, over time, when all are overloaded alike."""
    printed = {
        SHAREGPT: {"orca (oracle)": 30.42 / 13.62, "orca (pow2)": 30.42 / 9.81, "orca (max)": 30.42 / 7.00},
        ALPACA: {"orca (oracle)": 132.44 / 72.75, "orca (pow2)": 132.44 / 43.24, "orca (max)": 132.44 / 7.00},
    }
    for load, others in printed.items():
        rate, seconds = OVERLOAD[load.name]
        served = {label: serve(label, OPT_13B, load, rate, seconds * duration_s) for label in ("vllm", *others)}
        mean = {label: mean_batch(result) for label, result in served.items()}
        for other, ratio in others.items():
            note = f"{mean['vllm']:.1f} and {mean[other]:.1f} requests; all overloaded"
            what = f"opt-13b, {load.name}, batched requests, vLLM over {other}"
            yield row("Fig. 13", what, ratio, mean["vllm"] / mean[other], "x", note=note)


def mean_batch(result: Result) -> float:
    """Decoding sequences, averaged over the time in which there are any."""
    steps = [(step.end_ps - step.start_ps, step.decode_seqs) for step in result.rows.steps if step.decode_seqs]
    weights, seqs = zip(*steps, strict=True)
    return float(np.average(seqs, weights=np.array(weights, dtype=float)))


def rates(duration_s: float, precision: float, log: Log) -> Iterator[Comparison]:
    """Figure 12, ShareGPT: rates at a latency of 1 s per output token; and OPT-175B on Alpaca."""
    printed = (("orca (oracle)", 1.7, 2.7), ("orca (max)", 2.7, 8.0), ("fastertransformer", None, 22.0))
    for place in PRINTED_SLOTS:
        found = {label: served_rate(label, place, SHAREGPT, duration_s, precision) for label in BASELINES}
        log.say(f"{place.name}: " + ", ".join(f"{label} {rate:.2f}/s" for label, rate in found.items()))
        for other, low, high in printed:
            text = f"{low}-{high}x" if low else f"up to {high:g}x"
            ours = found["vllm"] / found[other] if found[other] else None
            note = f"{found['vllm']:.2f} and {found[other]:.2f} req/s; printed over all three models"
            middle = (low * high) ** 0.5 if low else high
            what = f"{place.name}, ShareGPT, rate of vLLM over {other}"
            yield row("Fig. 12", what, middle, ours, "x", text=text, note=note)
    short_s = duration_s / SHORTER / 5
    vllm, oracle = (served_rate(label, OPT_175B, ALPACA, short_s, precision) for label in ("vllm", "orca (oracle)"))
    what, note = "opt-175b, Alpaca, rate of vLLM over orca (oracle)", f"{vllm:.1f} and {oracle:.1f} req/s"
    yield row("Fig. 12f", what, None, vllm / oracle, "x", kind="direction", text="small", note=note)


STUDY = Study(
    name="study_vllm",
    title="vLLM: published and simulated",
    intro=INTRO,
    sizes={"": (FULL, ""), "quick": (QUICK, "two minutes of arrivals instead of half an hour")},
    rows=study,
)
