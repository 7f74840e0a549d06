"""What is fetched from where when pipelines change, in which order of layers, and how long it takes.

Source: SpotServe, section 3.4 (algorithm 2). KV goes first; layers follow in an order that keeps buffers of machines
under a limit; a stage may start as soon as all of its layers are there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

from sim.cluster import Cluster, Path
from sim.memory import common_weight_bytes
from sim.model import ModelSpec
from sim.planners.spotserve.mapping import Shard, shards
from sim.types import Load, Replica, Stage

OVERHEAD_S = 0.5
"""Of a change beside the bytes, in the artifact."""
BUFFER_SHARE = 0.1
"""Of a machine's memory, what may be held beyond what was; ours, as the paper does not say."""


class Fetch(NamedTuple):
    """A part of a layer that a GPU lacks, and who gives it; None: its host."""

    layer: int
    source: str | None
    gpu: str
    size_bytes: float


@dataclass(frozen=True)
class Migration:
    """All fetches of a change. ``freed``: bytes of each layer that a machine's GPUs hold and need no more.

    ``disk_bytes_per_s``: from which each machine reads what no GPU gives; None: its host's memory. ``kv``: bytes from
    one replica's GPUs to another's.
    """

    cluster: Cluster
    replicas: tuple[Replica, ...]
    fetches: tuple[Fetch, ...]
    freed: Mapping[int, Mapping[str, float]]
    kv: tuple[tuple[tuple[str, ...], tuple[str, ...], float], ...] = ()
    disk_bytes_per_s: float | None = None

    @property
    def moved_bytes(self) -> float:
        return sum(fetch.size_bytes for fetch in self.fetches)

    def loads(self) -> dict[str, tuple[Load, ...]]:
        """By replica, as the engine wants them. The engine knows of no disks: bytes that come from one are multiplied
        by how much slower it is than the link to the host, while all GPUs of the machine read."""
        owner = {gpu: replica.name for replica in self.replicas for gpu in replica.gpus}
        total: dict[str, Counter[tuple[str | None, str]]] = {replica.name: Counter() for replica in self.replicas}
        for _, source, gpu, size_bytes in self.fetches:
            slower = self._disk_slower(gpu) if source is None else 1.0
            total[owner[gpu]][source, gpu] += size_bytes * slower  # type: ignore[assignment]
        return {
            name: tuple(Load(gpu=gpu, source=source, size_bytes=size) for (source, gpu), size in found.items())
            for name, found in total.items()
        }

    def _disk_slower(self, gpu: str) -> float:
        if self.disk_bytes_per_s is None:
            return 1.0
        share_bytes_per_s = self.disk_bytes_per_s / self.cluster.node(gpu).count
        return max(1.0, self._host(gpu).bytes_per_s(self.cluster.capacity_bytes_per_s) / share_bytes_per_s)

    def _host(self, gpu: str) -> Path:
        return self.cluster.load_path((gpu,))

    # ------------------------------------------------------------ buffers

    @cached_property
    def by_layer(self) -> dict[int, list[Fetch]]:
        """All layers that move or are freed somewhere."""
        layers = sorted({fetch.layer for fetch in self.fetches} | set(self.freed))
        found: dict[int, list[Fetch]] = {layer: [] for layer in layers}
        for fetch in self.fetches:
            found[fetch.layer].append(fetch)
        return found

    def _change(self, layer: int) -> Counter[str]:
        """Bytes by which what each machine holds grows when the layer has moved."""
        change: Counter[str] = Counter()
        for fetch in self.by_layer[layer]:
            change[self.cluster.node(fetch.gpu).name] += fetch.size_bytes  # type: ignore[assignment]
        change.subtract(self.freed.get(layer, {}))
        return change

    def _use(self) -> Counter[str]:
        """Of each machine's buffer at first: below zero by what it will hold more in the end, which has room anyway."""
        total: Counter[str] = Counter()
        for layer in self.by_layer:
            total.update(self._change(layer))
        return Counter({name: min(0.0, -more) for name, more in total.items()})

    def order(self, most_bytes: float) -> list[int]:
        """First, in order, the layers that leave every machine's buffer within ``most_bytes``; then the others, next
        always the one that leaves the fullest buffer emptiest."""
        use = self._use()
        moved: list[int] = []
        postponed: list[int] = []
        for layer in self.by_layer:
            after = _sum(use, self._change(layer))
            if max(after.values(), default=0.0) <= most_bytes:
                use = after
                moved.append(layer)
            else:
                postponed.append(layer)
        while postponed:
            best = min(postponed, key=lambda layer: max(_sum(use, self._change(layer)).values()))
            use = _sum(use, self._change(best))
            postponed.remove(best)
            moved.append(best)
        return moved

    def peak_bytes(self, order: Sequence[int]) -> float:
        """The most that any machine ever holds beyond what it held before and holds in the end."""
        use = self._use()
        peak = 0.0
        for layer in order:
            use = _sum(use, self._change(layer))
            peak = max(peak, *use.values())
        return peak

    # ------------------------------------------------------------ time

    def ready_s(self, order: Sequence[int]) -> dict[str, float]:
        """By stage, when all its layers, and all KV, are there. Each port carries one flow at a time, in that order;
        a stage that lacks nothing waits for KV only."""
        free: dict[str, float] = defaultdict(float)
        kv_s = max((self._carry(self.cluster.path(old, new), size, free) for old, new, size in self.kv), default=0.0)
        ready = {stage.name: kv_s for replica in self.replicas for stage in replica.stages}
        stage_of = {gpu: stage.name for replica in self.replicas for stage in replica.stages for gpu in stage.gpus}
        for layer in order:
            for _, source, gpu, size in self.by_layer[layer]:
                slower = self._disk_slower(gpu) if source is None else 1.0
                end_s = self._carry(self._way(source, gpu), size * slower, free)
                ready[stage_of[gpu]] = max(ready[stage_of[gpu]], end_s)
        return ready

    def seconds(self) -> float:
        """Until everything is there: what the port that carries most takes, and the overhead."""
        busy: dict[str, float] = defaultdict(float)
        capacity = self.cluster.capacity_bytes_per_s
        for path, size_bytes in self._flows():
            for name, share in path.usage:
                busy[name] += size_bytes * share / capacity[name]
        return OVERHEAD_S + max(busy.values(), default=0.0)

    def _flows(self) -> Iterator[tuple[Path, float]]:
        yield from ((self.cluster.path(old, new), size) for old, new, size in self.kv)
        for _, source, gpu, size in self.fetches:
            yield self._way(source, gpu), size * (self._disk_slower(gpu) if source is None else 1.0)

    def _way(self, source: str | None, gpu: str) -> Path:
        return self._host(gpu) if source is None else self.cluster.path((source,), (gpu,))

    def _carry(self, path: Path, size_bytes: float, free: dict[str, float]) -> float:
        """When a flow ends that begins once all it crosses is free."""
        if not path.usage or size_bytes <= 0:
            return 0.0
        start_s = max(free[name] for name, _ in path.usage)
        capacity = self.cluster.capacity_bytes_per_s
        for name, share in path.usage:
            free[name] = start_s + size_bytes * share / capacity[name]
        return start_s + size_bytes / path.bytes_per_s(capacity) + path.latency_s


def _sum(one: Counter[str], other: Counter[str]) -> Counter[str]:
    total = one.copy()
    total.update(other)
    return total


# ---------------------------------------------------------------- who gives what


def migration(
    cluster: Cluster,
    model: ModelSpec,
    replicas: Iterable[Replica],
    held: Mapping[str, Shard],
    *,
    kv: Iterable[tuple[tuple[str, ...], tuple[str, ...], float]] = (),
    disk_bytes_per_s: float | None = None,
) -> Migration:
    """To replicas that are new, from what GPUs hold. Who lacks something gets it from a GPU of its own machine that
    holds it, else from the machine that has given least so far, else from its host."""
    new = tuple(replicas)
    wanted = shards(new)
    needs = Needs(cluster, model, held)
    fetches = [fetch for gpu, shard in wanted.items() for fetch in needs.of(gpu, shard)]
    freed: dict[int, Counter[str]] = defaultdict(Counter)
    for gpu, shard in wanted.items():
        if gpu in held:
            for layer, size in _freed(model, held[gpu], shard):
                freed[layer][cluster.node(gpu).name] += size  # type: ignore[assignment]
    return Migration(cluster, new, tuple(fetches), freed, tuple(kv), disk_bytes_per_s)


def one_layer(shard: Shard, layer: int) -> Shard:
    stage, rank = shard
    return Stage(name=stage.name, gpus=stage.gpus, first_layer=layer, end_layer=layer + 1), rank


def _freed(model: ModelSpec, old: Shard, new: Shard) -> Iterable[tuple[int, float]]:
    stage, _ = old
    for layer in range(stage.first_layer, stage.end_layer):
        whole = model.weight_bytes(layer, layer + 1, stage.tp) / stage.tp
        yield layer, max(0.0, whole - common_weight_bytes(model, one_layer(old, layer), new))


class Needs:
    """Who gives a GPU the parts of layers that it lacks."""

    def __init__(self, cluster: Cluster, model: ModelSpec, held: Mapping[str, Shard]) -> None:
        self._cluster = cluster
        self._model = model
        self._held = held
        self._node = {gpu: node.name for node in cluster.nodes for gpu in node.gpu_ids}
        self._given: Counter[str] = Counter()
        """Bytes that each machine sends to others."""
        self._holders = cache(self._find_holders)

    def of(self, gpu: str, shard: Shard) -> list[Fetch]:
        stage, rank = shard
        fetches: Counter[tuple[int, str | None]] = Counter()
        for layer in range(stage.first_layer, stage.end_layer):
            layer_bytes = self._model.weight_bytes(layer, layer + 1, stage.tp)
            for begin, end in self._lacking(gpu, layer, rank / stage.tp, (rank + 1) / stage.tp):
                source = self._giver(gpu, layer, begin, end, layer_bytes * (end - begin))
                fetches[layer, source] += layer_bytes * (end - begin)  # type: ignore[assignment]
        return [Fetch(layer, source, gpu, size) for (layer, source), size in fetches.items()]

    def _lacking(self, gpu: str, layer: int, begin: float, end: float) -> list[tuple[float, float]]:
        """Intervals of the layer that are not here, cut where those of holders begin and end."""
        cuts = {begin, end}
        for stage, rank in self._holders(layer).values():
            cuts.update(edge for edge in (rank / stage.tp, (rank + 1) / stage.tp) if begin < edge < end)
        edges = sorted(cuts)
        return [(low, high) for low, high in pairwise(edges) if not self._has(gpu, layer, low, high)]

    def _find_holders(self, layer: int) -> Mapping[str, Shard]:
        return {gpu: shard for gpu, shard in self._held.items() if shard[0].first_layer <= layer < shard[0].end_layer}

    def _has(self, gpu: str, layer: int, begin: float, end: float) -> bool:
        if gpu not in self._held:
            return False
        stage, rank = self._held[gpu]
        inside = rank / stage.tp <= begin and end <= (rank + 1) / stage.tp
        return inside and stage.first_layer <= layer < stage.end_layer

    def _giver(self, gpu: str, layer: int, begin: float, end: float, size_bytes: float) -> str | None:
        able = [other for other in self._holders(layer) if self._has(other, layer, begin, end)]
        if not able:
            return None
        near = [other for other in able if self._node[other] == self._node[gpu]]
        source = near[0] if near else min(able, key=lambda other: self._given[self._node[other]])
        if not near:
            self._given[self._node[source]] += size_bytes  # type: ignore[assignment]
        return source
