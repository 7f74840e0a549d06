"""vLLM (PagedAttention, SOSP 2023; arXiv 2309.06180), with its V0 and V1 schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from sim.batchers import MixedPrompts, PrefillFirst, TokenBudget
from sim.cluster import Gpu
from sim.policy import Batcher, Limits, System
from sim.reschedulers import RestorePlan
from sim.routers import PrefixAware
from sim.systems.layout import PoolOption, layout
from sim.systems.schedulers.releases import Release, release
from sim.transfers import Whole, in_bits
from sim.types import ConfigError, Role

MIRRORS = {
    "paper": "vLLM of mid-2023, as in its SOSP paper",
    "v0": "vLLM 0.2 to 0.5 (V0 scheduler)",
    "v1": "vLLM 0.8 and later (V1 scheduler)",
}


def vllm(
    mode: Literal["paper", "v0", "v1"] | None = None,
    preemption: Literal["recompute", "swap"] = "recompute",
    chunked_prefill: bool | None = None,
    long_prefill_token_threshold: int = 0,
    reserve_full_prompt: bool | None = None,
    policy: Literal["fcfs", "priority"] = "fcfs",
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
    prefill: PoolOption = None,
    decode: PoolOption = None,
    kv_bits: int = 16,
    version: str | None = None,
    routing: Literal["least_requests", "prefix_aware"] = "least_requests",
    index_age_s: float = 0.0,
) -> System:
    """vLLM: paged KV, continuous batching; V1 token budget or V0 prefill-first; colocated, or split by a KV connector.

    ``mode`` paper lets whole prompts join the decodes, v0 never mixes the two; both may swap, and serve groups of
    samples. v1 cuts prompts into chunks, recomputes only, and may go by ``policy`` priority. Replicas get requests by
    fewest outstanding; ``routing`` prefix_aware: where least is to be computed beside what is cached, by an
    index at most ``index_age_s`` old. With ``prefill`` and ``decode`` pools the decode side pulls the prompt's KV,
    in ``kv_bits`` a value (16: as it is). ``version``: the release whose defaults hold for what is not said
    (``releases.py``; a scenario states it as system.engine.version); 0.20, and none in the modes paper and v0.
    """
    known = release(version)
    mode = mode or ("v1" if known.v1 else "v0")
    if mode not in MIRRORS:
        raise ConfigError(f"system.mode is {mode!r}; vllm has {', '.join(MIRRORS)}")
    if preemption not in ("recompute", "swap") or (mode, preemption) == ("v1", "swap"):
        raise ConfigError(
            f"system.preemption is {preemption!r}; vllm v1 has recompute, v0 and paper have recompute and swap"
        )
    if policy not in ("fcfs", "priority") or (policy == "priority" and mode != "v1"):
        raise ConfigError(f"system.policy is {policy!r}; vllm v1 has fcfs and priority, v0 and paper have fcfs")
    if version is not None and known.v1 != (mode == "v1"):
        raise ConfigError(f"system.mode is {mode!r}, but vLLM {known.name} has the {'V1' if known.v1 else 'V0'} engine")
    planner, router = layout(replicas, tp, pp, gpu, prefill, decode)
    if routing not in ("least_requests", "prefix_aware"):
        raise ConfigError(f"system.routing is {routing!r}; vllm has least_requests and prefix_aware")
    if not index_age_s >= 0 or (index_age_s and routing != "prefix_aware"):
        raise ConfigError(f"system.index_age_s is {index_age_s}; it must be >= 0, and needs routing: prefix_aware")
    transfer = in_bits(Whole(pull=True), kv_bits, moves=prefill is not None or decode is not None)

    chunked = chunked_prefill is not False
    whole = known.reserve_full_prompt if reserve_full_prompt is None else reserve_full_prompt

    def batcher(role: Role) -> Batcher:
        if mode == "paper":
            return MixedPrompts(preemption)
        if mode == "v0":
            return PrefillFirst(preemption)
        return TokenBudget(chunked, long_prefill_token_threshold, whole, policy)

    return System(
        name="vllm",
        mirrors=MIRRORS[mode] if version is None and mode != "v1" else f"vLLM {known.name} ({mode.upper()} scheduler)",
        planner=planner,
        router=router if routing == "least_requests" else lambda: PrefixAware(index_age_s=index_age_s),
        batcher=batcher,
        transfer=lambda: transfer,
        rescheduler=RestorePlan,
        options={"chunked_prefill": chunked, "reserve_full_prompt": whole} if mode == "v1" else {},
        defaults=None if mode != "v1" and version is None else partial(_filled, known, pp),
    )


def _filled(known: Release, pp: int, stated: Limits, given: frozenset[str], gpus: Sequence[Gpu]) -> Limits:
    return known.limits(stated, given, gpus, pp)
