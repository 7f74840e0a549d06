"""Power-capped GPUs: prompts, which are bound by compute, take longer; decodes, bound by memory, do not."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from sim.cluster import Cluster, did_you_mean
from sim.cost.step import StageCost, StepCost
from sim.model import ModelSpec
from sim.types import ConfigError, Line, Stage, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCapped:
    """Steps that hold prompt tokens take ``prompt_factor`` as long on the machines in ``nodes``.

    The shape is Splitwise's (ISCA 2024, figure 9: prompts slow down under a cap, decodes hardly). Its factor of 1.3
    for an H100 at 70 % of its power is derived by its authors' simulator, not measured: state your own if you have one.
    """

    inner: StepCost
    nodes: frozenset[str]
    prompt_factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_factor < inf:
            raise ConfigError(f"power cap: prompt_factor is {self.prompt_factor}; it must be a number >= 1")

    @property
    def name(self) -> str:
        return f"{self.inner.name}, {len(self.nodes)} machines power-capped"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        known = [node.name for node in cluster.nodes]
        for name in sorted(self.nodes):
            if name not in known:
                raise ConfigError(f"system.power_capped: node {did_you_mean(name, known)}")
        bound = self.inner.bind(model, stage, cluster, slow)
        if not any(cluster.node(gpu).name in self.nodes for gpu in stage.gpus):
            return bound
        return _Capped(bound, self.inner.bind(model, stage, cluster, slow * self.prompt_factor))


class _Capped(NamedTuple):
    """A stage's price by whether the step holds prompt tokens, which stays the same along a line."""

    decodes: StageCost
    prompts: StageCost

    @property
    def measured(self) -> bool:
        """The factor is not."""
        return False

    def line(self, work: Work) -> Line:
        return (self.prompts if work.chunks else self.decodes).line(work)
