"""Batches in their steady state, priced by the cost model alone: what SARATHI's single-GPU figures are made of."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from sim import Cluster
from sim.cost import Roofline, StageCost, seconds
from sim.model import model
from sim.types import Stage, Work


@cache
def step_cost(name: str, gpu: str, tp: int = 1, layers: tuple[int, int] | None = None) -> StageCost:
    spec = model(name)
    first, end = layers or (0, spec.num_layers)
    cluster = Cluster.of(nodes=[{"gpu": gpu, "count": tp}])
    return Roofline().bind(spec, Stage(name="s", gpus=cluster.gpu_ids, first_layer=first, end_layer=end), cluster)


class Batches(NamedTuple):
    """Requests of ``tokens`` = prompt + output, ``slots`` at a time, in their steady state."""

    cost: StageCost
    slots: int
    prompt: float
    output: float

    def decode_s(self, seqs: float) -> float:
        context = self.prompt + self.output / 2
        return seconds(self.cost, Work((), round(seqs), round(seqs * context)))

    def baseline_s(self) -> float:
        """Seconds a request: whole prompts first, then decodes, never together."""
        prompts = seconds(self.cost, Work(((round(self.prompt), 0),) * self.slots, 0, 0))
        return (prompts + self.output * self.decode_s(self.slots)) / self.slots

    def chunked_s(self, chunk: float) -> float:
        """Seconds a request, when each of its chunks carries as many decodes as there are, up to slots - 1."""
        chunks = self.prompt / chunk
        riding = min(self.slots - 1, self.output / chunks)
        together = chunks * self.hybrid_s(chunk, riding)
        left = max(0.0, self.output - chunks * riding)
        return together + left / self.slots * self.decode_s(self.slots)

    def hybrid_s(self, chunk: float, riding: float) -> float:
        """A chunk in the middle of its prompt, and so many decodes."""
        context = self.prompt + self.output / 2
        before = round((self.prompt - chunk) / 2)
        return seconds(self.cost, Work(((round(chunk), before),), round(riding), round(riding * context)))

    def riding_decode_s(self, chunk: float) -> float:
        """What each decode adds to a chunk."""
        return (self.hybrid_s(chunk, self.slots - 1) - self.hybrid_s(chunk, 0)) / (self.slots - 1)
