"""Asynchronous scheduling: the processor prepares a step while the GPU works on the last one."""

from __future__ import annotations

from typing import NamedTuple

from sim.cost.roofline import Overhead
from sim.cost.step import StageCost
from sim.types import Line, Work, to_ps


class Overlapped(NamedTuple):
    """A stage's price where a step takes the longer of its kernels and of the processor's work for the next one."""

    kernels: StageCost
    step_ps: int
    sequence_ps: int

    @classmethod
    def of(cls, kernels: StageCost, overhead: Overhead, slow: float = 1.0) -> Overlapped:
        """``kernels``: without any overhead of its own."""
        return cls(kernels, to_ps(overhead.step_s * slow), to_ps(overhead.sequence_s * slow))

    @property
    def measured(self) -> bool:
        return self.kernels.measured

    def line(self, work: Work) -> Line:
        line = self.kernels.line(work)
        sequences = work.decode_seqs + sum(1 for tokens, _ in work.chunks if tokens)
        least_ps = self.step_ps + sequences * self.sequence_ps if sequences else 0
        if line.first_ps >= least_ps:
            return line
        iterations = line.iterations
        if line.slope_ps:  # until the kernels take longer
            iterations = min(iterations, 1 + (least_ps - line.first_ps) // line.slope_ps)
        return Line(least_ps, 0, iterations, line.extrapolated)
