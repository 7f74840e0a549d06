"""vLLM's tables and figures beside ours: ``python -m experiments.study_vllm --out docs [--quick]``.

Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention (SOSP 2023; arXiv
2309.06180).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.progress import Log
from experiments.study import Comparison, write
from sim import SYSTEMS, Cluster, Limits, Problem, Request, Result, System, Workload, simulate
from sim.batchers import reserved_tokens
from sim.cost import Roofline
from sim.model import model
from sim.planners.provisioning import highest_rate
from sim.predictors import TrueLength
from traces import Lognormal, TraceSource, generate

INTRO = """
vLLM (SOSP 2023) keeps KV in blocks instead of contiguous reservations. Slots and shares of memory are arithmetic;
rates come from simulated traffic. The paper prints the mean lengths of ShareGPT only (161 and 338 tokens): lognormals
of those means are ours, as is the latency (1 s per token of output, mean) at which a rate counts as served. No
profile of these GPUs and of an engine of 2023 is public: step times are our roofline's at its defaults. Orca's
baselines leave out the external fragmentation of a buddy allocator. Regenerate with `python -m experiments.study_vllm
--out docs`.
"""
BLOCK = 16
LONGEST = 2048
LATENCY_S = 1.0
"""Per output token."""
SHAREGPT = (
    Lognormal(mean_tokens=161, median_tokens=90, max_tokens=1024),
    Lognormal(mean_tokens=338, median_tokens=220, max_tokens=1024),
)


class Deployment(NamedTuple):
    """A model on GPUs, and the memory for KV (table 1)."""

    name: str
    gpu: str
    tp: int
    kv_gib: float
    slots: float
    """Printed, in tokens."""

    @property
    def tokens(self) -> float:
        return self.kv_gib * 2**30 / model(self.name).kv_bytes_per_token()


OPT_13B = Deployment("opt-13b", "A100-40G-SXM", 1, 12, 15.7e3)
DEPLOYMENTS = (
    OPT_13B,
    Deployment("opt-66b", "A100-40G-SXM", 4, 21, 9.7e3),
    Deployment("opt-175b", "A100-80G-SXM", 8, 264, 60.1e3),
)


class Scale(NamedTuple):
    """Seconds of arrivals, and how finely rates are searched."""

    duration_s: float
    precision: float


FULL = Scale(1800.0, 0.05)
QUICK = Scale(120.0, 0.2)


def study(scale: Scale, log: Log) -> Iterator[Comparison]:
    yield from slots()
    yield from shares()
    yield from batched(scale)
    yield from rates(scale, log)


def slots() -> Iterator[Comparison]:
    """Table 1: tokens that fit."""
    for place in DEPLOYMENTS:
        note = f"{place.kv_gib:g} GiB over {model(place.name).kv_bytes_per_token() / 2**20:.4g} MiB a token"
        what = f"{place.name}, {place.tp} x {place.gpu.removesuffix('-SXM')}, KV slots"
        yield _row("Table 1", what, place.slots, place.tokens, "", kind="exact", basis="arithmetic", note=note)


def shares() -> Iterator[Comparison]:
    """Figure 2: which share of the KV memory taken holds tokens, while requests decode."""
    printed = {"vllm": 96.3, "max": 20.4, "pow2": 26.8, "oracle": 38.2}
    requests = list(generate(4000, 1.0, input=SHAREGPT[0], output=SHAREGPT[1]))
    for scheme, share in printed.items():
        held = taken = 0
        for request in requests:
            lengths = np.arange(request.input_tokens, request.input_tokens + request.output_tokens)
            held += int(lengths.sum())
            taken += int(_taken(scheme, request, lengths).sum())
        note = "" if scheme == "vllm" else "without external fragmentation, which theirs includes"
        label = "vLLM" if scheme == "vllm" else f"Orca ({scheme.title()})"
        yield _row(
            "Fig. 2",
            f"{label}, share of KV memory that holds tokens",
            share,
            100 * held / taken,
            "%",
            basis="arithmetic",
            note=note,
        )


def _taken(scheme: str, request: Request, lengths: Any) -> Any:
    """Tokens of memory taken at each step of a request."""
    if scheme == "vllm":
        return -(-lengths // BLOCK) * BLOCK
    reserved = reserved_tokens(scheme, request.input_tokens, request.output_tokens, LONGEST)  # type: ignore[arg-type]
    return np.full_like(lengths, reserved)


SYSTEMS_COMPARED: dict[str, dict[str, Any]] = {
    "vllm": {"mode": "paper"},
    "orca (oracle)": {"reserve": "oracle"},
    "orca (pow2)": {"reserve": "pow2"},
    "orca (max)": {"reserve": "max"},
    "fastertransformer": {},
}


def serve(label: str, place: Deployment, rate_per_s: float, duration_s: float) -> Result:
    system: System = SYSTEMS[label.split()[0]](tp=place.tp, replicas=1, **SYSTEMS_COMPARED[label])
    limits: Limits = replace(
        system.limits, num_kv_blocks=int(place.tokens / BLOCK), max_model_len=LONGEST, block_size=BLOCK
    )
    requests = list(
        generate(max(50, round(rate_per_s * duration_s)), rate_per_s, input=SHAREGPT[0], output=SHAREGPT[1])
    )
    problem = Problem(
        cluster=Cluster.of(nodes=[{"gpu": place.gpu, "count": place.tp}]),
        model=model(place.name),
        cost=Roofline(),
        workload=Workload(rate_per_s=rate_per_s, lengths=((161, 338),)),
    )
    return simulate(problem, system.with_limits(limits), TraceSource(requests), predictor=TrueLength())


def batched(scale: Scale) -> Iterator[Comparison]:
    """Figure 13a: requests in a batch, over time, when all are overloaded alike."""
    mean = {label: mean_batch(serve(label, OPT_13B, 20.0, scale.duration_s / 4)) for label in SYSTEMS_COMPARED}
    for other, printed in (("orca (oracle)", 2.2), ("orca (max)", 4.3)):
        note = f"{mean['vllm']:.1f} and {mean[other]:.1f} requests; all overloaded"
        yield _row(
            "Fig. 13a",
            f"opt-13b, ShareGPT, batched requests, vLLM over {other}",
            printed,
            mean["vllm"] / mean[other],
            "x",
            note=note,
        )


def mean_batch(result: Result) -> float:
    """Decoding sequences, averaged over the time in which there are any."""
    steps = [(step.end_ps - step.start_ps, step.decode_seqs) for step in result.rows.steps if step.decode_seqs]
    weights, seqs = zip(*steps, strict=True)
    return float(np.average(seqs, weights=np.array(weights, dtype=float)))


def rates(scale: Scale, log: Log) -> Iterator[Comparison]:
    """Figure 12, ShareGPT: rates at a latency of 1 s per output token."""
    printed = (("orca (oracle)", 1.7, 2.7), ("orca (max)", 2.7, 8.0), ("fastertransformer", None, 22.0))
    for place in DEPLOYMENTS:
        found = {label: served_rate(label, place, scale) for label in SYSTEMS_COMPARED}
        log.say(f"{place.name}: " + ", ".join(f"{label} {rate:.2f}/s" for label, rate in found.items()))
        for other, low, high in printed:
            text = f"{low}-{high}x" if low else f"up to {high:g}x"
            ours = found["vllm"] / found[other] if found[other] else None
            note = f"{found['vllm']:.2f} and {found[other]:.2f} req/s; printed over all three models"
            middle = (low * high) ** 0.5 if low else high
            yield _row(
                "Fig. 12", f"{place.name}, ShareGPT, rate of vLLM over {other}", middle, ours, "x", text=text, note=note
            )


def served_rate(label: str, place: Deployment, scale: Scale) -> float:
    """Highest rate whose mean of latency over output length stays within ``LATENCY_S``; 0 if none is."""

    def met(rate_per_s: float) -> bool:
        columns = serve(label, place, rate_per_s, scale.duration_s).columns
        return bool(np.mean(columns["e2e_s"] / columns["output_tokens"]) <= LATENCY_S)

    good = 0.02
    if not met(good):
        return 0.0
    while met(good * 2):
        good *= 2
    return highest_rate(met, good, good * 2, good * scale.precision)


def _row(where: str, what: str, published: float, ours: float | None, unit: str, *, kind: Any = "ratio",
         basis: Any = "roofline", text: str = "", note: str = "") -> Comparison:  # fmt: skip
    return Comparison(
        where=where, what=what, unit=unit, kind=kind, basis=basis, published=published, ours=ours, text=text, note=note
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for study_vllm.md, .csv, .png and .svg")
    parser.add_argument("--quick", action="store_true", help="two minutes of arrivals instead of half an hour")
    given = parser.parse_args(arguments)
    rows = list(study(QUICK if given.quick else FULL, Log()))
    write(given.out, "study_vllm", "vLLM: published and simulated", INTRO, rows)


if __name__ == "__main__":
    main()
