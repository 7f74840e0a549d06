"""Deja Vu (ICML 2023; arXiv 2310.17157): contextual sparsity of decode steps, under any scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from sim.cluster import did_you_mean
from sim.cost import Sparse, Sparsity, StepCost
from sim.policy import System
from sim.systems.layout import PoolOption
from sim.systems.schedulers.fastertransformer import fastertransformer
from sim.systems.schedulers.orca import orca
from sim.systems.schedulers.sarathi import sarathi
from sim.systems.schedulers.sarathi_serve import sarathi_serve
from sim.systems.schedulers.vllm import vllm
from sim.systems.split.splitwise import splitwise
from sim.systems.split.tetriinfer import tetriinfer
from sim.types import ConfigError

SCHEDULERS: Mapping[str, Callable[..., System]] = {
    "vllm": vllm,
    "orca": orca,
    "fastertransformer": fastertransformer,
    "sarathi": sarathi,
    "sarathi-serve": sarathi_serve,
    "splitwise": splitwise,
    "tetriinfer": tetriinfer,
}
"""Those that search no plan by simulating another system."""


def dejavu(
    attention_density: float | list[float] | None = None,
    mlp_density: float | list[float] | None = None,
    overlap: float = 0.0,
    attention_rank: int = 512,
    mlp_rank: int = 1000,
    lookahead: bool = True,
    top_k_s: float = 0.0,
    recompute_miss: float = 1.0,
    gathered: Literal["bytes", "measured"] = "bytes",
    scheduler: str = "vllm",
    scheduler_options: Mapping[str, Any] | None = None,
    replicas: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    gpu: str | None = None,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """Deja Vu: decodes compute the attention heads and MLP neurons that predictors choose; any scheduler above.

    Densities: the share of heads and neurons that a token needs, or a list with one for each layer; they default to
    OPT-175B's (5/12, 0.1) for ReLU models and must be given for others. A step needs what any of its sequences needs:
    ``overlap`` 0 if they choose independently, 1 if all the same. Predictors stay in memory and run beside the
    all-reduces with ``lookahead``; a rank of 0 drops one. ``recompute_miss``: how much of the KV that chosen heads lack
    must be made again (1: all context decoded, chosen independently; prompts miss nothing, so a/2 / (p + a/2) for
    prompts of p and answers of a tokens). ``gathered`` measured: time by density from the profile's ``gemv_density``
    table. ``scheduler``: the system whose policies it runs under, set by ``scheduler_options``. A token's KV takes the
    room of the dense model's; inputs kept beside it are not counted.
    """
    if scheduler not in SCHEDULERS:
        raise ConfigError(f"system.scheduler: {did_you_mean(scheduler, SCHEDULERS)}")
    sparsity = Sparsity(
        attention_density=attention_density,
        mlp_density=mlp_density,
        overlap=overlap,
        attention_rank=attention_rank,
        mlp_rank=mlp_rank,
        lookahead=lookahead,
        top_k_s=top_k_s,
        recompute_miss=recompute_miss,
        gathered=gathered,
    )
    places = {"replicas": replicas, "tp": tp, "pp": pp, "gpu": gpu, "prefill": prefill, "decode": decode}
    given = {name: value for name, value in places.items() if value is not None}
    below = _scheduled(scheduler, given | dict(scheduler_options or {}))
    return replace(
        below,
        name="deja-vu",
        mirrors=f"Deja Vu (ICML 2023), kernels of FMInference/DejaVu; scheduler: {below.mirrors}",
        cost=partial(_sparse, below.cost, sparsity),
        model=sparsity.loaded,
        remarks=sparsity.remarks,
    )


def _scheduled(scheduler: str, options: Mapping[str, Any]) -> System:
    factory = SCHEDULERS[scheduler]
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"system: {scheduler}'s option {did_you_mean(option, known)}")
    return factory(**options)


def _sparse(below: Callable[[StepCost], StepCost], sparsity: Sparsity, cost: StepCost) -> StepCost:
    """Sparse kernels, and around them what the scheduler's system puts around any (power caps, padded chunks)."""
    return below(Sparse(inner=cost, sparsity=sparsity))
