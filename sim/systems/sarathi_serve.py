"""Sarathi-Serve (OSDI 2024; arXiv 2403.02310): stall-free batching under a token budget."""

from __future__ import annotations

from sim.batchers import StallFree
from sim.policy import Limits, System
from sim.reschedulers import RestorePlan
from sim.systems.layout import PoolOption, layout
from sim.transfers import Whole
from sim.types import ConfigError


def sarathi_serve(
    token_budget: int | None = None,
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """Sarathi-Serve: every running decode in every iteration, prompt chunks in the rest of a token budget.

    ``token_budget`` defaults to engine.max_num_batched_tokens, else 512 (the paper's strict setting; 2048 relaxed).
    """
    if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
        raise ConfigError(f"system.token_budget is {token_budget!r}; it must be a whole number >= 1")
    planner, router = layout(replicas, tp, pp, gpu, prefill, decode)
    return System(
        name="sarathi-serve",
        mirrors="Sarathi-Serve, OSDI 2024 branch",
        planner=planner,
        router=router,
        batcher=lambda role: StallFree(token_budget),
        transfer=Whole,
        rescheduler=RestorePlan,
        limits=Limits(max_num_seqs=128),
    )
