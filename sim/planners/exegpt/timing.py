"""What a pipeline takes, by the bound latency model: a pass of prompts, an iteration of decodes, a hand-over of KV."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import ceil

from sim.cost import StageCost, seconds
from sim.memory import kv_blocks
from sim.planners.exegpt.layout import Groups, pipeline
from sim.policy import Problem
from sim.types import Replica, Role, Stage, Work

REFERENCE_BATCH = 32
"""Prompts, and decodes, by which the speed of a group of GPUs is told before the batch is known."""


class Pipeline:
    """The stages of a replica and their times in seconds; equal stages are priced once."""

    def __init__(self, timing: Timing, replica: Replica) -> None:
        self._timing = timing
        self.replica = replica
        self.gpus = replica.gpus
        self.stages = len(replica.stages)
        self._kinds = {timing.kind(stage): stage for stage in reversed(replica.stages)}
        self._counts = [timing.kind(stage) for stage in replica.stages]
        self.blocks = kv_blocks(timing.problem, replica.stages, timing.problem.limits)
        self._pass = lru_cache(maxsize=None)(self._price)

    def encode_s(self, prompts: int) -> tuple[float, float]:
        """(slowest stage, way through all) of one pass of so many prompts of mean length."""
        return self._pass(prompts, 0)

    def decode_s(self, sequences: int) -> tuple[float, float]:
        """The same of one token of so many decoding sequences of mean context."""
        return self._pass(0, sequences)

    def _price(self, prompts: int, sequences: int) -> tuple[float, float]:
        timing = self._timing
        work = timing.work(prompts, sequences)
        if not work.tokens:
            return 0.0, 0.0
        times = {kind: seconds(timing.bound(stage), work) for kind, stage in self._kinds.items()}
        whole_s = sum(times[kind] for kind in self._counts)
        return max(times.values()), whole_s + (self.stages - 1) * timing.hop_s(self.replica, work.tokens)


class Timing:
    """Pipelines over these of a problem's GPUs (default: all), made once for each layout."""

    def __init__(
        self,
        problem: Problem,
        prompt_tokens: float,
        context_tokens: float,
        iterations: float,
        gpus: tuple[str, ...] | None = None,
    ) -> None:
        self.problem = problem
        self._gpus = problem.cluster.gpu_ids if gpus is None else gpus
        self._prompt = max(1, round(prompt_tokens))
        self._context = context_tokens
        self._iterations = iterations
        self._whole: dict[int, tuple[float, float]] = {}
        self._bound: dict[tuple[int, int, bool, bool], StageCost] = {}
        self._pipelines: dict[tuple[Role, Groups], Pipeline] = {}

    def work(self, prompts: int, sequences: int) -> Work:
        return Work(((self._prompt, 0),) * prompts, sequences, round(sequences * self._context))

    def pipeline(self, name: str, role: Role, groups: Groups) -> Pipeline:
        key = (role, groups)
        if key not in self._pipelines:
            replica = pipeline(self.problem.model, name, role, groups, lambda tp: self._speed(role, tp))
            self._pipelines[key] = Pipeline(self, replica)
        return self._pipelines[key]

    def kind(self, stage: Stage) -> tuple[int, int, bool, bool]:
        return stage.num_layers, stage.tp, stage.first_layer == 0, stage.end_layer == self.problem.model.num_layers

    def bound(self, stage: Stage) -> StageCost:
        kind = self.kind(stage)
        if kind not in self._bound:
            self._bound[kind] = self.problem.cost.bind(self.problem.model, stage, self.problem.cluster)
        return self._bound[kind]

    def whole_s(self, tp: int) -> tuple[float, float]:
        """Seconds of the whole model on so many GPUs: a reference batch of prompts, one iteration of decodes."""
        if tp not in self._whole:
            stage = Stage(name="whole", gpus=self._gpus[:tp], first_layer=0, end_layer=self.problem.model.num_layers)
            cost = self.bound(stage)
            self._whole[tp] = (
                seconds(cost, self.work(REFERENCE_BATCH, 0)),
                seconds(cost, self.work(0, REFERENCE_BATCH)),
            )
        return self._whole[tp]

    def _speed(self, role: Role, tp: int) -> float:
        """Of a group at what its pool does: prompts, decodes, or both as a request has them."""
        encode_s, decode_s = self.whole_s(tp)
        if role == "prefill":
            return 1 / encode_s
        return 1 / (decode_s if role == "decode" else encode_s + self._iterations * decode_s)

    def hop_s(self, replica: Replica, tokens: int) -> float:
        """From one stage to the next: the slowest hop."""
        cluster = self.problem.cluster
        size_bytes = tokens * self.problem.model.hidden_size * 2
        stages = replica.stages
        paths = [cluster.path(a.gpus, b.gpus) for a, b in pairwise(stages)]
        capacity = cluster.capacity_bytes_per_s
        return max((path.latency_s + size_bytes / path.bytes_per_s(capacity) for path in paths), default=0.0)

    def hand_over_s(self, source: tuple[str, ...], target: tuple[str, ...], prompts: int) -> tuple[float, float]:
        """(slowest part, all) of the way of so many prompts' KV from one pool to another.

        Out to host memory and in again; between machines the line counts in place of both, where it takes longer.
        """
        cluster = self.problem.cluster
        kv_bytes = prompts * self._prompt * self.problem.model.kv_bytes_per_token()
        ways = (cluster.load_path(source), cluster.load_path(target), cluster.path(source, target))
        capacity = cluster.capacity_bytes_per_s
        out_s, in_s, line_s = (way.latency_s + kv_bytes / way.bytes_per_s(capacity) for way in ways)
        return max(out_s, in_s, line_s), max(out_s + in_s, line_s)

    def blocks_of(self, tokens: float) -> int:
        """KV blocks of a sequence."""
        return ceil(tokens / self.problem.limits.block_size)
