"""The servers, loads and baselines of vLLM's evaluation (SOSP 2023, section 6), for its study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sim import SYSTEMS, Cluster, Problem, Request, Result, System, Workload, simulate
from sim.cost import Roofline
from sim.goodput import highest_rate
from sim.model import model
from sim.predictors import TrueLength
from traces import Fixed, Lengths, Lognormal, TraceSource, generate

BLOCK = 16
LONGEST = 2048
LATENCY_S = 1.0
"""Per output token; the paper names none."""
LOWEST_RATE_PER_S = 0.02
FEWEST_REQUESTS = 50


class Deployment(NamedTuple):
    """A model on GPUs, and the memory for KV (table 1)."""

    name: str
    gpu: str
    tp: int
    kv_gib: float

    @property
    def tokens(self) -> float:
        return self.kv_gib * 2**30 / model(self.name).kv_bytes_per_token()


OPT_13B = Deployment("opt-13b", "A100-40G-SXM", 1, 12)
OPT_66B = Deployment("opt-66b", "A100-40G-SXM", 4, 21)
OPT_175B = Deployment("opt-175b", "A100-80G-SXM", 8, 264)
LLAMA_13B = Deployment("llama-13b", "A100-40G-SXM", 1, 12)
"""As large as OPT-13B, so with its memory for KV, which the paper does not print."""


class Load(NamedTuple):
    """Requests: lengths, samples or beams of each, and the tokens with which all their prompts begin."""

    name: str
    input: Lengths
    output: Lengths
    samples: int = 1
    beam_search: bool = False
    prefix_tokens: int = 0

    def requests(self, rate_per_s: float, duration_s: float) -> list[Request]:
        count = max(FEWEST_REQUESTS, round(rate_per_s * duration_s))
        return [self._whole(request) for request in generate(count, rate_per_s, input=self.input, output=self.output)]

    def _whole(self, request: Request) -> Request:
        shared = range(self.prefix_tokens // BLOCK)
        return replace(
            request,
            input_tokens=request.input_tokens + self.prefix_tokens,
            samples=self.samples,
            beam_search=self.beam_search,
            prefix=tuple(shared),
            prefix_block_tokens=BLOCK if shared else None,
        )


SHAREGPT = Load(
    "ShareGPT",
    Lognormal(mean_tokens=161, median_tokens=90, max_tokens=1024),
    Lognormal(mean_tokens=338, median_tokens=220, max_tokens=1024),
)
ALPACA = Load(
    "Alpaca",
    Lognormal(mean_tokens=19, median_tokens=15, max_tokens=1024),
    Lognormal(mean_tokens=58, median_tokens=38, max_tokens=1024),
)
"""Means as printed; the rest of the distributions is ours."""
CHATBOT = Load("chatbot", Fixed(tokens=1024), SHAREGPT.output)
"""Histories are cut to their last 1024 tokens; that all are as long is ours."""


def translation(prefix_tokens: int) -> Load:
    """WMT16 English to German behind examples; the lengths of the sentences are ours."""
    source = Lognormal(mean_tokens=30, median_tokens=26, max_tokens=256)
    target = Lognormal(mean_tokens=40, median_tokens=34, max_tokens=256)
    return Load("translation", source, target, prefix_tokens=prefix_tokens)


BASELINES: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"mode": "paper"},
    "orca (oracle)": {"reserve": "oracle"},
    "orca (pow2)": {"reserve": "pow2"},
    "orca (max)": {"reserve": "max"},
    "fastertransformer": {},
}


def serve(label: str, place: Deployment, load: Load, rate_per_s: float, duration_s: float, **options: Any) -> Result:
    """A baseline under a load. All but vLLM know no groups: their samples are requests of their own."""
    system: System = SYSTEMS[label.split()[0]](tp=place.tp, replicas=1, **{**BASELINES[label], **options})
    limits = replace(
        system.limits,
        num_kv_blocks=int(place.tokens / BLOCK),
        max_model_len=LONGEST,
        block_size=BLOCK,
        prefix_caching=label == "vllm" and load.prefix_tokens > 0,
    )
    requests = load.requests(rate_per_s, duration_s)
    problem = Problem(
        cluster=Cluster.of(nodes=[{"gpu": place.gpu, "count": place.tp}]),
        model=model(place.name),
        cost=Roofline(),
        workload=Workload(rate_per_s=rate_per_s, lengths=((161, 338),)),
    )
    source = TraceSource(requests if label == "vllm" else list(apart(requests)))
    return simulate(problem, system.with_limits(limits), source, predictor=TrueLength())


def apart(requests: list[Request]) -> Iterator[Request]:
    """Every sample a request of its own, those of one request next to each other."""
    for request in requests:
        for sample in range(request.samples):
            number = request.id * request.samples + sample
            yield replace(request, id=number, samples=1, beam_search=False, prefix=(), prefix_block_tokens=None)


def latency_s(result: Result, each: int) -> float:
    """Mean over groups of ``each`` requests of latency per output token, that of the group's last; infinite if one was
    not served."""
    columns = result.columns
    if not (columns["outcome"] == "completed").all():
        return float("inf")
    order = np.argsort(columns["request"])
    per_token = columns["e2e_s"][order] / columns["output_tokens"][order]
    return float(per_token.reshape(-1, each).max(axis=1).mean())


def served_rate(
    label: str, place: Deployment, load: Load, duration_s: float, precision: float, **options: Any
) -> float:
    """Highest rate whose latency stays within ``LATENCY_S``, to the share ``precision``; 0 if none does."""

    def met(rate_per_s: float) -> bool:
        result = serve(label, place, load, rate_per_s, duration_s, **options)
        return latency_s(result, 1 if label == "vllm" else load.samples) <= LATENCY_S

    good = LOWEST_RATE_PER_S
    if not met(good):
        return 0.0
    while met(good * 2):
        good *= 2
    return highest_rate(met, good, good * 2, good * precision)
