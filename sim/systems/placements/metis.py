"""Metis (USENIX ATC 2024), a planner of training, carried over to serving with two pools and vLLM's batches."""

from __future__ import annotations

from sim.batchers import TokenBudget
from sim.planners.metis import Metis
from sim.policy import System
from sim.reschedulers import RestorePlan
from sim.routers import ByShare
from sim.transfers import Whole, in_bits
from sim.types import ConfigError


def metis(
    variance: float = 1.0,
    max_permute_len: int | None = 4,
    max_tp: int = 4,
    max_stages: int | None = 8,
    exhaustive: bool = False,
    kv_bits: int = 16,
) -> System:
    """Metis: a prefill and a decode pool of uneven pipelines over mixed GPUs; our transfer of a planner of training.

    Stages of no less than ``variance`` times the mean GPUs, types in every order, lists of stages beyond
    ``max_permute_len`` permuted in units (None: never); ``max_tp`` GPUs in a tensor-parallel group and ``max_stages``
    in a pipeline (ours; None: as many as layers). Of data parallelism, which becomes replicas fed by shares, the
    largest degree that memory allows is taken, with ``exhaustive`` the best. Batches are vLLM V1's; KV is pulled whole,
    in ``kv_bits`` a value (16: as it is).
    """
    if not variance >= 0:
        raise ConfigError(f"system.variance is {variance}; it must be a number >= 0")
    for name, value in (("max_permute_len", max_permute_len), ("max_tp", max_tp), ("max_stages", max_stages)):
        if value is not None and value < 1:
            raise ConfigError(f"system.{name} is {value}; it must be a whole number >= 1")
    transfer = in_bits(Whole(pull=True), kv_bits, moves=True)
    return System(
        name="metis",
        mirrors="Metis (USENIX ATC 2024), by its public repository, carried over to serving; batches of vLLM V1",
        planner=Metis(
            variance=variance,
            max_permute_len=max_permute_len,
            max_tp=max_tp,
            max_stages=max_stages,
            exhaustive=exhaustive,
        ),
        router=ByShare,
        batcher=lambda role: TokenBudget(),
        transfer=lambda: transfer,
        rescheduler=RestorePlan,
    )
