"""Requests that keep their KV when a change of plan takes their replica down: it moves to where they decode on.

It leaves at once, and they go on when it has arrived and that replica is up. If a GPU at either end is lost meanwhile,
or there is no room, they start over, as without.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sim.engine.clock import Alarm
from sim.engine.links import Flow, cut_for_good
from sim.engine.replica.job import Job
from sim.engine.replica.state import ReplicaState
from sim.types import Replica, Route

if TYPE_CHECKING:
    from sim.engine.run import Engine


@dataclass(slots=True, eq=False)
class Kept:
    """KV of one request, between replicas. ``flow`` None: it is at its new GPUs."""

    job: Job
    source: ReplicaState
    leg: tuple[str, ...]
    size_bytes: float
    since_ps: int
    flow: Flow | None = None
    came_ps: int = 0


class Keeping:
    """All of them, in the order in which they left."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: dict[Job, Kept] = {}

    @property
    def jobs(self) -> Collection[Job]:
        return self._kept.keys()

    def leave(self, job: Job, source: ReplicaState, target: Replica) -> None:
        """The job's KV sets out from a replica that goes; its blocks there are given up."""
        engine = self._engine
        size_bytes = job.computed_tokens * job.samples * engine.problem.model.kv_bytes_per_token()
        kept = Kept(job, source, target.leg, size_bytes, engine.clock.now_ps)
        self._kept[job] = kept
        path = engine.problem.cluster.path(source.gpus, target.gpus)
        kept.flow = engine.links.start(path, size_bytes, self._came, kept)

    def _came(self, alarm: Alarm) -> None:
        kept: Kept = alarm.subject
        kept.flow, kept.came_ps = None, self._engine.clock.now_ps
        self._land(kept)

    def is_up(self, replica: ReplicaState) -> None:
        """What has come for it may go on."""
        for kept in [kept for kept in self._kept.values() if kept.leg == replica.leg and kept.flow is None]:
            self._land(kept)

    def _land(self, kept: Kept) -> None:
        engine, job = self._engine, kept.job
        target = engine.by_leg.get(kept.leg)
        if target is None:
            return
        del self._kept[job]
        target.settle()
        blocks = job.blocks_for(job.computed_tokens, target.block_size)
        if blocks > target.ledger.free or target.too_long(job, job.input_tokens + job._output_tokens - 1) is not None:
            engine.changes.reroute(job)
            return
        target.ledger.take(blocks)
        job.copied_blocks = job.copies(job.computed_tokens, target.block_size)
        job.blocks = blocks - job.copied_blocks
        job.published = 0
        target.publish(job, job.computed_tokens)
        job.route = Route(target.leg, target.leg)
        job.places = (job.places[0], target.name)
        moved_bytes = round(kept.size_bytes)
        job.transfer_ps += kept.came_ps - kept.since_ps
        job.bytes_moved += moved_bytes
        engine.rows.link_fields.append(
            (job.id, kept.source.name, target.name, moved_bytes, kept.since_ps, kept.came_ps)
        )
        target.land(job)
        engine.nudge(target)

    def lose(self, gpus: Collection[str]) -> list[Job]:
        """Whose KV was still on these GPUs: they are to start over."""
        lost = set(gpus)
        return [self._drop(k) for k in list(self._kept.values()) if k.flow is not None and lost & set(k.source.gpus)]

    def orphans(self, known: Collection[tuple[str, ...]]) -> list[Job]:
        """Whose new replica will never be up: neither is it now, nor is it among these."""
        up = self._engine.by_leg
        return [self._drop(k) for k in list(self._kept.values()) if k.leg not in up and k.leg not in known]

    def strand(self) -> int:
        """Nothing is left to happen: KV on a cut link never arrives. Returns how many requests failed."""
        stuck = [kept for kept in self._kept.values() if kept.flow is not None and kept.flow.stuck]
        for kept in stuck:
            reason = cut_for_good(kept.source.name, "its new replica")
            self._engine.finish(self._drop(kept), "failed", reason)
        return len(stuck)

    def _drop(self, kept: Kept) -> Job:
        if kept.flow is not None:
            self._engine.links.cancel(kept.flow)
        del self._kept[kept.job]
        return kept.job
