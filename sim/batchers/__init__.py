"""Batchers: what a replica's next iteration computes. One scheduler per file; ``common`` has what they share.

Every class fits ``sim.policy.Batcher`` and is a whole scheduler on one screen. None may read a request's true
output length, keep requests across calls, or assume that it is called once per iteration (see
``Batch.repeat_at_most``).
"""

from sim.batchers.common import refuse_if_full
from sim.batchers.decode_maximal import DecodeMaximal, smallest_efficient_chunk
from sim.batchers.disaggregated import Disaggregated
from sim.batchers.mixed_prompts import MixedPrompts
from sim.batchers.one_model import OneModel
from sim.batchers.passing import Passing
from sim.batchers.pausing_mixed import PausingMixed
from sim.batchers.phases import HandedOver, PromptPhases
from sim.batchers.prefill_first import PrefillFirst
from sim.batchers.reserving import IterationLevel, RequestLevel, reserved_tokens
from sim.batchers.saturating import Saturating
from sim.batchers.stall_free import ChunkSchedule, StallFree, token_budget_for
from sim.batchers.token_budget import TokenBudget
from sim.batchers.two_phase import TwoPhase

__all__ = [
    "ChunkSchedule",
    "DecodeMaximal",
    "Disaggregated",
    "HandedOver",
    "IterationLevel",
    "MixedPrompts",
    "OneModel",
    "Passing",
    "PausingMixed",
    "PrefillFirst",
    "PromptPhases",
    "RequestLevel",
    "Saturating",
    "StallFree",
    "TokenBudget",
    "TwoPhase",
    "refuse_if_full",
    "reserved_tokens",
    "smallest_efficient_chunk",
    "token_budget_for",
]
