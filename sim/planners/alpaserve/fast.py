"""AlpaServe's own quick simulator (section 4.2): arrivals once through, a clock for each stage of each group.

It scores placements, in one pass; the engine is what serves. A request goes to the hosting group that is free first and
is refused there and then if it would miss its latency bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PIPELINE_OVERHEAD = 0.009
"""Of every stage's time, for each stage of the pipeline (the artifact's)."""


class Arrival(NamedTuple):
    at_s: float
    model: str


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs that serve some models: seconds of each pipeline stage, by model."""

    stage_s: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, seconds: Mapping[str, Sequence[float]]) -> Group:
        """With the overhead of pipelining."""
        return cls({name: tuple(s * (1 + PIPELINE_OVERHEAD * len(row)) for s in row) for name, row in seconds.items()})


@dataclass(frozen=True, slots=True)
class Served:
    """What became of the arrivals: per model how many came and how many were served; per group how many it got."""

    arrived: Mapping[str, int]
    good: Mapping[str, int]
    dispatched: tuple[int, ...]
    mean_latency_s: float

    @property
    def goodput(self) -> float:
        """Share of all arrivals that were served within the bound."""
        return sum(self.good.values()) / max(1, sum(self.arrived.values()))

    def unserved(self, model: str) -> int:
        return self.arrived.get(model, 0) - self.good.get(model, 0)


def replay(
    arrivals: Sequence[Arrival], groups: Sequence[Group], bound_s: Mapping[str, float], overhead_s: float = 0.0
) -> Served:
    """Serve the arrivals (in order of time), first come first served; ``overhead_s`` counts for the bound only."""
    clocks = [[0.0] * max((len(row) for row in group.stage_s.values()), default=1) for group in groups]
    hosts = {model: [g for g, group in enumerate(groups) if model in group.stage_s] for model in bound_s}
    arrived: dict[str, int] = {}
    good: dict[str, int] = {}
    dispatched, latency_s = [0] * len(groups), 0.0
    for at_s, model in arrivals:
        arrived[model] = arrived.get(model, 0) + 1
        if not hosts[model]:
            continue
        g = min(hosts[model], key=lambda group: clocks[group][0])
        dispatched[g] += 1
        finish_s, ends = _through(at_s, clocks[g], groups[g].stage_s[model])
        if finish_s + overhead_s - at_s <= bound_s[model]:
            clocks[g][: len(ends)] = ends
            good[model] = good.get(model, 0) + 1
            latency_s += finish_s + overhead_s - at_s
    served = sum(good.values())
    return Served(arrived, good, tuple(dispatched), latency_s / served if served else 0.0)


def _through(at_s: float, clocks: Sequence[float], stages_s: Sequence[float]) -> tuple[float, list[float]]:
    """When the request is done, and when each stage is free again."""
    ends = []
    for free_s, stage_s in zip(clocks, stages_s, strict=False):
        at_s = max(at_s, free_s) + stage_s
        ends.append(at_s)
    return at_s, ends
