"""Chunks padded to one size, and a length predictor that shares the GPU with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from sim.cluster import Cluster
from sim.cost.step import StageCost, StepCost
from sim.cost.step import seconds as price_s
from sim.model import ModelSpec
from sim.types import Line, Stage, Work

MAX_LOSS = 0.1
"""Of prefill throughput, below which a chunk counts as saturating (ours)."""
TILE = 64
LARGEST_CHUNK = 4096


def saturating_chunk(seconds: Callable[[Work], float]) -> int:
    """The smallest multiple of 64 tokens whose step has 90 % of the best throughput, up to 4096, by this price."""
    sizes = range(TILE, LARGEST_CHUNK + TILE, TILE)
    rates = [size / seconds(Work(((size, 0),), 0, 0)) for size in sizes]
    least = (1 - MAX_LOSS) * max(rates)
    return next(size for size, rate in zip(sizes, rates, strict=True) if rate >= least)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedChunks:
    """Steps with prompts compute ``chunk_tokens`` at least, zeros filling them up, and take ``prompt_factor`` as long.

    ``chunk_tokens`` None: the stage's ``saturating_chunk``.
    Source: TetriInfer (arXiv 2401.11181): chunks of one size; its predictor runs beside the prefill, on the same GPU.
    """

    inner: StepCost
    chunk_tokens: int | None
    prompt_factor: float

    @property
    def name(self) -> str:
        return f"{self.inner.name}, chunks of {self.chunk_tokens or 'saturating size'}"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        decodes = self.inner.bind(model, stage, cluster, slow)
        chunk_tokens = self.chunk_tokens or saturating_chunk(partial(price_s, decodes))
        return _Padded(decodes, self.inner.bind(model, stage, cluster, slow * self.prompt_factor), chunk_tokens)


class _Padded(NamedTuple):
    decodes: StageCost
    prompts: StageCost
    chunk_tokens: int

    @property
    def measured(self) -> bool:
        return self.decodes.measured

    def line(self, work: Work) -> Line:
        if not work.chunks:
            return self.decodes.line(work)
        missing = self.chunk_tokens - sum(tokens for tokens, _ in work.chunks)
        if missing <= 0:
            return self.prompts.line(work)
        padded = self.prompts.line(work._replace(chunks=(*work.chunks, (missing, 0))))
        return Line(padded.first_ps, 0, 1, padded.extrapolated)
