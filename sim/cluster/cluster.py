"""The cluster: which resources a flow between GPUs crosses, and what they carry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.cluster.catalogue import Gpu, did_you_mean
from sim.cluster.node import Link, Node, read_links, read_nodes
from sim.types import ConfigError

NVLINK_SHARE, NVLINK_LATENCY_S = 0.8, 8e-6
"""Of the nominal rate, and until the first byte: NCCL's send and receive reach 0.78 and 0.81 after 7 and 9 us on two
machines with H100 (APEX+, Vidur), 0.76 to 0.95 at 64 MiB on two with A100 (Vidur). Both fitted."""
PCIE_SHARE, PCIE_LATENCY_S = 0.8, 5e-6
"""The same: rings of four cards reach 0.76 (H100, A100; Vidur) and 0.81 (RTX 4090 with peer access, user's figure in
tinygrad/open-gpu-kernel-modules#36), gathers of two begin after 5 to 6 us (L40S, RTX PRO 6000; aiconfigurator). Cards
that pass through the processor's memory reach 0.13 to 0.26 (A40, Vidur; V100, APEX+). ``Cluster.intra_node`` overrides
the figures of peers."""


class Path(NamedTuple):
    """What a flow crosses: (resource, fraction of the flow's bytes), and the one-way latency."""

    usage: tuple[tuple[str, float], ...]
    latency_s: float

    def bytes_per_s(self, capacity_bytes_per_s: Mapping[str, float]) -> float:
        """Bandwidth of the flow when it is alone; infinite if it crosses nothing."""
        return min((capacity_bytes_per_s[name] / share for name, share in self.usage), default=inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines and the links between them.

    ``inter_node``: the network port of each machine, each way, shared by all its traffic; 0: no machine of a region
    has a link to another, even with a port of its own.
    ``inter_region``: the line of each ordered pair of regions. ``pairs``: dedicated lines from one node
    to another (ordered: give both directions). The latency is that of the pair, else of the regions, else
    of ``inter_node``. ``intra_node``: the peer link of every GPU, in place of its NVLink or PCIe.
    """

    nodes: tuple[Node, ...]
    inter_node: Link | None = None
    inter_region: Link | None = None
    intra_node: Link | None = None
    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict, hash=False)
    _node_of: dict[str, Node] = field(init=False, repr=False, compare=False)
    _capacity: dict[str, float] = field(init=False, repr=False, compare=False)
    _paths: dict[tuple[tuple[str, ...], tuple[str, ...]], Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names:
            raise ConfigError("cluster.nodes: [] must have at least one node")
        for name, times in Counter(names).items():
            if times > 1:
                raise ConfigError(f"cluster.nodes: the name {name!r} occurs {times} times; names must differ")
        for pair in self.pairs:
            for name in pair:
                if name not in names:
                    raise ConfigError(f"cluster.links.pairs: node {did_you_mean(name, names)}")
            if pair[0] == pair[1]:
                raise ConfigError(f"cluster.links.pairs: {pair[0]} > {pair[1]} must join two nodes; see intra_node")
        object.__setattr__(self, "_node_of", {gpu_id: node for node in self.nodes for gpu_id in node.gpu_ids})
        object.__setattr__(self, "_capacity", _capacities(self))
        object.__setattr__(self, "_paths", {})

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], links: Mapping[str, Any] | None = None) -> Cluster:
        """The cluster of a scenario file (gbps = 1e9 bits/s); ``ConfigError`` names field, value and mend.

        ``nodes``: {gpu, count, nodes, region, name, nic_gbps, usd_per_hour, usd_per_hour_spot}; ``links``:
        {inter_node, inter_region, intra_node: {gbps, latency_us}, pairs: [{a, b, gbps, latency_us}]}.
        """
        return cls(nodes=read_nodes(nodes), **read_links(links or {}))

    @property
    def gpu_ids(self) -> tuple[str, ...]:
        return tuple(self._node_of)

    @property
    def capacity_bytes_per_s(self) -> Mapping[str, float]:
        """Every resource and its bandwidth."""
        return self._capacity

    def node(self, gpu_id: str) -> Node:
        if gpu_id not in self._node_of:
            raise ConfigError(f"GPU {did_you_mean(gpu_id, self._node_of)}")
        return self._node_of[gpu_id]

    def gpu(self, gpu_id: str) -> Gpu:
        return self.node(gpu_id).gpu

    def peer_link(self, node: Node) -> Link:
        """What joins the GPUs of a machine, per GPU."""
        if self.intra_node is not None:
            return self.intra_node
        if node.gpu.nvlink_bytes_per_s is not None:
            rate = node.gpu.nvlink_bytes_per_s * NVLINK_SHARE
            return Link(bytes_per_s=rate, latency_s=NVLINK_LATENCY_S, medium="nvlink")
        return Link(bytes_per_s=node.gpu.pcie_bytes_per_s * PCIE_SHARE, latency_s=PCIE_LATENCY_S, medium="pcie")

    def path(self, source_gpus: tuple[str, ...], target_gpus: tuple[str, ...]) -> Path:
        """How a flow from one group of GPUs to another spreads.

        Each group holds the data in equal contiguous parts, in the order given, and a GPU sends to those
        whose part overlaps its own: n to n is pairwise, 2 to 4 is one to two. What stays on a GPU crosses
        nothing. ``ConfigError`` if two GPUs that must talk have no link.
        """
        found = self._paths.get((source_gpus, target_gpus))
        if found is None:
            found = self._paths[source_gpus, target_gpus] = _spread(self, source_gpus, target_gpus)
        return found

    def load_path(self, gpus: tuple[str, ...]) -> Path:
        """From host memory to a group of GPUs at once, an equal part to each."""
        for gpu_id in gpus:
            self.node(gpu_id)
        return Path(tuple((f"pcie:{gpu_id}:in", 1 / len(gpus)) for gpu_id in gpus), PCIE_LATENCY_S)

    def collective_link(self, gpus: tuple[str, ...]) -> Link:
        """The slowest link of a group's ring, for ``collective_seconds``; a group of one costs nothing.

        A ring leaves a machine once, however many of its GPUs take part, so it has that port to itself.
        """
        members = Counter(self.node(gpu_id).name for gpu_id in gpus)
        links = [self.peer_link(node) for node in self.nodes if members[node.name] > 1]
        for a, b in permutations((node for node in self.nodes if node.name in members), 2):
            hop = _hop(self, a.gpu_ids[0], b.gpu_ids[0])
            rate = min(self._capacity[name] for name in hop.resources)
            links.append(Link(bytes_per_s=rate, latency_s=hop.latency_s))
        slowest = min(links, key=lambda link: link.bytes_per_s, default=Link(bytes_per_s=inf))
        return replace(slowest, latency_s=max((link.latency_s for link in links), default=0.0))

    def bandwidth_matrix_bytes_per_s(self) -> NDArray[np.float64]:
        """GPU to GPU, uncontended, rows send, in the order of ``gpu_ids``; itself infinite, no link 0."""
        return self._matrix(lambda path: path.bytes_per_s(self._capacity), itself=inf, unlinked=0.0)

    def latency_matrix_s(self) -> NDArray[np.float64]:
        """GPU to GPU, one way, in the order of ``gpu_ids``; itself 0, no link infinite."""
        return self._matrix(lambda path: path.latency_s, itself=0.0, unlinked=inf)

    def usd_per_hour(self, spot: bool = False) -> float | None:
        """Rent of all GPUs; None if the price of any is unknown."""
        total = 0.0
        for node in self.nodes:
            price = node.gpu.usd_per_hour_spot if spot else node.gpu.usd_per_hour
            if price is None:
                return None
            total += node.count * price
        return total

    def _matrix(self, value: Callable[[Path], float], itself: float, unlinked: float) -> NDArray[np.float64]:
        """The GPUs of a machine are alike, so one pair of each two machines tells all."""

        def between(a: Node, b: Node) -> float:
            try:
                return value(self.path(a.gpu_ids[:1], b.gpu_ids[-1:]))
            except ConfigError:
                return unlinked

        counts = [node.count for node in self.nodes]
        blocks = np.array([[between(a, b) for b in self.nodes] for a in self.nodes], dtype=np.float64)
        matrix = blocks.repeat(counts, axis=0).repeat(counts, axis=1)
        np.fill_diagonal(matrix, itself)
        return matrix


# ---------------------------------------------------------------- resources of a hop


class _Hop(NamedTuple):
    resources: tuple[str, ...]
    latency_s: float


def _capacities(cluster: Cluster) -> dict[str, float]:
    capacity: dict[str, float] = {}
    for node in cluster.nodes:
        peer = cluster.peer_link(node).bytes_per_s
        for gpu_id in node.gpu_ids:
            for way in ("out", "in"):
                capacity[f"gpu:{gpu_id}:{way}"] = peer
                capacity[f"pcie:{gpu_id}:{way}"] = node.gpu.pcie_bytes_per_s * PCIE_SHARE
        nic = node.nic_bytes_per_s
        if nic is None and cluster.inter_node is not None:
            nic = cluster.inter_node.bytes_per_s
        if nic is not None:
            capacity[f"nic:{node.name}:out"] = capacity[f"nic:{node.name}:in"] = nic
    if cluster.inter_region is not None:
        for a, b in permutations(dict.fromkeys(node.region for node in cluster.nodes), 2):
            capacity[f"region:{a}>{b}"] = cluster.inter_region.bytes_per_s
    for (source, target), link in cluster.pairs.items():
        capacity[f"pair:{source}>{target}"] = link.bytes_per_s
    return capacity


def _spread(cluster: Cluster, sources: tuple[str, ...], targets: tuple[str, ...]) -> Path:
    """Parts are counted in units of 1/(sources * targets), so that fractions come out exact."""
    if not sources or not targets:
        raise ConfigError(f"path from {sources} to {targets}: a group of GPUs must not be empty")
    units: dict[str, int] = defaultdict(int)
    latency_s = 0.0
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            begin = max(i * len(targets), j * len(sources))
            overlap = min((i + 1) * len(targets), (j + 1) * len(sources)) - begin
            if overlap <= 0 or source == target:
                continue
            hop = _hop(cluster, source, target)
            latency_s = max(latency_s, hop.latency_s)
            for name in hop.resources:
                units[name] += overlap
    whole = len(sources) * len(targets)
    return Path(tuple((name, share / whole) for name, share in units.items()), latency_s)


def _hop(cluster: Cluster, source: str, target: str) -> _Hop:
    """From one GPU to another. Between machines the network cards reach the GPUs over PCIe."""
    a, b = cluster.node(source), cluster.node(target)
    if a is b:
        peer = cluster.peer_link(a)
        ports: tuple[str, ...] = (f"gpu:{source}:out", f"gpu:{target}:in")
        if cluster.intra_node is None and a.gpu.nvlink_bytes_per_s is None:
            ports += (f"pcie:{source}:out", f"pcie:{target}:in")
        return _linked(cluster, a, b, _Hop(ports, peer.latency_s), "intra_node")
    nics = [name for name in (f"nic:{a.name}:out", f"nic:{b.name}:in") if name in cluster.capacity_bytes_per_s]
    line, link, setting = _line(cluster, a, b)
    if link is None:
        raise ConfigError(f"cluster.links.{setting}: missing, so {a.name} and {b.name} have no link; set its gbps")
    ports = (f"pcie:{source}:out", *nics, *line, f"pcie:{target}:in")
    hop = _linked(cluster, a, b, _Hop(ports, link.latency_s), setting)
    if link.bytes_per_s == 0:  # and yet each machine has a port of its own
        raise ConfigError(f"cluster.links.{setting}: 0 gbps, so {a.name} and {b.name} have no link; set its gbps")
    return hop


def _line(cluster: Cluster, a: Node, b: Node) -> tuple[tuple[str, ...], Link | None, str]:
    """What lies between two machines' ports: its resources, its link, and the setting it comes from."""
    pair = cluster.pairs.get((a.name, b.name))
    if pair is not None:
        return (f"pair:{a.name}>{b.name}",), pair, "pairs"
    if a.region != b.region:
        return (f"region:{a.region}>{b.region}",), cluster.inter_region, "inter_region"
    return (), cluster.inter_node, "inter_node"


def _linked(cluster: Cluster, a: Node, b: Node, hop: _Hop, setting: str) -> _Hop:
    for name in hop.resources:
        if cluster.capacity_bytes_per_s[name] == 0:
            place = f"nodes: nic_gbps or cluster.links.{setting}" if name.startswith("nic:") else f"links.{setting}"
            raise ConfigError(
                f"cluster.{place}: {name} has 0 gbps, so {a.name} and {b.name} have no link; set its gbps"
            )
    return hop
