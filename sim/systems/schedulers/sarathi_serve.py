"""Sarathi-Serve (OSDI 2024; arXiv 2403.02310): stall-free batching under a token budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from sim.batchers import ChunkSchedule, StallFree
from sim.batchers.stall_free import COMPOSITIONS, Composition
from sim.policy import Limits, System
from sim.reschedulers import RestorePlan
from sim.systems.layout import PoolOption, layout
from sim.transfers import Whole, in_bits
from sim.types import ConfigError


def sarathi_serve(
    token_budget: int | None = None,
    tbt_s: float | None = None,
    mode: Composition = "stall-free",
    dynamic_chunks: Mapping[str, int] | None = None,
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
    prefill: PoolOption = None,
    decode: PoolOption = None,
    kv_bits: int = 16,
) -> System:
    """Sarathi-Serve: every running decode in every iteration, prompt chunks in the rest of a token budget.

    ``token_budget`` defaults to system.engine.max_num_batched_tokens, else 512 (the paper's strict setting; 2048
    relaxed); ``tbt_s``: to the most tokens whose iteration keeps this bound. ``mode`` (table 4): chunked-only never
    mixes chunks with decodes, hybrid-only never cuts prompts. ``dynamic_chunks``: high_tokens, low_tokens, stages and
    max_tokens of a budget that falls as a prompt proceeds. ``kv_bits`` a value of KV on the way between pools (16: as
    it is).
    """
    if mode not in COMPOSITIONS:
        raise ConfigError(f"system.mode is {mode!r}; sarathi-serve has {', '.join(COMPOSITIONS)}")
    if tbt_s is not None and not 0 < tbt_s < float("inf"):
        raise ConfigError(f"system.tbt_s is {tbt_s}; it must be a number > 0")
    if (token_budget, tbt_s, dynamic_chunks).count(None) < 2 or (mode == "hybrid-only" and (token_budget or tbt_s)):
        raise ConfigError(
            "system: token_budget, tbt_s and dynamic_chunks exclude each other, and hybrid-only has none of them"
        )
    if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
        raise ConfigError(f"system.token_budget is {token_budget!r}; it must be a whole number >= 1")
    schedule = chunk_schedule(dynamic_chunks) if dynamic_chunks is not None else None
    planner, router = layout(replicas, tp, pp, gpu, prefill, decode)
    transfer = in_bits(Whole(), kv_bits, moves=prefill is not None or decode is not None)
    return System(
        name="sarathi-serve",
        mirrors="Sarathi-Serve, OSDI 2024 branch",
        planner=planner,
        router=router,
        batcher=lambda role: StallFree(token_budget, composition=mode, tbt_s=tbt_s, schedule=schedule),
        transfer=lambda: transfer,
        rescheduler=RestorePlan,
        limits=Limits(max_num_seqs=128),
    )


def chunk_schedule(values: Mapping[str, int]) -> ChunkSchedule:
    """From a mapping of a scenario file."""
    known = [field.name for field in fields(ChunkSchedule)]
    if sorted(values) != sorted(known):
        raise ConfigError(f"system.dynamic_chunks has {', '.join(values) or 'nothing'}; it needs {', '.join(known)}")
    return ChunkSchedule(**values)
