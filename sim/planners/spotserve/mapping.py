"""Which GPU takes which position of the new pipelines, so that most of what it holds is of use (SpotServe, sec. 3.3).

A maximum-weight matching of GPUs and positions; where machines have several GPUs, first inside every pair of a
machine's group and a block of tensor-parallel ranks, then between groups and blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sim.cluster import Cluster
from sim.memory import common_weight_bytes
from sim.model import ModelSpec
from sim.planners.pools import evenly
from sim.planners.spotserve.configure import Configuration
from sim.planners.spotserve.profile import powers
from sim.types import Replica, Stage

T = TypeVar("T")
Shard = tuple[Stage, int]
"""What a GPU holds: a stage and its rank there."""


class Position(NamedTuple):
    pipeline: int
    stage: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is where now. ``kv_tokens``: of unfinished requests, by the name of the replica that holds their KV."""

    held: Mapping[str, Shard] = field(default_factory=dict)
    replica_of: Mapping[str, str] = field(default_factory=dict)
    """By GPU, where one is up."""
    kv_tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, replicas: Collection[Replica], held: Mapping[str, Shard], kv_tokens: Mapping[str, int] | None = None
    ) -> Context:
        owners = {gpu: replica.name for replica in replicas for gpu in replica.gpus}
        return cls(held=held, replica_of=owners, kv_tokens=kv_tokens or {})


def shards(replicas: Collection[Replica]) -> dict[str, Shard]:
    """What GPUs hold when these are up."""
    return {
        gpu: (stage, rank) for replica in replicas for stage in replica.stages for rank, gpu in enumerate(stage.gpus)
    }


def groups(cluster: Cluster, gpus: Collection[str], tp: int) -> list[tuple[str, ...]]:
    """GPUs of a machine that take consecutive ranks: as many as a machine has, by powers of two, but ``tp`` at most.

    What a machine has left over takes no part.
    """
    size = group_size(cluster, tp)
    whole: list[tuple[str, ...]] = []
    for node in cluster.nodes:
        here = [gpu for gpu in node.gpu_ids if gpu in gpus]
        whole += [group for group in chunks(here, size) if len(group) == size]
    return whole


def group_size(cluster: Cluster, tp: int) -> int:
    return min(tp, max(powers(max(node.count for node in cluster.nodes))))


def chunks(items: Sequence[T], size: int) -> list[tuple[T, ...]]:
    return [tuple(items[first : first + size]) for first in range(0, len(items), size)]


def in_order(configuration: Configuration, found: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Groups of GPUs as they come: of each pipeline, the GPUs of each stage."""
    flat = [gpu for group in found for gpu in group][: configuration.gpus]
    return chunks(chunks(flat, configuration.tp), configuration.stages)


def matched(
    model: ModelSpec,
    configuration: Configuration,
    found: Sequence[tuple[str, ...]],
    context: Context,
    inherits: Sequence[str | None],
) -> list[tuple[tuple[str, ...], ...]]:
    """As ``in_order``, but matched. ``inherits``: by pipeline, the replica whose unfinished requests it goes on with.

    A byte is added where a GPU could stay in the pipeline that inherits its own, so that equals do not change places.
    """
    size = len(found[0])
    blocks = list(_blocks(configuration, size))
    worth = Worth(model, configuration, context, inherits)
    inner = [[_match(worth.between(group, block)) for block in blocks] for group in found]
    totals = np.array([[total for total, _ in row] for row in inner])
    _, chosen = _match(totals.T)
    at: dict[Position, str] = {}
    for number, block in enumerate(blocks):
        group = found[chosen[number]]
        _, places = inner[chosen[number]][number]
        at.update({block[place]: gpu for gpu, place in zip(group, places, strict=True)})
    return [
        tuple(tuple(at[Position(d, p, m)] for m in range(configuration.tp)) for p in range(configuration.stages))
        for d in range(configuration.pipelines)
    ]


def _blocks(configuration: Configuration, size: int) -> Iterator[tuple[Position, ...]]:
    for d in range(configuration.pipelines):
        for p in range(configuration.stages):
            yield from chunks([Position(d, p, m) for m in range(configuration.tp)], size)


def _match(weights: NDArray[np.float64]) -> tuple[float, list[int]]:
    """The largest sum, and the column of each row; rows are no more than columns."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(weights, maximize=True)
    return float(weights[rows, columns].sum()), [int(column) for column in columns]


class Worth:
    """Bytes that a GPU would not have to fetch at a position."""

    def __init__(
        self, model: ModelSpec, configuration: Configuration, context: Context, inherits: Sequence[str | None]
    ) -> None:
        self._model = model
        self._context = context
        self._inherits = inherits
        self._stages = pipeline(model, "", [("",) * configuration.tp] * configuration.stages).stages
        self._common: dict[tuple[Shard, int, int], tuple[float, float]] = {}

    def between(self, gpus: Sequence[str], positions: Sequence[Position]) -> NDArray[np.float64]:
        return np.array([[self(gpu, position) for position in positions] for gpu in gpus])

    def __call__(self, gpu: str, position: Position) -> float:
        held = self._context.held.get(gpu)
        if held is None:
            return 0.0
        key = held, position.stage, position.rank
        if key not in self._common:
            new = self._stages[position.stage], position.rank
            self._common[key] = common_weight_bytes(self._model, held, new), common_kv_bytes(self._model, held, new)
        weight_bytes, kv_bytes = self._common[key]
        owner = self._context.replica_of.get(gpu)
        if owner is None or self._inherits[position.pipeline] != owner:
            return weight_bytes
        return weight_bytes + kv_bytes * self._context.kv_tokens.get(owner, 0) + 1


def common_kv_bytes(model: ModelSpec, old: Shard, new: Shard) -> float:
    """Of a token's KV, what a GPU has at both places."""
    (was, old_rank), (will, rank) = old, new
    layers = min(was.end_layer, will.end_layer) - max(was.first_layer, will.first_layer)
    share = min((old_rank + 1) / was.tp, (rank + 1) / will.tp) - max(old_rank / was.tp, rank / will.tp)
    return model.kv_bytes_per_token(layers) * share if layers > 0 and share > 0 else 0.0


def pipeline(model: ModelSpec, name: str, stages: Sequence[tuple[str, ...]]) -> Replica:
    """Layers spread evenly."""
    return evenly(model, name, "mixed", stages)
