"""The cost protocols, and a stage's price composed of its operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from sim.cluster import Cluster
from sim.cost.pieces import UNBOUNDED, Row
from sim.model import ModelSpec
from sim.types import Line, Stage, Work, to_s

CACHE_ENTRIES = 1 << 15


class StageCost(Protocol):
    """The price of any work on one stage."""

    @property
    def measured(self) -> bool:
        """True: from a profile. False: a roofline."""

    def line(self, work: Work) -> Line:
        """Integer picoseconds of ``work`` and of the iterations that follow it.

        The law, for every ``i < iterations``: ``line(advanced(work, i)).first_ps == first_ps + i * slope_ps``
        and ``extrapolated`` is the same.
        """


class StepCost(Protocol):
    """A latency model: binds to a stage once, then prices its steps."""

    @property
    def name(self) -> str:
        """As it stands in results."""

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        """``slow`` multiplies every duration (1 = healthy GPU)."""


def seconds(cost: StageCost, work: Work) -> float:
    return to_s(cost.line(work).first_ps)


def advanced(work: Work, iterations: int) -> Work:
    """The same work so many iterations later: chunks move on by their length, decodes grow by one token each."""
    return Work(
        tuple((tokens, context + iterations * tokens) for tokens, context in work.chunks),
        work.decode_seqs,
        work.decode_context + iterations * work.decode_seqs,
    )


Fixed = Callable[[int], tuple[int, bool]]
"""(picoseconds, extrapolated) by a count that stays the same along a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """What a step on one stage is made of. Each function rises in its count; rows rise in it and in the context.

    ``chunk`` and ``decode`` price attention: of a chunk of so many tokens by the context before it, and of
    so many decoding sequences by the sum of their contexts; ``mixed`` prices the latter in a step that also has
    chunks, where engines run one kernel for both that suits decodes less. ``sequence_ps``: overhead of each sequence.
    ``shared_ps``: what every chunk but a step's first costs less than alone, as all are one kernel with one launch; at
    most what the shortest chunk costs.
    """

    linear: Fixed
    collective: Fixed
    embedding: Fixed
    head: Fixed
    overhead_ps: int
    sequence_ps: int
    chunk: Callable[[int], Row]
    decode: Callable[[int], Row]
    mixed: Callable[[int], Row]
    shared_ps: int = 0


class Composed:
    """A stage's price: the sum of its operators. ``line`` is on the engine's hot path."""

    def __init__(self, operators: Operators, *, measured: bool) -> None:
        self.operators = operators
        self.measured = measured
        self._fixed = lru_cache(CACHE_ENTRIES)(self._price_fixed)
        self._chunk = lru_cache(CACHE_ENTRIES)(operators.chunk)
        self._decode = lru_cache(CACHE_ENTRIES)(operators.decode)
        self._beside_chunks = lru_cache(CACHE_ENTRIES)(operators.mixed)
        self._shared_ps = operators.shared_ps

    def line(self, work: Work) -> Line:
        chunks, seqs, context = work
        if chunks:
            return self._mixed(work)
        if not seqs:
            return Line(0, 0, UNBOUNDED)
        fixed_ps, beyond = self._fixed(seqs, seqs)
        attention = self._decode(seqs).segment(context, seqs)
        return Line(fixed_ps + attention[0], attention[1], attention[2], beyond or attention[3])

    def _mixed(self, work: Work) -> Line:
        chunks, seqs, context = work
        total, sequences = seqs, seqs
        first, slope, iterations, beyond = self._shared_ps, 0, UNBOUNDED, False
        for tokens, before in chunks:
            if tokens:
                total += tokens
                sequences += 1
                value_ps, slope_ps, until, outside = self._chunk(tokens).segment(before, tokens)
                first += value_ps - self._shared_ps
                slope += slope_ps
                iterations = until if until < iterations else iterations
                beyond |= outside
        if not sequences:
            return Line(0, 0, UNBOUNDED)
        if total == seqs:
            first = 0
        if seqs:
            rows = self._decode if total == seqs else self._beside_chunks
            value_ps, slope_ps, until, outside = rows(seqs).segment(context, seqs)
            first += value_ps
            slope += slope_ps
            iterations = until if until < iterations else iterations
            beyond |= outside
        fixed_ps, outside = self._fixed(total, sequences)
        return Line(first + fixed_ps, slope, iterations, beyond or outside)

    def _price_fixed(self, tokens: int, seqs: int) -> tuple[int, bool]:
        operators = self.operators
        prices = [
            operators.linear(tokens),
            operators.collective(tokens),
            operators.embedding(tokens),
            operators.head(seqs),
        ]
        overhead_ps = operators.overhead_ps + seqs * operators.sequence_ps
        return overhead_ps + sum(ps for ps, _ in prices), any(beyond for _, beyond in prices)
