"""Orca (OSDI 2022), as vLLM's paper rebuilt it for comparison (SOSP 2023, section 6.1)."""

from __future__ import annotations

from sim.batchers import IterationLevel
from sim.batchers.reserving import RESERVES, Reserve
from sim.policy import Limits, System
from sim.predictors import TrueLength
from sim.reschedulers import RestorePlan
from sim.systems.layout import layout
from sim.transfers import Whole
from sim.types import ConfigError


def orca(
    reserve: Reserve = "max",
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
) -> System:
    """Orca: iteration-level batching of whole prompts and decodes, KV reserved contiguously per request.

    ``reserve``: max keeps system.engine.max_model_len tokens for everybody (default 2048), pow2 the output rounded up
    to a power of two, oracle the output as it is. The latter two know the true output length unless a predictor is
    given.
    """
    if reserve not in RESERVES:
        raise ConfigError(f"system.reserve is {reserve!r}; orca has {', '.join(RESERVES)}")
    planner, router = layout(replicas, tp, pp, gpu, None, None)
    return System(
        name="orca",
        mirrors=f"Orca (OSDI 2022) as in vLLM's paper, reserving {reserve}",
        planner=planner,
        router=router,
        batcher=lambda role: IterationLevel(reserve),
        transfer=Whole,
        rescheduler=RestorePlan,
        limits=Limits(max_model_len=2048),
        predictor=TrueLength(),
    )
