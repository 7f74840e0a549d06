"""FasterTransformer under a request-level scheduler: the baseline of Orca's and vLLM's papers."""

from __future__ import annotations

from sim.batchers import RequestLevel
from sim.policy import Limits, System
from sim.reschedulers import RestorePlan
from sim.systems.layout import layout
from sim.transfers import Whole


def fastertransformer(
    replicas: int | None = None,
    tp: int | None = None,
    pp: int = 1,
    gpu: str | None = None,
) -> System:
    """FasterTransformer: request-level batching; a batch starts when the longest request of the last has ended.

    A batch is the earliest system.engine.max_num_seqs requests, or as many as have room for
    system.engine.max_model_len (2048) each.
    """
    planner, router = layout(replicas, tp, pp, gpu, None, None)
    return System(
        name="fastertransformer",
        mirrors="FasterTransformer with the scheduler of vLLM's paper (SOSP 2023, section 6.1)",
        planner=planner,
        router=router,
        batcher=lambda role: RequestLevel(),
        transfer=Whole,
        rescheduler=RestorePlan,
        limits=Limits(max_model_len=2048),
    )
