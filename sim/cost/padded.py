"""Chunks padded to one size, and a length predictor that shares the GPU with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sim.cluster import Cluster
from sim.cost.step import StageCost, StepCost
from sim.model import ModelSpec
from sim.types import Line, Stage, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedChunks:
    """Steps with prompts compute ``chunk_tokens`` at least, zeros filling them up, and take ``prompt_factor`` as long.

    Source: TetriInfer (arXiv 2401.11181): chunks of one size; its predictor runs beside the prefill, on the same GPU.
    """

    inner: StepCost
    chunk_tokens: int
    prompt_factor: float

    @property
    def name(self) -> str:
        return f"{self.inner.name}, chunks of {self.chunk_tokens}"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        decodes = self.inner.bind(model, stage, cluster, slow)
        return _Padded(decodes, self.inner.bind(model, stage, cluster, slow * self.prompt_factor), self.chunk_tokens)


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
