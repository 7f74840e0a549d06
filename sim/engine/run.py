"""The life of a request: it arrives, is routed, waits, is prefilled, moves, decodes and completes.

``simulate`` is the engine's one entrance. The class below reads in the order in which things happen to a
request; faults and changes of plan are in ``changes.py``. A replica acts on its own at iteration boundaries
only, and what it causes elsewhere (its KV leaving, room for KV that waits) happens one tick later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import inf, nextafter
from operator import itemgetter

import numpy as np

from sim.engine.change.changes import Changes
from sim.engine.clock import ARRIVAL, BOUNDARY, Alarm, Clock
from sim.engine.hardware import Hardware
from sim.engine.links import Links
from sim.engine.log import log_flight, log_replica, request_row
from sim.engine.moves import Moves
from sim.engine.node import Node
from sim.engine.paths import Paths
from sim.engine.replica.batch import Draft
from sim.engine.replica.flight import extend, launch, reoccupy_stages
from sim.engine.replica.job import Job, block_hashes
from sim.engine.replica.state import Flight, ReplicaState
from sim.engine.setup import build_replica, check_plan
from sim.engine.view import SystemView
from sim.policy import Predictor, Problem, Source, System
from sim.record import NoteRow, Recorder, Result
from sim.types import (
    ClusterEvent,
    Outcome,
    Plan,
    PolicyError,
    Reject,
    Replica,
    Request,
    SimulationError,
    StalledError,
    to_ps,
    to_s,
)


def simulate(
    problem: Problem,
    system: System,
    source: Source,
    *,
    plan: Plan | None = None,
    events: Sequence[ClusterEvent] = (),
    predictor: Predictor | None = None,
    step_by_step: bool = False,
    until_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    hardware: Hardware | None = None,
) -> Result:
    """Replay the source's requests on the problem's cluster under a system.

    ``plan`` replaces the one the system's planner would make, ``predictor`` the system's own (else the mean of the
    problem's workload). ``step_by_step`` runs every iteration as its own
    event: slower, and by law equal in every time. ``until_s`` cuts the run off; ``progress`` gets the number
    of finished requests every thousand. ``hardware`` computes and carries for real, step by step. Raises
    ``ConfigError`` for input that cannot be simulated, ``PolicyError`` for an illegal proposal, ``StalledError`` if
    requests are left and nothing can happen.
    """
    problem = replace(problem, limits=system.limits, model=system.model(problem.model))
    plan = plan if plan is not None else system.planner.plan(problem)
    check_plan(plan, problem)
    engine = Engine(problem, system, plan, predictor or system.predictor, step_by_step, progress, hardware)
    started_s = time.perf_counter()
    engine.run(source, events, None if until_s is None else to_ps(until_s))
    result = engine.result(time.perf_counter() - started_s)
    vars(engine).clear()  # it and its parts refer to each other: free them now, not at some garbage collection
    return result


class Engine:
    """One run. ``changes`` handles what happens to the cluster, everything else is below."""

    def __init__(
        self,
        problem: Problem,
        system: System,
        plan: Plan,
        predictor: Predictor | None,
        step_by_step: bool,
        progress: Callable[[int], None] | None,
        hardware: Hardware | None = None,
    ) -> None:
        self.problem = problem
        self.system = system
        self.predictor = predictor
        self.step_by_step = step_by_step or hardware is not None
        self.hardware = hardware
        self.progress = progress
        self.clock = Clock() if hardware is None else hardware.clock
        self.links = hardware or Links(self.clock, problem.cluster)
        self.rows = Recorder(notes=[NoteRow(0, "remark", text) for text in system.remarks(problem.model)])
        self.cost = system.cost(problem.cost)
        router_rng, change_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(problem.seed).spawn(2))
        self.view = SystemView(problem, plan, self.clock, router_rng)
        self.router = system.router()
        self.transfer = system.transfer()
        self.moves = Moves(self)
        self.paths = Paths(self) if plan.of_nodes(problem.model.num_layers) else None
        self.by_leg: dict[tuple[str, ...], ReplicaState] = {}
        self.unfinished = 0
        self.finished = 0
        self.numbers = 0
        self.iterations = 0
        self.iterations_outside = 0
        self.longest_tokens, self.longest_by = min(
            (problem.model.max_position_embeddings or inf, "the model's context of"),
            (system.limits.max_model_len or inf, "system.engine.max_model_len,"),
            key=itemgetter(0),
        )
        self.mean_output_tokens = max(1, round(problem.workload.mean_output_tokens))
        self.changes = Changes(self, change_rng)
        self.observes = self.changes.rescheduler.interval_s is not None
        for spec in plan.replicas:
            self.bring_up(spec)
        self.changes.show(plan)

    def run(self, source: Source, events: Sequence[ClusterEvent], until_ps: int | None) -> None:
        self.source = source
        self.changes.schedule(events)
        stream = iter(source.next(0.0, None))
        self._await_arrival(self._next_job(stream), stream)
        self.clock.run(until_ps)
        while until_ps is None and self.unfinished and self.hardware is None and self.changes.strand():
            self.clock.run()
        if until_ps is not None:
            self._cut_off()
        elif self.unfinished:
            states = "; ".join(repr(replica) for replica in self.by_leg.values()) or "no replica is up"
            raise StalledError(f"{self.unfinished} requests are unfinished and nothing is left to happen: {states}")
        for replica in self.by_leg.values():
            if not any(True for _ in replica.jobs()) and replica.ledger.used:
                raise SimulationError(f"the KV ledger of {replica} is not empty at the end")

    # ------------------------------------------------------------ arrive

    def _next_job(self, stream: Iterator[Request]) -> Job | None:
        request = next(stream, None)
        return None if request is None else self._job(request)

    def _await_arrival(self, job: Job | None, stream: Iterator[Request]) -> None:
        if job is not None:
            self.unfinished += 1
            self.clock.at(job.arrival_ps, self._arrive, (job, stream), ARRIVAL + job.id)

    def _arrive(self, alarm: Alarm) -> None:
        """This request; the next one of the stream will follow, maybe at the same instant."""
        job, stream = alarm.subject
        touched: dict[ReplicaState, None] = {}
        self.unfinished -= 1
        self.admit(job, touched)
        following = self._next_job(stream)
        if following is not None and following.arrival_ps < self.clock.now_ps:
            raise SimulationError(f"{following} arrives before the one ahead of it in the stream")
        self._await_arrival(following, stream)
        for replica in touched:
            self.nudge(replica)

    def _job(self, request: Request) -> Job:
        predicted = self.predictor.predict(request) if self.predictor is not None else self.mean_output_tokens
        return Job(request, predicted)

    def admit(self, job: Job, touched: dict[ReplicaState, None]) -> None:
        """Route a job that arrives (or lost its place) and put it into its prefill replica's queue."""
        self.unfinished += 1
        if self.observes and not job.epoch:
            self.view.arrivals.append(self.clock.now_ps)
        if self.system.limits.prefix_caching and not job.hashes:
            job.hashes = block_hashes(job.request, self.system.limits.block_size)
        view = self.view if self.paths is not None else self.view.of(job, job.input_tokens + job._output_tokens - 1)
        route = self.router.route(job, view)
        if isinstance(route, Reject):
            if self.changes.may_come_up:
                self.changes.stranded.append(job)
                return
            self.finish(job, "failed" if job.epoch else "rejected", route.reason)
            return
        if self.paths is not None:
            self.paths.enter(job, route)
            return
        prefill = self.resolve(route.prefill, job)
        decode = None if route.decode is None else self.resolve(route.decode, job)
        job.route = route
        reason = self._never_fits(job, prefill, decode)
        if reason is not None:
            self.finish(job, "rejected", reason)
            return
        job.places = (prefill.name, "" if decode is None else decode.name)
        prefill.enqueue(job)
        touched[prefill] = None

    def resolve(self, leg: tuple[str, ...], job: Job) -> ReplicaState:
        if leg not in self.by_leg:
            raise PolicyError(
                f"{type(self.router).__name__} routes {job} over {leg}, which is not the stages of a "
                f"replica that is up ({', '.join(replica.name for replica in self.view.replicas)})"
            )
        return self.by_leg[leg]

    def _never_fits(self, job: Job, prefill: ReplicaState, decode: ReplicaState | None) -> str | None:
        total = job.input_tokens + job._output_tokens
        over = self.over_context(total)
        if over is not None:
            return over
        if prefill is not decode:
            reason = prefill.too_long(job, job.input_tokens)
            if reason is not None:
                return reason
        if decode is None:
            decode = max(self.by_leg.values(), key=lambda replica: replica.ledger.total)
        return decode.too_long(job, total - 1)

    def over_context(self, tokens: int) -> str | None:
        if tokens <= self.longest_tokens:
            return None
        return f"{tokens} tokens exceed {self.longest_by} {self.longest_tokens:.0f}"

    # ------------------------------------------------------------ wait, and be batched

    def nudge(self, replica: ReplicaState) -> None:
        """Something came from outside: let the replica decide anew as soon as it can.

        That is now if a lane is free (after all that comes at this instant), else at the next boundary.
        """
        replica.settle()
        for flight in replica.flights:
            self.cut(replica, flight)
            if flight.done and 1 == len(replica.flights) < replica.lanes:
                reoccupy_stages(replica, flight)
        if len(replica.flights) >= replica.lanes or replica.kick is not None:
            return
        if self.clock.nothing_else_now():
            self._dispatch(replica, self.clock.now_ps)
        else:
            replica.kick = self.clock.at(self.clock.now_ps, self._kicked, replica, BOUNDARY + replica.number)

    def _kicked(self, alarm: Alarm) -> None:
        replica: ReplicaState = alarm.subject
        replica.kick = None
        self._dispatch(replica, self.clock.now_ps)

    def cut(self, replica: ReplicaState, flight: Flight) -> None:
        """End a collapsed (and settled) flight with the iteration under way."""
        if flight.iterations > flight.done + 1:
            flight.iterations = flight.done + 1
            self._arm(replica, flight)

    def _arm(self, replica: ReplicaState, flight: Flight) -> None:
        if self.hardware is not None:
            self.hardware.compute(replica, flight, self._boundary)
            return
        if flight.alarm is not None:
            flight.alarm.cancel()
        end_ps = flight.boundary_ps(flight.iterations)
        flight.alarm = self.clock.at(end_ps, self._boundary, (replica, flight), BOUNDARY + replica.number)

    def _dispatch(self, replica: ReplicaState, now_ps: int) -> None:
        """Let the replica go on, and look whether KV that waits for room here may come in."""
        if isinstance(replica, Node):
            assert self.paths is not None
            self.paths.start(replica, now_ps)
            return
        self._fill_lanes(replica, now_ps)
        if replica.inbox and (replica.inbox[0].room <= replica.ledger.free or replica.only_holds):
            self.clock.at(now_ps + 1, self.moves.let_in, replica)

    def _fill_lanes(self, replica: ReplicaState, now_ps: int) -> None:
        """Fill free lanes with batches; a batch alone in flight may repeat itself."""
        veil = replica.veil
        if not (replica.waiting or replica.running or replica.arrived or replica.swapped):
            veil.lift(replica.release, now_ps)
            return
        launched: list[Flight] = []
        swapped_blocks = 0
        while len(replica.flights) < replica.lanes:
            draft = Draft(replica, now_ps)
            draft.swap_blocks, swapped_blocks = swapped_blocks, 0
            here = len(replica.running) + len(replica.arrived)
            replica.batcher.fill(draft)
            if draft.empty:
                # whoever was preempted made room for others, and nothing else would bring the batcher back
                if veil.lift(replica.release, now_ps) or len(replica.running) + len(replica.arrived) < here:
                    swapped_blocks = draft.swap_blocks
                    continue
                break
            flight, outside = launch(replica, draft, now_ps, self._swap_ps(replica, draft) if draft.swap_blocks else 0)
            self.iterations_outside += outside
            launched.append(flight)
            total, free = replica.ledger.total, replica.ledger.free
            waiting = len(replica.waiting) + len(replica.arrived)
            self.rows.memory_fields.append((replica.name, now_ps, total - free, total, waiting, len(replica.running)))
        more_is_known = veil.lift(replica.release, now_ps)
        if not (self.step_by_step or more_is_known) and len(launched) == 1 == len(replica.flights):
            extend(replica, launched[0])
        for flight in launched:
            self._arm(replica, flight)
            for job, tokens in flight.chunks:
                if job.remaining_tokens == tokens and job.moves_on(replica.leg):
                    self.moves.leave_early(replica, flight, job)

    def _swap_ps(self, replica: ReplicaState, draft: Draft) -> int:
        tokens = draft.swap_blocks * replica.block_size
        path = self.problem.cluster.load_path(replica.gpus)
        kv_bytes = tokens * self.problem.model.kv_bytes_per_token()
        return to_ps(path.latency_s + kv_bytes / path.bytes_per_s(self.problem.cluster.capacity_bytes_per_s))

    # ------------------------------------------------------------ be computed

    def _boundary(self, alarm: Alarm) -> None:
        """A flight's last iteration ends."""
        replica, flight = alarm.subject
        flight.alarm = None
        now_ps = self.clock.now_ps
        replica.progress(flight, flight.iterations, started=False)
        self.iterations += log_flight(self.rows, replica, flight, now_ps)
        replica.flights.remove(flight)
        replica.veil.down = replica.veil.used
        cohort = flight.cohort
        if cohort is not None:
            for job in cohort.pop_finished():
                del replica.running[job]
                self._complete(replica, job, now_ps)
            self._return_cohort(replica, flight)
        for job, _ in flight.chunks:
            job.in_flight = False
            if not job.remaining_tokens:
                self._emit_first(replica, job, now_ps)
        self._dispatch(replica, now_ps)
        if replica.retiring:
            self.changes.maybe_drained(replica)

    def _return_cohort(self, replica: ReplicaState, flight: Flight) -> None:
        """The flight's decodes are free for the next batch, together with others that are."""
        cohort, idle = flight.cohort, replica.idle
        if idle is None or not idle.size:
            replica.idle = cohort
        elif cohort is not None and cohort.size:
            small, large = (cohort, idle) if cohort.size < idle.size else (idle, cohort)
            large.absorb(small)
            replica.idle = large

    def _emit_first(self, replica: ReplicaState, job: Job, now_ps: int) -> None:
        """The prompt is computed (again): a token comes out, and the job decodes here or moves on."""
        del replica.prefilling[job]
        job.tokens.append(now_ps)
        job.generated_tokens += 1
        job.kv_ready_ps = now_ps
        if job.first_token_ps is None:
            job.first_token_ps = now_ps
            job.prefill_end_ps = now_ps
        if job.tokens_left == 0:
            del replica.running[job]
            self._complete(replica, job, now_ps)
        elif job.moves_on(replica.leg):
            del replica.running[job]
            self.moves.leave(replica, job)
        else:
            replica.join(job)

    def _complete(self, replica: ReplicaState, job: Job, now_ps: int) -> None:
        if replica.veil.down:
            replica.veil.ended.append(job)
        else:
            replica.release(job)
        self.finish(job, "completed", "", now_ps)

    # ------------------------------------------------------------ end

    def finish(self, job: Job, outcome: Outcome, reason: str, now_ps: int | None = None) -> None:
        self.unfinished -= 1
        self.finished += 1
        if job.route is not None:
            self.router.finished(job)
        self.rows.requests.append(request_row(job, outcome, reason, now_ps))
        if self.observes and now_ps is not None:
            self.view.completions.append((now_ps, (job.input_tokens, job.generated_tokens)))
        if self.progress is not None and self.finished % 1000 == 0:
            self.progress(self.finished)
        following = list(self.source.next(to_s(self.clock.now_ps), job.request))
        for request in following:
            later = self._job(replace(request, arrival_s=after(self.clock.now_ps, request.arrival_s)))
            self._await_arrival(later, iter(()))

    def _cut_off(self) -> None:
        """Record what is still running when the simulated time is over."""
        left: dict[Job, None] = dict.fromkeys([*self.changes.stranded, *self.changes.keeping.jobs])
        for replica in list(self.by_leg.values()):
            self.end_flights(replica)
            left.update(dict.fromkeys(replica.jobs()))
        for job in left:
            if job.cohort is not None:
                job.cohort.leave(job)
            self.unfinished -= 1
            self.rows.requests.append(request_row(job, "running", "cut off", None))

    # ------------------------------------------------------------ replicas come and go

    def bring_up(self, spec: Replica) -> None:
        batcher = self.system.batcher(spec.role)
        self.by_leg[spec.leg] = build_replica(
            self.numbers, spec, self.problem, self.system.limits, self.cost, batcher, self.changes.slow, self.clock,
            of_nodes=self.paths is not None,
        )  # fmt: skip
        self.changes.loading.holds(spec)
        self.numbers += 1

    def put_away(self, replica: ReplicaState) -> None:
        """The replica is no more; keep what it measured."""
        del self.by_leg[replica.leg]
        if replica.kick is not None:
            replica.kick.cancel()
        log_replica(self.rows, self.problem.cluster, replica, to_s(self.clock.now_ps))

    def end_flights(self, replica: ReplicaState) -> None:
        """Stop what is in flight: iterations that ended count, the one under way is lost."""
        replica.settle()
        for flight in replica.flights:
            if flight.alarm is not None:
                flight.alarm.cancel()
            if flight.done:
                flight.iterations = flight.done
                self.iterations += log_flight(self.rows, replica, flight, flight.boundary_ps(flight.done))
        replica.flights.clear()

    def result(self, wall_s: float) -> Result:
        for replica in self.by_leg.values():
            log_replica(self.rows, self.problem.cluster, replica, None)
        return Result(
            self.rows,
            system=self.system.name,
            mirrors=self.system.mirrors,
            events=self.clock.events,
            wall_s=wall_s,
            extrapolated_share=self.iterations_outside / max(1, self.iterations),
        )


def after(now_ps: int, arrival_s: float) -> float:
    """``arrival_s``, or the first moment a tick after ``now_ps``: what a completion causes comes later than it."""
    if to_ps(arrival_s) > now_ps:
        return arrival_s
    soon_s = to_s(now_ps + 1)
    return soon_s if to_ps(soon_s) > now_ps else nextafter(soon_s, inf)
