"""KV on its way from the replica that prefilled to the one that decodes.

A delivery asks for room at its target (one tick after its first part is ready), waits there until blocks are free,
flows part by part over the links, and is usable ``overhead_s`` after the last byte. Until then the source
keeps its blocks: a full target holds its senders back.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, cast

from sim.cluster import Path
from sim.engine.clock import Alarm
from sim.engine.links import cut_for_good
from sim.engine.replica.flight import blocks_to_come
from sim.engine.replica.job import Job
from sim.engine.replica.state import Delivery, Flight, ReplicaState
from sim.types import Move, PolicyError, Reject, to_ps

if TYPE_CHECKING:
    from sim.engine.run import Engine
    from sim.policy import Dispatcher

MAX_IDLE_ASKS = 1000
"""A router that has put off its choice so often while nothing else could happen will never choose."""


class Moves:
    """All deliveries of a run; ``under_way`` has those that have asked for room."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kv_bytes_per_token = engine.problem.model.kv_bytes_per_token()
        self._paths: dict[tuple[int, int], Path] = {}
        self.under_way: dict[Job, Delivery] = {}
        self._idle_asks = 0

    def _path(self, source: ReplicaState, target: ReplicaState) -> Path:
        key = (source.number, target.number)
        if key not in self._paths:
            self._paths[key] = self._engine.problem.cluster.path(source.gpus, target.gpus)
        return self._paths[key]

    def leave_early(self, replica: ReplicaState, flight: Flight, job: Job) -> None:
        """KV of the first layers may leave while the last ones of the final chunk are computed."""
        assert job.route is not None
        if job.tokens_left == 1 or self._engine.transfer.pull or job.route.decode not in self._engine.by_leg:
            return  # it ends with its first token, is fetched, or has nowhere to go (yet)
        delivery = self._delivery(replica, job, job.target_tokens, flight.start_ps, flight.boundary_ps(1))
        if delivery.parts[0][1] < flight.boundary_ps(1):
            replica.departing[job] = None
            self._engine.clock.at(delivery.parts[0][1] + 1, self._ask_for_room, delivery)

    def leave(self, replica: ReplicaState, job: Job) -> None:
        """The prompt's KV is complete: send it, unless its first layers are under way already."""
        if job in replica.departing:
            return
        assert job.route is not None
        now_ps = self._engine.clock.now_ps
        if job.route.decode is None:
            replica.departing[job] = None
            self._engine.clock.at(now_ps + 1, self._dispatch, (replica, job, job.epoch))
            return
        if job.route.decode not in self._engine.by_leg:
            self._engine.clock.at(now_ps + 1, self._engine.changes.target_gone, job)
            replica.release(job)
            return
        replica.departing[job] = None
        delivery = self._delivery(replica, job, job.computed_tokens, now_ps, now_ps)
        ask_ps = now_ps + 1
        if self._engine.transfer.pull:
            ask_ps += to_ps(delivery.path.latency_s)
        self._engine.clock.at(ask_ps, self._ask_for_room, delivery)

    def _dispatch(self, alarm: Alarm) -> None:
        """Its router says where the request decodes, or when to ask again."""
        replica, job, epoch = alarm.subject
        if epoch != job.epoch:
            return
        assert job.route is not None
        clock, last = self._engine.clock, job.input_tokens + job._output_tokens - 1
        answer = cast("Dispatcher", self._engine.router).dispatch(job, self._engine.view.of(job, last))
        if isinstance(answer, Reject):
            self._give_up(replica, job, answer.reason)
            return
        if isinstance(answer, tuple):
            target = self._engine.resolve(answer, job)
            job.route = job.route._replace(decode=answer)
            job.places = (replica.name, target.name)
            del replica.departing[job]
            if target is replica:
                replica.land(job)
                self._engine.nudge(replica)
            else:
                self._set_out(replica, job, target)
            return
        if answer <= 0:
            raise PolicyError(f"{type(self._engine.router).__name__} asks to be asked again about {job} in {answer} s")
        self._idle_asks = self._idle_asks + 1 if clock.nothing_left() else 0
        if self._idle_asks < MAX_IDLE_ASKS:
            clock.at(clock.now_ps + to_ps(answer), self._dispatch, (replica, job, epoch))

    def _set_out(self, replica: ReplicaState, job: Job, target: ReplicaState) -> None:
        reason = target.too_long(job, job.input_tokens + job._output_tokens - 1)
        if reason is None:
            self.leave(replica, job)
        else:
            self._give_up(replica, job, reason)

    def _give_up(self, replica: ReplicaState, job: Job, reason: str) -> None:
        replica.departing.pop(job, None)
        replica.release(job)
        self._engine.clock.at(self._engine.clock.now_ps + 1, self.room_again, replica)
        self._engine.finish(job, "failed", reason)
        if replica.retiring:
            self._engine.changes.maybe_drained(replica)

    def _delivery(self, replica: ReplicaState, job: Job, tokens: int, start_ps: int, end_ps: int) -> Delivery:
        assert job.route is not None
        assert job.route.decode is not None
        target = self._engine.by_leg[job.route.decode]
        kv_bytes = tokens * self._kv_bytes_per_token
        move = Move(job.id, tokens, kv_bytes, self._engine.problem.model.num_layers, replica.name, target.name)
        parts = deque(
            [
                (share * kv_bytes, start_ps + round(ready * (end_ps - start_ps)))
                for share, ready in self._engine.transfer.chunks(move, self._engine.view)
            ]
        )
        if parts[-1][1] != end_ps or sum([size for size, _ in parts]) > kv_bytes * (1 + 1e-9):
            policy = type(self._engine.transfer).__name__
            raise PolicyError(
                f"{policy} sends {job} in parts {parts}; the last must be ready at the end, their shares add up to <= 1"
            )
        path = self._path(replica, target)
        blocks = job.blocks_for(tokens, target.ledger.block_size)
        return Delivery(job, job.epoch, move, replica, target, path, blocks, parts)

    def _ask_for_room(self, alarm: Alarm) -> None:
        delivery: Delivery = alarm.subject
        if delivery.epoch == delivery.job.epoch:
            self.under_way[delivery.job] = delivery
            delivery.target.inbox.append(delivery)
            self.make_room(delivery.target)

    def let_in(self, alarm: Alarm) -> None:
        """Blocks may have come free at a replica's own boundary."""
        replica: ReplicaState = alarm.subject
        if self._engine.by_leg.get(replica.leg) is replica:
            self.make_room(replica)

    def make_room(self, target: ReplicaState) -> None:
        """Let KV in that waits, first come first served, while blocks are free."""
        target.settle()
        while target.inbox and self._may_enter(target.inbox[0]):
            delivery = target.inbox.popleft()
            delivery.let_in()
            target.arriving[delivery.job] = None
            delivery.started_ps = self._engine.clock.now_ps
            self._send(delivery)
        if target.inbox and target.only_holds:
            self._break_circle(target)
        for flight in target.flights:  # it may have counted on blocks that are gone now
            if blocks_to_come(target, flight) > target.ledger.free:
                self._engine.cut(target, flight)

    def _may_enter(self, delivery: Delivery) -> bool:
        target, room = delivery.target, delivery.room
        if room > target.ledger.free:
            return False
        lets_in = getattr(target.batcher, "lets_in", None)  # a Gatekeeper's
        return lets_in is None or target.only_holds or bool(lets_in(delivery.job, room, target))

    def _break_circle(self, target: ReplicaState) -> None:
        """Replicas that hold nothing but KV waiting for room at each other would wait forever.

        The delivery that asked last among them gives up: its KV is dropped and computed again at its target.
        """
        stuck = {replica for replica in self._engine.by_leg.values() if replica.only_holds and replica.inbox}
        waiting = [d for d in self.under_way.values() if d.started_ps is None]
        holding = {d.job: d for d in waiting}
        while free := {s for s in stuck if not all(j in holding and holding[j].target in stuck for j in s.departing)}:
            stuck -= free
        if target not in stuck:
            return
        last = [delivery for delivery in waiting if delivery.source in stuck][-1]
        del self.under_way[last.job]
        last.target.inbox.remove(last)
        last.job.epoch += 1
        del last.source.departing[last.job]
        last.source.release(last.job)
        last.job.start_over()
        last.target.enqueue(last.job)
        last.job.preemptions += 1
        for replica in (last.source, last.target):
            self._engine.clock.at(self._engine.clock.now_ps + 1, self.room_again, replica)

    def _send_later(self, alarm: Alarm) -> None:
        self._send(alarm.subject)

    def _send(self, delivery: Delivery) -> None:
        """The next part, one tick after it is ready at the earliest."""
        if delivery.epoch != delivery.job.epoch:
            return
        size_bytes, ready_ps = delivery.parts[0]
        if ready_ps >= self._engine.clock.now_ps:
            self._engine.clock.at(ready_ps + 1, self._send_later, delivery)
            return
        delivery.parts.popleft()
        delivery.sent_bytes += size_bytes
        delivery.flow = self._engine.links.start(delivery.path, size_bytes, self._sent, delivery)

    def _sent(self, alarm: Alarm) -> None:
        delivery: Delivery = alarm.subject
        delivery.flow = None
        if delivery.parts:
            self._send(delivery)
            return
        overhead_ps = to_ps(self._engine.transfer.overhead_s(delivery.move))
        if overhead_ps:
            self._engine.clock.at(self._engine.clock.now_ps + overhead_ps, self._delivered, delivery)
        else:
            self._delivered(alarm)

    def _delivered(self, alarm: Alarm) -> None:
        """The KV is usable at its target; its source forgets it, and the job queues to decode."""
        delivery: Delivery = alarm.subject
        job, source, target = delivery.job, delivery.source, delivery.target
        if delivery.epoch != job.epoch:
            return
        now_ps = self._engine.clock.now_ps
        assert delivery.started_ps is not None
        del self.under_way[job]
        job.transfer_ps += now_ps - job.kv_ready_ps
        job.bytes_moved += round(delivery.sent_bytes)
        self._engine.rows.link_fields.append(
            (job.id, source.name, target.name, round(delivery.sent_bytes), delivery.started_ps, now_ps)
        )
        del source.departing[job]
        source.release(job)
        del target.arriving[job]
        delivery.hand_over()
        if source.inbox:
            self.make_room(source)
        if source.waiting or source.swapped or source.paused:
            self._engine.nudge(source)
        if source.retiring:
            self._engine.changes.maybe_drained(source)
        self._engine.nudge(target)

    def strand(self) -> int:
        """Nothing is left to happen: KV on a cut link never arrives. Returns how many requests failed."""
        stuck = [delivery for delivery in self.under_way.values() if delivery.flow is not None and delivery.flow.stuck]
        for delivery in stuck:
            del self.under_way[delivery.job]
            delivery.job.epoch += 1
            self.abandon(delivery, None)
            self._engine.finish(delivery.job, "failed", cut_for_good(delivery.source.name, delivery.target.name))
            for replica in (delivery.source, delivery.target):
                if replica.retiring:
                    self._engine.changes.maybe_drained(replica)
        return len(stuck)

    def abandon(self, delivery: Delivery, lost: ReplicaState | None) -> None:
        """One end of a KV move is lost (None: the way between them): stop it, and free the blocks at the other end."""
        if delivery.flow is not None:
            self._engine.links.cancel(delivery.flow)
        source, target, job = delivery.source, delivery.target, delivery.job
        if target is not lost:
            target.settle()
            if job in target.arriving:
                del target.arriving[job]
                target.ledger.give(delivery.blocks - len(delivery.known), delivery.known)
            else:
                target.inbox.remove(delivery)
            self._engine.clock.at(self._engine.clock.now_ps + 1, self.room_again, target)
        if source is not lost:
            source.settle()
            source.departing.pop(job, None)
            source.release(job)
            self._engine.clock.at(self._engine.clock.now_ps + 1, self.room_again, source)

    def room_again(self, alarm: Alarm) -> None:
        """Blocks came free from outside."""
        replica: ReplicaState = alarm.subject
        if self._engine.by_leg.get(replica.leg) is replica:
            self.make_room(replica)
            self._engine.nudge(replica)
