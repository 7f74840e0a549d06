"""What happens to the cluster: faults, notices, new plans; and where displaced requests go.

A lost GPU takes its replica down; what that held starts over elsewhere, generated tokens kept. A change of
plan is priced by its difference: a role flip is free, a replica that disappears drains (or is taken down, and what it
decodes may keep its KV: ``keeping.py``), a new one loads its weights once its GPUs are free (``loading.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sim.engine.change.keeping import Keeping
from sim.engine.change.loading import Loading
from sim.engine.clock import Alarm
from sim.engine.replica.job import Job
from sim.engine.replica.state import ReplicaState
from sim.engine.setup import bind_cost, check_plan
from sim.record import NoteRow
from sim.types import (
    Change,
    ClusterEvent,
    ConfigError,
    Later,
    Plan,
    PolicyError,
    Replica,
    Signal,
    SignalKind,
    to_ps,
    to_s,
)

if TYPE_CHECKING:
    from sim.engine.run import Engine

MAX_IDLE_TICKS = 1000
"""A rescheduler that has let so many ticks pass while nothing else could happen will not save the run."""


class Changes:
    """Keeps which GPUs are lost or slow, which replicas load, and which requests have nowhere to go."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self.engine = engine
        self.rescheduler = engine.system.rescheduler()
        self.rng = rng
        self.lost: set[str] = set()
        self.slow: dict[str, float] = {}
        self.loading = Loading(engine, self._come_up)
        self.keeping = Keeping(engine)
        self.idle_ticks = 0
        self.requeue = False  # as the last change of plan wants it
        self.emptied: dict[ReplicaState, None] = {}  # whose queues were, so that they decide anew
        self.joins_to_come = 0
        self.stranded: list[Job] = []

    # ------------------------------------------------------------ signals

    def schedule(self, events: Sequence[ClusterEvent]) -> None:
        """Put the run's cluster events and the rescheduler's ticks on the clock."""
        for event in events:
            self._targets(event)
            self.engine.clock.at(to_ps(event.at_s), self._happen, event)
        self.joins_to_come = sum(event.kind == "gpu_joined" for event in events)
        if self.rescheduler.interval_s is not None:
            self.engine.clock.at(to_ps(self.rescheduler.interval_s), self._tick)

    def _targets(self, event: ClusterEvent) -> tuple[str, ...]:
        cluster = self.engine.problem.cluster
        if event.kind == "link_scaled":
            known: tuple[str, ...] = tuple(cluster.capacity_bytes_per_s)
            if event.target in known:
                return (event.target,)
        else:
            gpus = tuple(gpu for gpu in cluster.gpu_ids if gpu == event.target or gpu.split(".")[0] == event.target)
            if gpus:
                return gpus
            known = cluster.gpu_ids
        raise ConfigError(
            f"events: {event.kind} at {event.at_s} s names {event.target!r}; known are {', '.join(known[:8])} ..."
        )

    def _tick(self, _: Alarm) -> None:
        clock = self.engine.clock
        if self.engine.unfinished:
            assert self.rescheduler.interval_s is not None
            self._react("tick", ())
            self.idle_ticks = self.idle_ticks + 1 if clock.nothing_left() else 0
            if self.idle_ticks < MAX_IDLE_TICKS:
                clock.at(clock.now_ps + to_ps(self.rescheduler.interval_s), self._tick)

    def _happen(self, alarm: Alarm) -> None:
        event: ClusterEvent = alarm.subject
        targets = self._targets(event)
        self.note(event.kind, f"{event.target}" + (f" x {event.factor}" if event.factor is not None else ""))
        if event.kind == "link_scaled":
            self.engine.links.scale(event.target, self._factor(event))
            if self.engine.paths is not None:
                self.engine.paths.links_changed()
        elif event.kind == "gpu_slow":
            self._slow_down(targets, self._factor(event))
        elif event.kind == "gpu_joined":
            self.joins_to_come -= 1
            self.lost.difference_update(targets)
            self._react("joined", targets)
            self._settle_in([])
        elif event.kind == "spot_notice":
            deadline_s = event.deadline_s or 0.0
            self._react("notice", targets, event.at_s + deadline_s)
            gone = ClusterEvent(at_s=event.at_s + deadline_s, kind="gpu_lost", target=event.target)
            self.engine.clock.at(to_ps(gone.at_s), self._happen, gone)
        else:
            self._lose(targets)

    def _factor(self, event: ClusterEvent) -> float:
        if event.factor is None or not event.factor >= 0:
            raise ConfigError(
                f"events: {event.kind} of {event.target} at {event.at_s} s needs a factor >= 0, not {event.factor}"
            )
        return event.factor

    def _react(self, kind: SignalKind, gpus: tuple[str, ...], deadline_s: float | None = None) -> None:
        engine = self.engine
        signal = Signal(kind, to_s(engine.clock.now_ps), gpus, deadline_s)
        for replica in engine.by_leg.values():  # so that all that a rescheduler reads is of now
            replica.settle()
        answer = self.rescheduler.react(signal, engine.view)
        if isinstance(answer, Later):
            engine.clock.at(max(to_ps(answer.at_s), engine.clock.now_ps + 1), self._due)
        elif answer is not None:
            self.apply(answer)

    def _due(self, _: Alarm) -> None:
        if self.engine.unfinished:
            self._react("due", ())

    def note(self, kind: str, text: str) -> None:
        self.engine.rows.notes.append(NoteRow(self.engine.clock.now_ps, kind, text))

    def show(self, plan: Plan) -> None:
        """Tell the policies what is up."""
        up = [self.engine.by_leg[spec.leg] for spec in plan.replicas if spec.leg in self.engine.by_leg]
        self.engine.view.show(plan, [replica for replica in up if not replica.retiring])

    # ------------------------------------------------------------ faults

    def _slow_down(self, gpus: tuple[str, ...], factor: float) -> None:
        self.slow.update(dict.fromkeys(gpus, factor))
        engine = self.engine
        for replica in list(engine.by_leg.values()):
            if set(gpus) & set(replica.gpus):
                replica.settle()
                replica.costs = tuple(
                    bind_cost(engine.cost, engine.problem, stage, self.slow) for stage in replica.spec.stages
                )
                engine.nudge(replica)

    def _lose(self, gpus: tuple[str, ...]) -> None:
        self.lost.update(gpus)
        plan = self.engine.view.plan
        displaced: list[Job] = []
        for replica in list(self.engine.by_leg.values()):
            if set(gpus) & set(replica.gpus):
                displaced += self.take_down(replica)
        self.loading.lose(gpus)
        displaced += self._start_over(self.keeping.lose(gpus) + self._orphans())
        self.show(plan)
        self._react("lost", gpus)
        self._settle_in(displaced)

    def take_down(
        self, replica: ReplicaState, kept: Mapping[int, Replica] | None = None, *, forget: bool = False
    ) -> list[Job]:
        """The replica is gone, and all KV on it but that of decoding requests that are kept, by id, for another.

        Returns the other requests, ready to start over, from their prompts alone if ``forget``.
        """
        engine = self.engine
        engine.end_flights(replica)
        displaced: list[Job] = []
        going_on = 0
        for job in dict.fromkeys(replica.jobs()):
            delivery = engine.moves.under_way.pop(job, None)
            if delivery is not None:
                engine.moves.abandon(delivery, lost=replica)
            if job.cohort is not None:
                job.cohort.leave(job)
            job.blocks = job.copied_blocks = 0
            job.shared = []
            if kept and job.id in kept and (job in replica.running or job in replica.arrived) and job.decodes:
                self.keeping.leave(job, replica, kept[job.id])
                going_on += 1
            else:
                displaced.append(job)
        self._start_over(displaced, forget=forget)
        engine.put_away(replica)
        more = f", {going_on} keep their KV" if going_on else ""
        self.note("down", f"{replica.name}: {len(displaced)} requests start over{more}")
        self.loading.start()
        return displaced

    def target_gone(self, alarm: Alarm) -> None:
        """Prefilled, but the replica that was to decode it is no more."""
        self.reroute(alarm.subject)

    def reroute(self, job: Job) -> None:
        """Its way leads nowhere any more: it starts over on another."""
        self._displace(job)
        self._settle_in([job])

    def _orphans(self) -> list[Job]:
        return self.keeping.orphans([spec.leg for spec in self.loading.specs.values()])

    def _start_over(self, jobs: list[Job], *, forget: bool = False) -> list[Job]:
        for job in jobs:
            self._displace(job, forget=forget)
        return jobs

    def _displace(self, job: Job, *, forget: bool = False) -> None:
        if self.engine.paths is not None:
            self.engine.paths.leave(job)
        self.engine.router.finished(job)
        job.route = None
        job.epoch += 1
        job.start_over(forget=forget)

    @property
    def may_come_up(self) -> bool:
        """A replica is on its way up, or none is there while GPUs are still to join."""
        return bool(self.loading.specs) or (self.joins_to_come > 0 and not self.engine.view.replicas)

    def _settle_in(self, jobs: list[Job]) -> None:
        """Route displaced requests again, and those that wait for a replica; they (still) wait while none is there but
        one may come up, and fail if none can."""
        engine = self.engine
        touched, self.emptied = self.emptied, {}
        jobs, self.stranded = self.stranded + jobs, []
        for job in sorted(jobs, key=lambda job: (job.arrival_ps, job.id)):
            if engine.view.replicas:
                engine.unfinished -= 1
                engine.admit(job, touched)
            elif self.may_come_up:
                self.stranded.append(job)
            else:
                engine.finish(job, "failed", "no replica is up")
        for replica in touched:
            engine.nudge(replica)

    def strand(self) -> int:
        """Nothing is left to happen, but a cut link holds some up: they fail, the others go on. Returns how many."""
        engine = self.engine
        lost = (
            engine.moves.strand() + self.keeping.strand() + (engine.paths.strand() if engine.paths is not None else 0)
        )
        if given_up := self.loading.strand():
            self._settle_in(self._orphans())
        return lost + given_up

    # ------------------------------------------------------------ changes of plan

    def apply(self, change: Change) -> None:
        """Move from the current plan to another."""
        engine = self.engine
        check_plan(change.plan, engine.problem)
        if change.plan.of_nodes(engine.problem.model.num_layers) != (engine.paths is not None):
            raise PolicyError(
                f"{type(self.rescheduler).__name__} changes between nodes that hold a part of the layers and replicas "
                "that hold them all; a run is of the one or of the other"
            )
        self.note("change", change.reason)
        wanted = {spec.leg: spec for spec in change.plan.replicas}
        self.loading.revise(wanted, change)
        kept = self._kept(change, wanted)
        displaced: list[Job] = []
        flipped: list[ReplicaState] = []
        for leg, replica in list(engine.by_leg.items()):
            spec = wanted.get(leg)
            if spec is None or (spec.stages, spec.models) != (replica.spec.stages, replica.spec.models):
                displaced += self._leave(replica, change, kept)
            elif spec.role != replica.role:
                replica.role = spec.role
                replica.batcher = engine.system.batcher(spec.role)
                flipped.append(replica)
        for leg, spec in wanted.items():
            up = engine.by_leg.get(leg)
            if (up is None or up.retiring) and not self.lost & set(spec.gpus):
                self.loading.specs.setdefault(spec.name, spec)
        self.requeue = change.requeue
        displaced += self._start_over(self._orphans()) + self._requeued()
        self.show(change.plan)
        self.loading.start()
        for replica in flipped:
            engine.nudge(replica)
        self._settle_in(displaced)

    def _kept(self, change: Change, wanted: Mapping[tuple[str, ...], Replica]) -> dict[int, Replica]:
        policy = type(self.rescheduler).__name__
        if change.keep and change.drain:
            raise PolicyError(f"{policy} keeps the KV of requests whose replica drains; set drain=False")
        known = {spec.name: spec for spec in wanted.values()}
        for name in change.keep.values():
            if name not in known:
                raise PolicyError(f"{policy} keeps KV for replica {name!r}, which its plan does not have")
        return {number: known[name] for number, name in change.keep.items()}

    def _leave(self, replica: ReplicaState, change: Change, kept: Mapping[int, Replica]) -> list[Job]:
        return self._retire(replica) if change.drain else self.take_down(replica, kept, forget=change.forget)

    def _requeued(self) -> list[Job]:
        """What waits on replicas that stay, where it is to be routed again."""
        displaced: list[Job] = []
        for replica in list(self.engine.by_leg.values()) if self.requeue else ():
            displaced += self._turn_away(replica)
            self.emptied[replica] = None
        return displaced

    def _turn_away(self, replica: ReplicaState) -> list[Job]:
        """Empty the waiting queue."""
        replica.settle()
        displaced = list(replica.waiting)
        for job in displaced:
            replica.forget_prefill(job)
            replica.veil.fresh.pop(job, None)
            self._displace(job)
        replica.waiting.clear()
        return displaced

    def _retire(self, replica: ReplicaState) -> list[Job]:
        displaced = self._turn_away(replica)
        replica.retiring = True
        self.maybe_drained(replica)
        return displaced

    def maybe_drained(self, replica: ReplicaState) -> None:
        if not replica.flights and not any(True for _ in replica.jobs()):
            self.engine.put_away(replica)
            self.note("drained", replica.name)
            for job in self._orphans():  # whose KV was still on its way to it
                self.engine.clock.at(self.engine.clock.now_ps + 1, self.target_gone, job)
            self.loading.start()

    def _come_up(self, spec: Replica) -> None:
        self.engine.bring_up(spec)
        self.note("up", spec.name)
        self.show(self.engine.view.plan)
        self.keeping.is_up(self.engine.by_leg[spec.leg])
        self._settle_in(self._requeued())
