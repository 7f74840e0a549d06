"""What a replica's scheduler does not know yet, because it decides one iteration ahead (``Limits.async_scheduling``).

While an iteration runs on the GPU, the next one is decided already (vLLM's batch queue of two). So at a boundary the
batch that starts has been fixed at the boundary before: what came meanwhile is not in it, and who ended meanwhile
still had its seat and its blocks. Only a scheduler that found nothing to do waits for the present.
"""

from __future__ import annotations

from collections.abc import Callable

from sim.engine.replica.job import Job


class Veil:
    """Of one replica. It is down from a boundary to the moment when the batch that starts there is filled."""

    __slots__ = ("down", "ended", "fresh", "used")

    def __init__(self, used: bool) -> None:
        self.used = used
        """Whether the scheduler decides ahead; otherwise the veil never comes down."""
        self.down = False
        self.fresh: dict[Job, None] = {}
        """Came since the last batch was filled."""
        self.ended: list[Job] = []
        """Ended at this boundary; their blocks are not free yet."""

    def hides(self, job: Job) -> bool:
        return self.down and job in self.fresh

    def lift(self, release: Callable[[Job], None], now_ps: int) -> bool:
        """Let the scheduler know all, and let go of who ended; whether there was anything that it did not know."""
        hidden = self.down and bool(self.fresh or self.ended)
        for job in self.fresh:
            if job.queued_ps is None:
                job.queued_ps = now_ps
        self.fresh.clear()
        for job in self.ended:
            release(job)
        self.ended.clear()
        self.down = False
        return hidden
