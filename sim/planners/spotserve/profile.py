"""How long a batch takes in a pipeline (SpotServe, ASPLOS 2024, section 3.2): by a profile of layers, or by the
problem's latency model. ``LayerProfile`` is also a latency model, so that a run may be of the same times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sim.cluster import Cluster
from sim.cost import StageCost
from sim.cost.step import seconds
from sim.model import ModelSpec
from sim.policy import Problem
from sim.types import ConfigError, Line, Stage, Work, to_ps

UNBOUNDED = 1 << 30


class Times(Protocol):
    """Seconds of a batch in one pipeline of ``stages`` times ``tp`` GPUs; it passes in ``parts`` micro-batches."""

    @property
    def slack(self) -> float:
        """Estimates are multiplied by it."""

    def prompts_s(self, stages: int, tp: int, batch: int, parts: int) -> float: ...
    def step_s(self, stages: int, tp: int, batch: int, parts: int) -> float: ...
    def embed_s(self, batch: int) -> float:
        """At each end of the model, once."""


Table = Mapping[int, Mapping[int, float]]
"""Seconds of one layer by tensor-parallel degree and batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """The artifact's form of a profile. Fits ``Times`` and ``StepCost``.

    ``prompts`` are of ``prompt_tokens`` each. As a latency model it gives a batch what the cost model says, with the
    best number of micro-batches; times are linear between batches, and on beyond the largest; fewer tokens than a
    prompt's cost less in proportion.
    """

    name: str
    num_layers: int
    padded_layers: int
    prompts: Table
    steps: Table
    ends_s: Mapping[int, float]
    prompts_hop_s: float
    step_hop_s: float
    slack: float = 1.0
    prompt_tokens: int = 512

    @classmethod
    def of(cls, name: str, data: Mapping[str, Any]) -> LayerProfile:
        """From the artifact's names (milliseconds); keys of tables may be text."""
        layers = {
            int(tp): {int(batch): times for batch, times in row.items()} for tp, row in data["per_layer_ms"].items()
        }

        def table(kind: str) -> Table:
            return {tp: {batch: times[kind] / 1e3 for batch, times in row.items()} for tp, row in layers.items()}

        return cls(
            name=name,
            num_layers=data["layer_num"],
            padded_layers=data["padded_layer_num"],
            prompts=table("init"),
            steps=table("incr"),
            ends_s={int(batch): ms / 1e3 for batch, ms in data["embed_ms"].items()},
            prompts_hop_s=data["pp_init_comm_ms"] / 1e3,
            step_hop_s=data["pp_incr_comm_ms"] / 1e3,
            slack=data["final_fix_factor"],
        )

    # ------------------------------------------------------------ Times, as the artifact has them

    def prompts_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
        """Divided by ``parts``, as in the artifact: four prompts may take less than one alone. What it printed for
        GPT-20B on three and four on-demand instances, more than they can serve, agrees."""
        layer_s = self._of(self.prompts, tp)[batch // parts]
        return (layer_s * self._layers(stages) * (stages + parts - 1) + self.prompts_hop_s * (stages - 1)) / parts

    def step_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
        layer_s = self._of(self.steps, tp)[batch // parts]
        return layer_s * self._layers(stages) * (stages + parts - 1) + self.step_hop_s * (stages - 1) / parts

    def embed_s(self, batch: int) -> float:
        return self.ends_s[batch]

    def _layers(self, stages: int) -> int:
        return -(-self.num_layers // stages)

    def _of(self, table: Table, tp: int) -> Mapping[int, float]:
        if tp not in table:
            raise ConfigError(f"{self.name}: tp {tp} is not in the profile; it has {', '.join(map(str, table))}")
        return table[tp]

    # ------------------------------------------------------------ StepCost

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        """A stage's part of what a batch takes, as the cost model has it, in a pipeline of such stages."""
        del cluster
        stages = max(1, round(model.num_layers / stage.num_layers))
        part = stage.num_layers / (stages * self._layers(stages)) * self.slack * slow
        ends = ((stage.first_layer == 0) + (stage.end_layer == model.num_layers)) * self.slack * slow
        batches = sorted(self.ends_s)

        def row(best: Callable[[int, int, int, int], float]) -> dict[int, float]:
            return {b: part * min(best(stages, stage.tp, b, parts) for parts in powers(b)) for b in batches}

        prompts = row(self.prompts_s)
        return _LayerCost(
            {batch: prompts[batch] + ends * self.ends_s[batch] for batch in batches},
            row(self.step_s),
            self.prompt_tokens,
        )


class _LayerCost(NamedTuple):
    """Prompts and decodes of a step one after the other, as the profile has no others."""

    prompts: Mapping[int, float]
    steps: Mapping[int, float]
    prompt_tokens: int
    measured: bool = True

    def line(self, work: Work) -> Line:
        time_s = 0.0
        prompts = sum(tokens for tokens, _ in work.chunks) / self.prompt_tokens
        if prompts:
            time_s += between(self.prompts, prompts)
        if work.decode_seqs:
            time_s += between(self.steps, max(work.decode_seqs, min(self.steps)))
        beyond = max(prompts, work.decode_seqs) > max(self.steps)
        return Line(to_ps(time_s), 0, UNBOUNDED, beyond)


def powers(most: int) -> Iterator[int]:
    """1, 2, 4 ... up to the largest that is not above."""
    return (1 << bit for bit in range(max(0, most).bit_length()))


def between(row: Mapping[int, float], count: float) -> float:
    """Linear between the counts, through zero below the first, on past the last."""
    counts = sorted(row)
    if count <= counts[0] or len(counts) == 1:
        return row[counts[0]] * count / counts[0]
    high = next((one for one in counts if one >= count), counts[-1])
    low = counts[counts.index(high) - 1]
    return row[low] + (row[high] - row[low]) * (count - low) / (high - low)


class Costed:
    """By the problem's latency model: requests of the workload's mean lengths, one stage as long as the longest."""

    slack = 1.0

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._input_tokens = max(1, round(problem.workload.mean_input_tokens))
        self._context = self._input_tokens + round(problem.workload.mean_output_tokens / 2)
        self._bound: dict[tuple[int, int], StageCost] = {}

    def prompts_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
        work = Work(((self._input_tokens, 0),) * (batch // parts), 0, 0)
        return seconds(self._stage(stages, tp), work) * (stages + parts - 1)

    def step_s(self, stages: int, tp: int, batch: int, parts: int) -> float:
        work = Work((), batch // parts, batch // parts * self._context)
        return seconds(self._stage(stages, tp), work) * (stages + parts - 1)

    def embed_s(self, batch: int) -> float:
        """It is in the stage."""
        return 0.0

    def _stage(self, stages: int, tp: int) -> StageCost:
        """The last one, with the head; of the first GPUs there are, within a machine if it has so many."""
        if (stages, tp) not in self._bound:
            problem = self._problem
            nodes = [node.gpu_ids for node in problem.cluster.nodes if node.count >= tp]
            gpus = nodes[0][:tp] if nodes else problem.cluster.gpu_ids[:tp]
            end = problem.model.num_layers
            first = end - -(-end // stages)
            stage = Stage(name="probe", gpus=gpus, first_layer=first, end_layer=end)
            self._bound[stages, tp] = problem.cost.bind(problem.model, stage, problem.cluster)
        return self._bound[stages, tp]


def times_of(problem: Problem) -> Times:
    """The artifact's profile where the problem's latency model is one."""
    return problem.cost if isinstance(problem.cost, LayerProfile) else Costed(problem)
