"""Machines and links, and how a scenario file writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

from sim.cluster.catalogue import Gpu, count, did_you_mean, gpu, gpus, number
from sim.types import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Bandwidth of one direction and one-way latency. 0 bytes/s: no connection.

    What transfers achieve, not a port's nominal rate. ``medium``: what the catalogue's links between the GPUs of a
    machine are made of; None: stated by whoever made it.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    medium: Literal["nvlink", "pcie"] | None = None

    def __post_init__(self) -> None:
        if self.bytes_per_s != inf:
            number("link: bytes_per_s", self.bytes_per_s)
        number("link: latency_s", self.latency_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of ``count`` equal GPUs. ``nic_bytes_per_s``: each way; None: the cluster's inter_node."""

    name: str
    gpu: Gpu
    count: int
    region: str = "default"
    nic_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("region", self.region)):
            if not isinstance(text, str) or not text or set(text) & set(".:> \t\n"):
                raise ConfigError(f"node {self.name!r}: {what}: {text!r} must be text without '.', ':', '>' or space")
        count(f"node {self.name!r}: count", self.count)
        if self.nic_bytes_per_s is not None:
            number(f"node {self.name!r}: nic_bytes_per_s", self.nic_bytes_per_s)

    @property
    def gpu_ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.g{index}" for index in range(self.count))


# ---------------------------------------------------------------- the scenario file's form

_NODE_KEYS = ("gpu", "count", "nodes", "region", "name", "nic_gbps", "usd_per_hour", "usd_per_hour_spot")
_LINKS = ("inter_node", "inter_region", "intra_node")


def read_nodes(rows: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    """``cluster.nodes``: rows of equal machines. Those without a name are n0, n1, ... by position."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ConfigError(f"cluster.nodes: {rows!r} must be a list of nodes")
    nodes: list[Node] = []
    for index, row in enumerate(rows):
        place = f"cluster.nodes[{index}]"
        _check_keys(place, row, required=("gpu", "count"), known=_NODE_KEYS)
        copies = count(f"{place}.nodes", row.get("nodes", 1))
        for copy in range(copies):
            name = row.get("name", f"n{len(nodes)}")
            numbered = f"{name}{copy}" if "name" in row and copies > 1 else name
            nodes.append(_read_node(place, numbered, row))
    return tuple(nodes)


def read_links(links: Mapping[str, Any]) -> dict[str, Any]:
    """``cluster.links``: the link fields of a ``Cluster``."""
    _check_keys("cluster.links", links, known=(*_LINKS, "pairs"))
    fields: dict[str, Any] = {
        name: _read_link(f"cluster.links.{name}", links[name]) for name in _LINKS if links.get(name) is not None
    }
    fields["pairs"] = {}
    for index, row in enumerate(links.get("pairs") or ()):
        place = f"cluster.links.pairs[{index}]"
        _check_keys(place, row, required=("a", "b", "gbps"), known=("a", "b", "gbps", "latency_us"))
        fields["pairs"][str(row["a"]), str(row["b"])] = _read_link(place, {k: row[k] for k in row if k not in "ab"})
    return fields


def _read_node(place: str, name: str, row: Mapping[str, Any]) -> Node:
    nic_gbps = row.get("nic_gbps")
    return Node(
        name=name,
        gpu=_read_gpu(place, row),
        count=count(f"{place}.count", row["count"]),
        region=row.get("region", "default"),
        nic_bytes_per_s=None if nic_gbps is None else number(f"{place}.nic_gbps", nic_gbps) * 1e9 / 8,
    )


def _read_gpu(place: str, row: Mapping[str, Any]) -> Gpu:
    """A catalogue name, or a ``Gpu`` where the caller is Python; the row's own prices go first."""
    kind = row["gpu"]
    names = [entry.name for entry in gpus()]
    if not isinstance(kind, Gpu):
        if str(kind).lower() not in (name.lower() for name in names):
            raise ConfigError(f"{place}.gpu: {did_you_mean(kind, names)}")
        kind = gpu(kind)
    prices = {key: row[key] for key in ("usd_per_hour", "usd_per_hour_spot") if row.get(key) is not None}
    for key, value in prices.items():
        number(f"{place}.{key}", value)
    return replace(kind, **prices, price_source="given") if prices else kind


def _read_link(place: str, row: Mapping[str, Any]) -> Link:
    _check_keys(place, row, required=("gbps",), known=("gbps", "latency_us"))
    return Link(
        bytes_per_s=number(f"{place}.gbps", row["gbps"]) * 1e9 / 8,
        latency_s=number(f"{place}.latency_us", row.get("latency_us", 0)) / 1e6,
    )


def _check_keys(place: str, row: object, *, known: Sequence[str], required: Sequence[str] = ()) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place}: {row!r} must be a mapping with the keys {', '.join(known)}")
    for key in row:
        if key not in known:
            raise ConfigError(f"{place}: {did_you_mean(key, known)}")
    for key in required:
        if row.get(key) is None:
            raise ConfigError(f"{place}.{key}: missing; it is required")
