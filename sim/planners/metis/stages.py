"""What a stage of a pool does: seconds and memory of any range of layers, for a phase and a batch.

Prices are the problem's own (``Problem.cost``), KV is what its model keeps. GPUs of one type in machines of one kind
are alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from math import inf

import numpy as np

from sim.memory import kv_blocks
from sim.planners.metis.balance import Floats
from sim.planners.thunderserve.parallel import link
from sim.planners.thunderserve.replay import Sample
from sim.policy import Problem
from sim.types import PS_PER_S, Stage, Work

CHUNK_TOKENS = 2048
"""vLLM's budget of a step, where none is set."""
Gpus = tuple[str, ...]


class Stages:
    """Prices of one problem; each is asked for once."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model
        self.sample = Sample.of(problem)
        budget = problem.limits.max_num_batched_tokens or CHUNK_TOKENS
        self.prompt = chunks(round(self.sample.mean_input), budget)
        self.prompts = max(1, min(budget // sum(self.prompt), problem.limits.max_num_seqs))
        self._mean_context, self._mean_tokens = self.sample.mean_context, self.sample.mean_tokens
        self._kv_bytes = self.sample.mean_input * self.model.kv_bytes_per_token()
        self.steps = max(1.0, float(self.sample.outputs.mean()) - 1)
        self.kind = cache(self._kind)
        self.hop_s = cache(self._hop_s)
        self._held = cache(self._held_tokens)
        self._seconds = cache(self._seconds_by_range)
        self._together = cache(self._summed)
        self.kv_s = cache(self._kv_s)

    def _kind(self, gpus: Gpus) -> Gpus:
        """Those that stand for all alike; none if these are in several machines: no tensor parallelism there."""
        cluster = self.problem.cluster
        if len({cluster.node(gpu).name for gpu in gpus}) > 1:
            return ()
        mine = cluster.node(gpus[0])
        like = next(
            node
            for node in cluster.nodes
            if node.gpu == mine.gpu and node.count >= len(gpus) and cluster.peer_link(node) == cluster.peer_link(mine)
        )
        return like.gpu_ids[: len(gpus)]

    # ------------------------------------------------------------ by range of layers: [first, end]

    def _by_range(self, of: Callable[[int, int], float]) -> Floats:
        """Ranges of as many layers, dense ones alike, with or without the first and the last one, are priced once."""
        layers, dense = self.model.num_layers, self.model.first_dense_layers
        known: dict[tuple[int, bool, bool, int], float] = {}
        found = np.full((layers + 1, layers + 1), inf)
        for first in range(layers):
            for end in range(first + 1, layers + 1):
                key = (end - first, first == 0, end == layers, max(0, min(end, dense) - first))
                if key not in known:
                    known[key] = of(first, end)
                found[first, end] = known[key]
        return found

    def _held_tokens(self, kind: Gpus) -> Floats:
        problem = self.problem

        def of(first: int, end: int) -> float:
            blocks = kv_blocks(problem, (stage(kind, first, end),), problem.limits)
            return float(blocks * problem.limits.block_size)

        return self._by_range(of)

    def _seconds_by_range(self, kind: Gpus, works: tuple[Work, ...]) -> Floats:
        def of(first: int, end: int) -> float:
            bound = self.problem.cost.bind(self.model, stage(kind, first, end), self.problem.cluster)
            return sum(bound.line(work).first_ps for work in works) / PS_PER_S

        return self._by_range(of)

    def prefill(self, kinds: tuple[Gpus, ...], prompts: int) -> Floats:
        """Seconds of a mean prompt, chunk after chunk, or of several in a step, on these GPUs together.

        Infinite: one of them has no room for the longest request.
        """
        done = accumulate(self.prompt, initial=0)
        works = tuple(Work(((new, old),) * prompts, 0, 0) for new, old in zip(self.prompt, done, strict=False))
        return self._together(kinds, works, float(self.sample.longest_tokens))

    def decode(self, kinds: tuple[Gpus, ...], sequences: int, batch: int) -> Floats:
        """Seconds of a step of so many sequences each, by as many as they are.

        Infinite: one of them has no room for ``batch`` mean requests or for the longest one.
        """
        work = Work((), sequences, round(sequences * self._mean_context))
        return self._together(kinds, (work,), max(float(self.sample.longest_tokens), batch * self._mean_tokens))

    def _summed(self, kinds: tuple[Gpus, ...], works: tuple[Work, ...], need_tokens: float) -> Floats:
        """Speeds add up."""
        counts = Counter(kinds)
        room = np.all([self._held(kind) >= need_tokens for kind in counts], axis=0)
        with np.errstate(divide="ignore"):
            speed = sum(count / self._seconds(kind, works) for kind, count in counts.items())
            return np.where(room, 1 / np.asarray(speed), inf)

    # ------------------------------------------------------------ links

    def _hop_s(self, source: Gpus, target: Gpus, tokens: int) -> float:
        """So many tokens' activations from one stage to the next; infinite: no link."""
        latency_s, rate, _ = link(self.problem, source, target)
        return latency_s + tokens * self.model.hidden_size * 2 / rate if rate else inf

    def hops_s(self, gpus: tuple[Gpus, ...], tokens: int) -> float:
        return sum(self.hop_s(a, b, tokens) for a, b in pairwise(gpus))

    def _kv_s(self, source: Gpus, target: Gpus) -> float:
        """A mean prompt's KV from one replica to another; infinite: no link."""
        latency_s, rate, _ = link(self.problem, source, target)
        return latency_s + self._kv_bytes / rate if rate else inf


def stage(gpus: Gpus, first: int, end: int) -> Stage:
    return Stage(name="trial", gpus=gpus, first_layer=first, end_layer=end)


def chunks(tokens: int, budget: int) -> tuple[int, ...]:
    """A prompt cut as vLLM cuts it."""
    whole, rest = divmod(tokens, budget)
    return (budget,) * whole + ((rest,) if rest else ())
