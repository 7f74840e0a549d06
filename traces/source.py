"""``TraceSource``: a recorded or generated stream as the simulator's source of requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sim.types import Request


@dataclass(frozen=True, slots=True)
class TraceSource:
    """An open loop: requests arrive when the trace says, whatever becomes of the earlier ones.

    Fits ``sim.policy.Source``. The stream is read as the simulation asks for it.
    """

    requests: Iterable[Request]

    def next(self, now_s: float, finished: Request | None) -> Iterable[Request]:
        """The stream at the start; a completion causes nothing new."""
        del now_s
        return self.requests if finished is None else ()
