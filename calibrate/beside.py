"""What a step takes beside its operators: the rest of measured whole steps, added to the tables that it grows with.

Between operators an engine allocates, cuts and joins tensors, calls its decode kernel once for each group of similar
contexts, and runs its own code. The rest is fitted as a constant of each layer, more for each token and decoding
sequence in it, and a constant of each step, none of them below zero: where the parts alone, their data cold in the
cache, take longer than the step they make up, nothing is taken from them, and the error of ``step`` says by how much.
(A constant of each chunk was tried, and was 0 on a quiet CPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from calibrate.bench.family import Point
from calibrate.bench.shapes import Shard
from calibrate.compose import Keyed, composed, interpolated, rounded, values
from sim.cost import Grid, ProfileEntry, Table

STEP = "step"
"""The operator that samples call whole steps by."""
AXES = ("tokens", "sequences", "context", "layers")


class Beside(NamedTuple):
    """Seconds of each layer; in each layer of each token and each decoding sequence; of each step.

    ``ratio``: measured steps over the sum of their operators, the median.
    """

    layer_s: float = 0.0
    token_s: float = 0.0
    sequence_s: float = 0.0
    step_s: float = 0.0
    ratio: float = 1.0

    def added(self, entry: ProfileEntry) -> ProfileEntry:
        """The entry with all of it in its tables, where the simulator sums it up."""
        decodes, mixed = entry.attention_decode, entry.attention_mixed
        return replace(
            entry,
            linear=_raised(entry.linear, entry.num_layers * self.layer_s, entry.num_layers * self.token_s),
            head=entry.head and _raised(entry.head, self.step_s, 0.0),
            attention_decode=decodes and _raised_grid(decodes, self.sequence_s),
            attention_mixed=mixed and _raised_grid(mixed, self.sequence_s),
        )

    def __str__(self) -> str:
        us = [f"{value * 1e6:.3g} us" for value in self[:-1]]
        return (
            f"{us[0]} of each layer, in it {us[1]} of each token and {us[2]} of each decoding sequence, "
            f"{us[3]} of each step"
        )


def fitted(shard: Shard, mine: Keyed) -> Beside | None:
    """Non-negative least squares on shares of the measured steps; None without steps of different numbers of layers."""
    from scipy.optimize import nnls

    found = values(mine[STEP]) if STEP in mine else {}
    if len({layers for *_, layers in found}) < 2:
        return None
    price = _prices(shard, mine, Beside())
    measured = np.array(list(found.values()))
    sums = np.array([price(dict(zip(AXES, point, strict=True))) for point in found])
    weights = 1 / measured[:, None]
    rest, _ = nnls(_columns(list(found)) * weights, (measured - sums) / measured)
    return Beside(*map(float, rest))._replace(ratio=float(np.median(measured / sums)))


def step_s(shard: Shard, mine: Keyed, found: Beside, point: Point) -> float:
    """Seconds of a whole step on one GPU, as operators and what is beside them make it up."""
    return _prices(shard, mine, found)(point)


def _columns(points: Sequence[tuple[int, ...]]) -> np.ndarray:
    """How often each term of ``Beside`` is in each step."""
    tokens, sequences, _, layers = np.transpose(points)
    ones = np.ones_like(layers)
    return np.transpose([layers, layers * (tokens + sequences), layers * sequences, ones])


def _prices(shard: Shard, mine: Keyed, found: Beside) -> Callable[[Point], float]:
    """Seconds by point; the head's are those of the decoder, which samples from the shard's part of the vocabulary."""
    head = {"head": 1.0, "sampler": shard.vocabulary / shard.spec.vocab_size}

    @cache
    def entry(layers: int) -> ProfileEntry:
        spec = replace(shard.spec, num_layers=layers)
        return found.added(composed(spec, "", shard.tp, mine, head))

    return lambda point: _sum_s(entry(point["layers"]), point["tokens"], point["sequences"], point["context"])


def _sum_s(entry: ProfileEntry, tokens: int, sequences: int, context: int) -> float:
    """As the simulator composes a step of a first chunk (or none) and decodes of this mean context."""
    chunks, decodes = entry.attention_prefill, entry.attention_decode
    assert entry.head is not None
    assert chunks is not None
    assert decodes is not None
    attention_s = interpolated(entry.attention_mixed or decodes if tokens else decodes, sequences, context)
    if tokens:
        attention_s += interpolated(chunks, tokens, 0)
    head_s = _at(entry.head, sequences + (tokens > 0))
    return _at(entry.linear, tokens + sequences) + head_s + entry.num_layers * attention_s


def _at(table: Table, count: int) -> float:
    return float(np.interp(count, table.counts, table.seconds))


def _raised(table: Table, constant_s: float, count_s: float) -> Table:
    """The table, more by a constant and by so much of each count."""
    pairs = zip(table.counts, table.seconds, strict=True)
    return replace(table, seconds=tuple(rounded(value + constant_s + count * count_s) for count, value in pairs))


def _raised_grid(grid: Grid, count_s: float) -> Grid:
    pairs = zip(grid.counts, grid.seconds, strict=True)
    return replace(
        grid, seconds=tuple(tuple(rounded(value + count * count_s) for value in row) for count, row in pairs)
    )
