"""CUDA graphs: engines capture steps of a few sizes, and run every other step as the next larger one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from sim.cost.step import Fixed, StageCost
from sim.types import ConfigError, Line, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """``sizes``: the tokens of a step that graphs were captured for; larger steps run without, as they are.

    vLLM pads what depends on tokens (``block_tokens`` None): GEMMs and all-reduces of any step, but neither attention
    nor the head. Our torch engine captures whole decode steps: sequences are padded in every operator, and their
    contexts to a power of two of blocks of ``block_tokens``.
    """

    sizes: tuple[int, ...]
    block_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or any(b <= a for a, b in pairwise(self.sizes)):
            raise ConfigError(f"graphs: sizes {list(self.sizes)}: needs whole numbers >= 1, each larger than the last")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ConfigError(f"graphs: block_tokens is {self.block_tokens}; it must be >= 1")

    def padded(self, count: int) -> int:
        """The size that a step of so many tokens runs as."""
        place = bisect_left(self.sizes, count)
        return count if place == len(self.sizes) else self.sizes[place]

    def of_tokens(self, operator: Fixed) -> Fixed:
        """An operator that depends on a step's tokens, as graphs run it."""
        return lambda count: operator(self.padded(count))


VLLM_GRAPHS = Graphs(sizes=(1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)))
"""vLLM's default since 0.11, for 256 sequences and more (its resolved configuration, as in the metadata of
LLMServingSim's run; before, every multiple of 8 up to 512)."""


class Captured(NamedTuple):
    """A stage's price where whole decode steps are captured: constant until contexts need blocks twice as many."""

    inner: StageCost
    graphs: Graphs
    block_tokens: int

    @property
    def measured(self) -> bool:
        return self.inner.measured

    def line(self, work: Work) -> Line:
        seqs, context = work.decode_seqs, work.decode_context
        if work.chunks or not 0 < seqs <= self.graphs.sizes[-1]:
            return self.inner.line(work)
        blocks = -(-context // (seqs * self.block_tokens))
        until = self.block_tokens << (max(1, blocks) - 1).bit_length()
        rows = self.graphs.padded(seqs)
        line = self.inner.line(Work((), rows, rows * until))
        return Line(line.first_ps, 0, 1 + (seqs * until - context) // seqs, line.extrapolated)
