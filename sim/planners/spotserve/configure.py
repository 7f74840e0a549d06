"""Which pipelines: SpotServe's cost model and configuration optimiser, and how long to serve on before a change.

Sources: sections 3.2 (algorithm 1) and 4.1 of the paper, and the artifact's ``parallel/solver.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sim.planners.spotserve.profile import Times, powers

TIE = 1e-9
"""Latencies that differ by less are equal."""
SPARE_INSTANCES = 2


class Configuration(NamedTuple):
    """``pipelines`` of ``stages`` times ``tp`` GPUs, each for ``batch`` requests at once (the paper's D, P, M, B)."""

    pipelines: int
    stages: int
    tp: int
    batch: int

    def __str__(self) -> str:
        return f"({self.pipelines},{self.stages},{self.tp}) for batches of {self.batch}"

    @property
    def gpus(self) -> int:
        return self.pipelines * self.stages * self.tp


class Iterations(NamedTuple):
    """Seconds of a batch's prompts and of each step, at the best number of micro-batches, and at both ends."""

    prompts_s: float
    step_s: float
    ends_s: float

    def after(self, steps: int) -> float:
        """Seconds until so many steps are done."""
        return self.prompts_s + steps * self.step_s


def iterations(times: Times, stages: int, tp: int, batch: int) -> Iterations:
    return Iterations(
        times.slack * min(times.prompts_s(stages, tp, batch, parts) for parts in powers(batch)),
        times.slack * min(times.step_s(stages, tp, batch, parts) for parts in powers(batch)),
        times.slack * 2 * times.embed_s(batch),
    )


class Choice(NamedTuple):
    configuration: Configuration
    latency_s: float
    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """Candidates: ``tp`` and batches are powers of two, ``stages`` divide ``padded_layers`` (or, without
    ``stages_divide``, are no more); as many pipelines as there is room for.

    ``fits``: whether a pipeline of (stages, tp) has room for the model and a batch. ``least_gpus``: of a pipeline.
    """

    times: Times
    output_tokens: int
    padded_layers: int
    stages_divide: bool = True
    least_gpus: int = 1
    max_tp: int = 8
    max_batch: int = 8
    fits: Callable[[int, int, int], bool] = lambda stages, tp, batch: True

    def latency_s(self, stages: int, tp: int, batch: int) -> float:
        """Of a batch from its first prompt to its last token: the paper's l(C)."""
        found = iterations(self.times, stages, tp, batch)
        return found.after(self.output_tokens) + found.ends_s

    def candidates(self, gpus: Callable[[int], int]) -> Iterator[Choice]:
        """``gpus``: how many there are for tensor parallelism of a degree."""
        for tp in powers(self.max_tp):
            count = gpus(tp)
            most = min(count // tp, self.padded_layers)
            for stages in range(max(1, -(-self.least_gpus // tp)), most + 1):
                if not (self.stages_divide and self.padded_layers % stages):
                    yield from self._batches(count // (stages * tp), stages, tp)

    def _batches(self, pipelines: int, stages: int, tp: int) -> Iterator[Choice]:
        for batch in powers(self.max_batch):
            if self.fits(stages, tp, batch):
                latency_s = self.latency_s(stages, tp, batch)
                found = Configuration(pipelines, stages, tp, batch)
                yield Choice(found, latency_s, pipelines * batch / latency_s)

    def choose(self, gpus: int | Callable[[int], int], need_per_s: float) -> Choice | None:
        """Of those that serve the rate the quickest (of equals the one with the fewest GPUs); else the one that serves
        most. None: not even one pipeline fits."""
        known = list(self.candidates(gpus if callable(gpus) else lambda tp: gpus))
        able = [one for one in known if one.rate_per_s >= need_per_s]
        if not able:
            return max(known, key=lambda one: one.rate_per_s, default=None)
        best_s = min(one.latency_s for one in able) * (1 + TIE)
        return min((one for one in able if one.latency_s <= best_s), key=lambda one: one.configuration.gpus)


def wanted_instances(best: Configuration, gpus: int, per_instance: int, spare: int = SPARE_INSTANCES) -> int:
    """Instances to ask for (on demand and spot together), or if negative to give back (on demand first)."""
    return -(-best.gpus // per_instance) + spare - gpus // per_instance


def steps_before(times: Iterations, left_s: float, most: int) -> int | None:
    """Just in time before instances go: the most steps that end before ``left_s`` (section 4.1). None: not even the
    prompts do."""
    if times.prompts_s >= left_s:
        return None
    steps = min(most, int((left_s - times.prompts_s) / times.step_s) + 1)
    while times.after(steps) >= left_s:
        steps -= 1
    return steps


def steps_until(times: Iterations, wait_s: float) -> int:
    """Just in time after instances come: the fewest steps that end no sooner than in ``wait_s``."""
    steps = max(0, int((wait_s - times.prompts_s) / times.step_s) - 1)
    while times.after(steps) < wait_s:
        steps += 1
    return steps
