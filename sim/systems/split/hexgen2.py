"""HexGen-2 (ICLR 2025; arXiv 2502.07903): groups by graph partition, pairs by the shares of a max-flow."""

from __future__ import annotations

from typing import Literal

from sim.batchers import Saturating
from sim.planners.hexgen2 import HexGen2
from sim.policy import System
from sim.reschedulers import KeepPlan
from sim.routers import ByShare
from sim.transfers import Whole
from sim.types import ConfigError


def hexgen2(
    routing: Literal["round-robin", "random"] = "round-robin",
    period_s: float = 600.0,
    patience: int = 20,
    guided: bool = True,
) -> System:
    """HexGen-2: spectral partition of the GPUs, prefill and decode types, pairs by max-flow; KV as it is, no faults.

    ``period_s``: over which flows are counted. The swaps end after ``patience`` rounds without gain; ``guided`` by what
    the flow saturates, or else random ones (an ablation). ``routing``: shares are kept by a weighted round
    robin, or drawn. Batches are as ThunderServe's.
    """
    if routing not in ("round-robin", "random"):
        raise ConfigError(f"system.routing is {routing!r}; hexgen-2 has round-robin, random")
    if not period_s > 0:
        raise ConfigError(f"system.period_s is {period_s}; it must be > 0")
    if patience < 0:
        raise ConfigError(f"system.patience is {patience}; it must be a whole number >= 0")
    return System(
        name="hexgen-2",
        mirrors="HexGen-2 (ICLR 2025), by its abstract and public notes; no code is public",
        planner=HexGen2(period_s=period_s, patience=patience, guided=guided),
        router=lambda: ByShare(routing),
        batcher=lambda role: Saturating(),
        transfer=Whole,
        rescheduler=KeepPlan,
    )
