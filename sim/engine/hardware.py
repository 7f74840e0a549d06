"""What may take the place of the modelled machines: real ones.

The engine then decides as ever, by its cost model and its ledgers, but how long an iteration or a KV move takes is
found out by doing it. ``calibrate.execute.wall`` has such hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sim.cluster import Path
from sim.engine.clock import Alarm, Clock
from sim.engine.links import Flow
from sim.engine.replica.state import Flight, ReplicaState


class Hardware(Protocol):
    """Machines that compute, and links between them. ``clock`` shows real time while it runs."""

    @property
    def clock(self) -> Clock: ...

    def compute(self, replica: ReplicaState, flight: Flight, done: Callable[[Alarm], None]) -> None:
        """Start the one iteration of a flight; when it has ended, write its true durations into it, and ring ``done``
        with ``(replica, flight)`` at the replica's boundary priority."""

    def start(self, path: Path, size_bytes: float, done: Callable[[Alarm], None], subject: Any = None) -> Flow:
        """As ``Links.start``: carry the KV of the delivery ``subject``."""

    def cancel(self, flow: Flow) -> None: ...

    def scale(self, resource: str, factor: float) -> None: ...
