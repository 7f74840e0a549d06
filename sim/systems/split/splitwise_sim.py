"""What splitwise-sim, the simulator behind Splitwise's figures, does otherwise than the system it stands for.

Reproduced on purpose, for comparison with published figures only (Mutinifni/splitwise-sim 8f99e7d): decodes are
priced nearly free in a batch (``performance_model.py``), KV is that of all heads, KV transfers never contend
(``interconnect.py``), and decodes paused often are never due (``instance.py``). Capped prompt times of exactly 1.3
times the others are the default of ``sim.systems.split.splitwise`` for want of a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sim.cluster import Cluster
from sim.cost import StageCost, StepCost
from sim.cost.pieces import UNBOUNDED
from sim.model import ModelSpec
from sim.policy import View
from sim.types import Chunk, Line, Move, Stage, Work

MIXED_FACTOR = 1.1
"""A step with prompts and decodes, over one with as many tokens of prompt only."""
BYTES_PER_S = 200e9
"""Between two machines, all eight GPUs together; the simulator's configured value."""
NEVER_DUE = 1 << 62
"""Pauses after which a decode goes before prompts: it is looked for at the wrong end of a queue sorted by pauses."""
OVERLAP = 10
"""Per-layer sending is stood for by so many times the bandwidth."""


def kv_scale(model: ModelSpec) -> float:
    """KV of all attention heads over KV of the model's KV heads (8 for Llama-2-70B, 1 without grouping)."""
    return model.num_attention_heads / model.num_key_value_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCountOnly:
    """Steps priced by their number of tokens, context left out.

    The decode table is keyed by prompt tokens times batch, from 128 on, and looked up with the number of sequences: any
    decode batch of the simulated sizes costs what one sequence does.
    """

    inner: StepCost

    @property
    def name(self) -> str:
        return f"{self.inner.name}, as splitwise-sim reads it"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        plain = self.inner.bind(model, stage, cluster, slow)
        return _Lookup(plain, self.inner.bind(model, stage, cluster, slow * MIXED_FACTOR))


class _Lookup(NamedTuple):
    plain: StageCost
    mixed: StageCost

    @property
    def measured(self) -> bool:
        return False

    def line(self, work: Work) -> Line:
        if not work.tokens:
            return Line(0, 0, UNBOUNDED)
        if work.chunks:
            cost = self.mixed if work.decode_seqs else self.plain
            found = cost.line(Work(((work.tokens, 0),), 0, 0))
        else:
            found = self.plain.line(Work((), 1, 1))
        return Line(found.first_ps, 0, UNBOUNDED, found.extrapolated)


class Detached:
    """KV that passes over no link: it waits for its size over a fixed bandwidth, whoever else sends.

    Nothing crosses the cluster's links, so results show 0 bytes moved.
    """

    pull = False

    def __init__(self, serial: bool) -> None:
        self._bytes_per_s = BYTES_PER_S if serial else BYTES_PER_S * OVERLAP
        self._scale = 1.0

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        self._scale = kv_scale(view.problem.model)
        return (Chunk(0.0, 1.0),)

    def overhead_s(self, move: Move) -> float:
        return move.kv_bytes * self._scale / self._bytes_per_s
