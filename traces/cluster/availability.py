"""Which instances of a cloud there are, and when: from a list of machines added and removed to events and dollars.

A file has a line for each change, as in SpotServe's artifact (``elastic-switch/trace``): ``[milliseconds, "add" |
"remove" | "DONE", {"nodes": [numbers]}]``. Machine number k is the k-th node of the cluster. Machines added are ready
then, machines removed gone then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sim.cluster import Cluster
from sim.types import ClusterEvent, ConfigError

GRACE_S = 30.0
"""From the notice to the loss (SpotServe, section 2; the artifact's ``grace_period``)."""
OPERATIONS = ("add", "remove", "end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Machines that come or go; ``end``: the trace is over, all that are left go."""

    at_s: float
    op: Literal["add", "remove", "end"]
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Turns in order of time, the last one of them the end. ``ConfigError`` if a machine comes twice or goes unseen."""

    turns: tuple[Turn, ...]
    source: str = "availability"

    def __post_init__(self) -> None:
        times = [turn.at_s for turn in self.turns]
        if not self.turns or times != sorted(times) or [turn.op for turn in self.turns].count("end") != 1:
            raise ConfigError(f"{self.source}: turns must be in order of time and have one end")
        if self.turns[-1].op != "end" or times[0] < 0:
            raise ConfigError(f"{self.source}: the first turn must be at 0 s or later, the last one the end")
        there: set[int] = set()
        for turn in self.turns[:-1]:
            wrong = there & set(turn.nodes) if turn.op == "add" else set(turn.nodes) - there
            if wrong:
                what = "already there" if turn.op == "add" else "not there"
                raise ConfigError(f"{self.source}: {turn.op} at {turn.at_s} s names machine {min(wrong)}, {what}")
            there ^= set(turn.nodes)

    @property
    def at_start(self) -> int:
        """Machines at 0 s. ``ConfigError`` unless they are the first ones."""
        first = {node for turn in self.turns if turn.at_s == 0 and turn.op == "add" for node in turn.nodes}
        if first != set(range(len(first))):
            raise ConfigError(f"{self.source}: machines at 0 s must be numbered from 0 on, not {sorted(first)}")
        return len(first)

    @property
    def end_s(self) -> float:
        return self.turns[-1].at_s

    def events(self, cluster: Cluster, grace_s: float = GRACE_S) -> tuple[ClusterEvent, ...]:
        """What happens to a cluster of which the first ``at_start`` machines are there."""
        found: list[ClusterEvent] = []
        for turn in self.turns:
            for number in turn.nodes if turn.at_s > 0 else ():
                name = self._name(cluster, number)
                if turn.op == "add":
                    found.append(ClusterEvent(at_s=turn.at_s, kind="gpu_joined", target=name))
                else:
                    at_s = max(0.0, turn.at_s - grace_s)
                    left_s = turn.at_s - at_s
                    found.append(ClusterEvent(at_s=at_s, kind="spot_notice", target=name, deadline_s=left_s))
        return tuple(sorted(found, key=lambda event: event.at_s))

    def _name(self, cluster: Cluster, number: int) -> str:
        if not 0 <= number < len(cluster.nodes):
            raise ConfigError(f"{self.source}: machine {number}; the cluster has {len(cluster.nodes)}")
        return cluster.nodes[number].name

    def rented_s(self, boot_s: float = 0.0) -> dict[int, float]:
        """Seconds of rent by machine. Those that come after the start are paid for ``boot_s`` before they are ready."""
        since: dict[int, float] = {}
        total: dict[int, float] = {}
        for turn in self.turns:
            if turn.op == "add":
                since.update(dict.fromkeys(turn.nodes, turn.at_s - (boot_s if turn.at_s > 0 else 0.0)))
            for node in turn.nodes if turn.op == "remove" else list(since) if turn.op == "end" else ():
                total[node] = total.get(node, 0.0) + turn.at_s - since.pop(node)
        return total

    def rent_usd(self, cluster: Cluster, on_demand: Iterable[int] = (), boot_s: float = 0.0) -> float:
        """By the prices of the cluster's GPUs; spot, but for the machines that are ``on_demand``."""
        regular = set(on_demand)
        total = 0.0
        for number, seconds in self.rented_s(boot_s).items():
            node = cluster.nodes[number]
            price = node.gpu.usd_per_hour if number in regular else node.gpu.usd_per_hour_spot
            if price is None:
                raise ConfigError(f"cluster.nodes: {node.gpu.name} has no price; give usd_per_hour and _spot")
            total += node.count * price * seconds / 3600
        return total


def availability(rows: Sequence[Mapping[str, Any]], source: str = "availability") -> Availability:
    """Of mappings with ``t_s``, ``op`` and ``nodes``."""
    turns = []
    for number, row in enumerate(rows):
        if row.get("op") not in OPERATIONS or not isinstance(row.get("t_s"), int | float):
            raise ConfigError(f"{source}[{number}]: {dict(row)}; needs t_s in seconds and op: {', '.join(OPERATIONS)}")
        turns.append(Turn(at_s=float(row["t_s"]), op=row["op"], nodes=tuple(row.get("nodes", ()))))
    return Availability(turns=tuple(turns), source=source)


def read_availability(path: str | Path) -> Availability:
    """A file in the artifact's form; lines that begin with # are left out."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            at_ms, op, more = json.loads(line)
            rows.append({"t_s": at_ms / 1000, "op": "end" if op == "DONE" else op, "nodes": more.get("nodes", ())})
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f'{path}:{number}: {line!r}; expected [milliseconds, "add", {{"nodes": [0]}}]') from None
    return availability(rows, str(path))
