"""Integer time on SimPy: the only module that imports simpy.

Rules that make the collapsed and the step-by-step engine agree on every tie: whatever comes from outside a
replica at instant t (KV delivery, fault) runs at priority ``OUTSIDE``, before any iteration boundary at t; the
arrival of request number n runs at ``ARRIVAL + n``, before these, so that a replay of what arrived breaks ties
alike, whatever had caused the arrivals; boundaries of replica number n run at priority ``BOUNDARY + n``; and what
a boundary causes elsewhere happens one tick later at the earliest.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from heapq import heappush
from typing import Any

import simpy
from simpy.events import Event

ARRIVAL = 1
OUTSIDE = 2**62
BOUNDARY = OUTSIDE + 1


class Alarm(Event):
    """Calls ``call(alarm)`` at an integer time, unless it was cancelled before; ``subject`` is the caller's own."""

    _ok = True  # like simpy.Timeout: triggered from the start, so Event.__init__ has nothing to add
    _value = None

    def __init__(self, call: Callable[[Any], None], subject: Any) -> None:
        self.callbacks = [call]
        self.subject = subject

    def cancel(self) -> None:
        """SimPy has no removal: the alarm stays queued and rings silently."""
        self.callbacks = []
        self.subject = None


class Clock:
    """The simulation's time and its queue of alarms."""

    def __init__(self) -> None:
        self._env = simpy.Environment(initial_time=0)
        self._queue: list[tuple[int, int, int, Event]] = self._env._queue  # type: ignore[assignment]
        self.events = 0

    @property
    def now_ps(self) -> int:
        return self._env._now  # type: ignore[return-value]

    def at(self, at_ps: int, call: Callable[[Alarm], None], subject: Any = None, priority: int = OUTSIDE) -> Alarm:
        alarm = Alarm(call, subject)
        self.events += 1
        # what env.schedule does, with the time itself instead of a delay to be added to now
        heappush(self._queue, (at_ps, priority, self.events, alarm))
        return alarm

    def nothing_else_now(self) -> bool:
        """No other alarm is due at this very instant."""
        return not self._queue or self._queue[0][0] > self._env._now

    @property
    def due_ps(self) -> int | None:
        """When the next alarm is due."""
        return self._queue[0][0] if self._queue else None

    def ring(self) -> None:
        """The next alarm, at its own time."""
        self._env.step()

    def nothing_left(self) -> bool:
        """No alarm is due at any time."""
        return not self._queue

    def run(self, until_ps: int | None = None) -> None:
        """Run until no alarm is left, or up to (and without) ``until_ps``.

        The cyclic garbage collector pauses meanwhile: a run makes millions of long-lived rows and no cycles, and
        looking through them again and again costs a fifth of its time. Afterwards they count as old.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            if until_ps is None:
                self._env.run()
            elif until_ps > self._env._now:
                self._env.run(until=until_ps)
        finally:
            if collecting:
                gc.freeze()
                gc.unfreeze()
                gc.enable()
