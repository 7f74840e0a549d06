"""The state of one replica: its queues, its KV ledger, its batches in flight, as of any instant.

Nothing here knows SimPy. ``settle`` brings the state to the present while a collapsed flight is under way, so
that whoever reads it sees what the step-by-step engine would show.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import isqrt
from operator import itemgetter
from typing import cast

from sim.cluster import Path
from sim.cost import StageCost
from sim.engine.clock import Alarm, Clock
from sim.engine.links import Flow
from sim.engine.replica.cohort import Cohort
from sim.engine.replica.job import Job
from sim.engine.replica.veil import Veil
from sim.memory import Ledger
from sim.policy import Batcher, Limits, RequestView
from sim.types import Line, Move, Replica, Role, to_ps


@dataclass(slots=True, eq=False)
class Flight:
    """One micro-batch on its way through the stages, for ``iterations`` equal iterations.

    Iteration ``i`` starts at ``boundary_ps(i)``; those before ``done`` are in the replica's state already.
    """

    cohort: Cohort | None
    chunks: list[tuple[Job, int]]
    start_ps: int
    first_ps: int
    slope_ps: int
    iterations: int
    decode_context: int
    stage_lines: tuple[Line, ...]
    longest: int
    """Iterations for which duration formula and batcher's decision hold, whatever else happens."""
    done: int = 0
    alarm: Alarm | None = None

    def boundary_ps(self, iteration: int) -> int:
        return self.start_ps + iteration * self.first_ps + self.slope_ps * (iteration * (iteration - 1) // 2)

    def under_way(self, now_ps: int) -> int:
        """Index of the iteration in progress: how many boundaries lie strictly before now."""
        elapsed_ps = max(0, now_ps - self.start_ps - 1)
        if self.slope_ps:  # the largest i with slope i i + (2 first - slope) i <= 2 elapsed
            linear = 2 * self.first_ps - self.slope_ps
            root = isqrt(linear * linear + 8 * self.slope_ps * elapsed_ps)
            ended = (root - linear) // (2 * self.slope_ps)
        else:
            ended = elapsed_ps // self.first_ps
        return max(self.done, min(ended, self.iterations - 1))


@dataclass(slots=True, eq=False)
class Delivery:
    """KV on its way from ``source`` to ``target``: waits for room there, then flows part by part."""

    job: Job
    epoch: int
    move: Move
    source: ReplicaState
    target: ReplicaState
    path: Path
    blocks: int
    parts: deque[tuple[float, int]]
    """(bytes, earliest start ps) still to be sent."""
    sent_bytes: float = 0.0
    known: Sequence[Hashable] = ()
    """Of its content, what its target had when it was let in, and holds for it."""
    started_ps: int | None = None
    flow: Flow | None = None

    def known_there(self) -> Sequence[Hashable]:
        """Hashes of the leading blocks that the target has now, so that they need not move."""
        hashes, ledger = self.job.hashes, self.target.ledger
        if not hashes or not ledger.prefix_caching:
            return ()
        hashes = hashes[: self.move.tokens // ledger.block_size]
        return hashes[: ledger.known_prefix(hashes)]

    @property
    def room(self) -> int:
        """Blocks that must be free at the target."""
        if not self.job.hashes:
            return self.blocks
        known = self.known_there()
        return self.blocks - len(known) + self.target.ledger.idle_blocks(known) if known else self.blocks

    def let_in(self) -> None:
        """Take the blocks at the target. Only what is missing there moves."""
        ledger = self.target.ledger
        if self.job.hashes:
            self.known = self.known_there()
        if self.known:
            ledger.share(self.known)
            tokens = self.move.tokens - len(self.known) * ledger.block_size
            share = tokens / self.move.tokens
            self.parts = deque([(size_bytes * share, ready_ps) for size_bytes, ready_ps in self.parts])
            self.move = self.move._replace(tokens=tokens, kv_bytes=round(self.move.kv_bytes * share))
        ledger.take(self.blocks - len(self.known))

    def hand_over(self) -> None:
        """The job's blocks are those at the target from now on, and others may find what is in them."""
        job, target = self.job, self.target
        job.copied_blocks = job.copies(job.computed_tokens, target.block_size)
        job.blocks = self.blocks - job.copied_blocks - len(self.known)
        job.shared = list(self.known)
        job.published = len(self.known)
        if job.hashes:
            target.settle()
            target.publish(job, job.computed_tokens)
        target.land(job)


class ReplicaState:
    """A replica that is up. Fits ``ReplicaView``; the engine's modules change it."""

    def __init__(
        self,
        number: int,
        spec: Replica,
        costs: tuple[StageCost, ...],
        hop_ps: Callable[[int], int],
        ledger: Ledger,
        batcher: Batcher,
        limits: Limits,
        clock: Clock,
    ) -> None:
        self.number = number
        self.spec = spec
        self.name = spec.name
        self.leg = spec.leg
        self.gpus = spec.gpus
        self.role: Role = spec.role
        self.costs = costs
        self.hop_ps = hop_ps
        self.ledger = ledger
        self.batcher = batcher
        self.limits = limits
        self.clock = clock
        self.up_ps = clock.now_ps
        self.has_groups = False  # of samples, ever
        self.lanes = len(costs)
        self.veil = Veil(limits.async_scheduling and self.lanes == 1)
        self.stage_free_ps = [0] * len(costs)
        self.stage_busy_ps = [0] * len(costs)
        self.flights: list[Flight] = []
        self.idle: Cohort | None = None
        self.cohorts: list[Cohort] = []
        self.waiting: OrderedDict[Job, None] = OrderedDict()
        self.arrived: OrderedDict[Job, None] = OrderedDict()  # KV came from elsewhere, not decoding yet
        self.running: OrderedDict[Job, None] = OrderedDict()
        self.prefilling: OrderedDict[Job, None] = OrderedDict()
        self.swapped: OrderedDict[Job, None] = OrderedDict()
        self.paused: OrderedDict[Job, None] = OrderedDict()
        self.publishing: dict[Job, None] = {}  # decoding, with hashes for blocks that are not full yet
        self.departing: OrderedDict[Job, None] = OrderedDict()  # prefilled here, KV not fetched yet
        self.inbox: deque[Delivery] = deque()  # waiting for room here
        self.arriving: OrderedDict[Job, None] = OrderedDict()  # room taken here, KV on its way
        self._pending_prefill_tokens = 0
        self._num_prefilling = 0
        self.kick: Alarm | None = None
        self._index: tuple[int, frozenset[Hashable]] | None = None  # of the prefix cache, and when it was made
        self.retiring = False

    def __repr__(self) -> str:
        return (
            f"{self.name} ({self.role}): waiting {len(self.waiting)}, arrived {len(self.arrived)}, "
            f"running {len(self.running)} ({len(self.prefilling)} in prefill), swapped {len(self.swapped)}, "
            f"KV leaving {len(self.departing)}, KV arriving {len(self.inbox) + len(self.arriving)}, "
            f"blocks {self.ledger.used}/{self.ledger.total}"
        )

    # ------------------------------------------------------------ what policies read

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.arrived)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_prefilling(self) -> int:
        return self._num_prefilling

    @property
    def num_decoding(self) -> int:
        here = len(self.waiting) + len(self.arrived) + len(self.running) + len(self.swapped)
        return here - self._num_prefilling + len(self.inbox) + len(self.arriving)

    @property
    def num_swapped(self) -> int:
        return len(self.swapped)

    @property
    def max_num_seqs(self) -> int:
        return self.limits.max_num_seqs

    @property
    def num_departing(self) -> int:
        return len(self.departing)

    @property
    def landing(self) -> list[Job]:
        return [*self.arrived, *self.arriving]

    @property
    def pending_prefill_tokens(self) -> int:
        if self.prefilling:
            self.settle()
        return self._pending_prefill_tokens

    @property
    def free_blocks(self) -> int:
        self.settle()
        return self.ledger.free

    @property
    def total_blocks(self) -> int:
        return self.ledger.total

    @property
    def block_size(self) -> int:
        return self.ledger.block_size

    def matched_tokens(self, request: RequestView, max_age_s: float = 0.0) -> int:
        job = cast("Job", request)
        if not job.hashes or not self.ledger.prefix_caching:
            return 0
        hashes = job.hashes[: (job.input_tokens - 1) // self.block_size]
        if not max_age_s:
            self.settle()
            return self.ledger.known_prefix(hashes) * self.block_size
        now_ps = self.clock.now_ps
        if self._index is None or now_ps - self._index[0] > to_ps(max_age_s):
            self.settle()
            self._index = now_ps, self.ledger.contents()
        index = self._index[1]
        return sum(1 for _ in takewhile(index.__contains__, hashes)) * self.block_size

    # ------------------------------------------------------------ jobs come and go

    def too_long(self, job: Job, tokens: int) -> str | None:
        """Why the job can never have so many tokens in the KV cache here, or None."""
        total = self.total_blocks
        if job.blocks_for(tokens, self.block_size) > total:
            return f"{tokens} tokens exceed the {total * self.block_size} that the KV cache of {self.name} holds"
        reason = self.batcher.refuse(job, tokens, total, self.limits)
        return None if reason is None else f"{self.name}: {reason}"

    def enqueue(self, job: Job, *, in_front: bool = False) -> None:
        """To the waiting queue, with a prompt to compute."""
        self.has_groups |= job.samples > 1
        self.waiting[job] = None
        if in_front:
            self.waiting.move_to_end(job, last=False)
        else:
            self.veil.fresh[job] = None
        self._num_prefilling += 1
        self._pending_prefill_tokens += job.remaining_tokens

    def land(self, job: Job) -> None:
        """The job's KV came from elsewhere, and it may decode here."""
        self.arrived[job] = None
        self.veil.fresh[job] = None

    def computed(self, job: Job, tokens: int) -> None:
        """So many more tokens of the job's prompt are in the KV cache."""
        job.computed_tokens += tokens
        self._pending_prefill_tokens -= tokens
        if not job.remaining_tokens:
            self._num_prefilling -= 1

    def forget_prefill(self, job: Job) -> None:
        """The job goes away, or starts over, with prompt tokens still to compute."""
        if job.remaining_tokens:
            self._num_prefilling -= 1
            self._pending_prefill_tokens -= job.remaining_tokens

    def publish(self, job: Job, tokens: int) -> None:
        """Blocks that are full with so many tokens can be shared from now on, as in vLLM v1."""
        if not self.ledger.prefix_caching:
            return
        full = min(tokens // self.ledger.block_size, len(job.hashes))
        for key in job.hashes[job.published : full]:
            if self.ledger.publish(key):
                job.shared.append(key)
                job.blocks -= 1
        job.published = max(job.published, full)

    def join(self, job: Job) -> None:
        """The job decodes from the next batch on."""
        self.idle_cohort().join(job)
        if job.hashes and job.published < len(job.hashes) and job.samples == 1 and self.ledger.prefix_caching:
            self.publishing[job] = None

    def _publish_answers(self, cohort: Cohort) -> None:
        """Blocks with hashes that decodes have filled by now, in the order in which they did."""
        size, full = self.ledger.block_size, []
        for job in [job for job in self.publishing if job.cohort is cohort]:
            blocks = min((job.base + cohort.it) // size, len(job.hashes))
            full += [((block + 1) * size - job.base, job) for block in range(job.published, blocks)]
            if blocks == len(job.hashes):
                del self.publishing[job]
        for at, job in sorted(full, key=itemgetter(0)):
            self.publish(job, job.base + at)

    def iterations_to_publish(self, cohort: Cohort) -> int:
        """Until the next block with a hash is full, of the cohort that runs; at least 1."""
        size, sooner = self.ledger.block_size, cohort.iterations_to_change()
        for job in self.publishing:
            if job.cohort is cohort:
                sooner = min(sooner, (job.published + 1) * size - job.base - cohort.it)
        return max(1, sooner)

    def release(self, job: Job, whole_blocks: int = 0) -> None:
        """Give the job's blocks back; of the first ``whole_blocks`` it may come for those that no hash tells of."""
        own = whole_blocks - len(job.hashes) if whole_blocks and self.ledger.prefix_caching else 0
        if self.publishing:
            self.publishing.pop(job, None)
        if own > 0:
            self.ledger.give(job.blocks + job.copied_blocks - own)
            job.run = self.ledger.keep(own, job)
            self.ledger.give(0, job.shared)
        else:
            self.ledger.give(job.blocks + job.copied_blocks, job.shared)
        job.blocks = job.copied_blocks = 0
        job.shared = []

    def new_cohort(self) -> Cohort:
        cohort = Cohort((self.number, len(self.cohorts)), self.ledger.block_size)
        self.cohorts.append(cohort)
        return cohort

    def idle_cohort(self) -> Cohort:
        if self.idle is None:
            self.idle = self.new_cohort()
        return self.idle

    def jobs(self) -> Iterator[Job]:
        """Everyone whose work or KV is here, in a fixed order."""
        for place in (self.running, self.waiting, self.arrived, self.swapped, self.departing, self.arriving):
            yield from place
        for delivery in self.inbox:
            yield delivery.job

    @property
    def only_holds(self) -> bool:
        """Nothing here can make progress or free blocks by itself: all KV held waits to leave."""
        return not (self.flights or self.running or self.arriving or self.arrived or self.swapped)

    # ------------------------------------------------------------ the present

    def settle(self) -> None:
        """Account for the iterations that ended before now in collapsed flights."""
        for flight in self.flights:
            if flight.iterations - flight.done > 1:
                done = flight.under_way(self.clock.now_ps)
                if done != flight.done:
                    self.progress(flight, done, started=True)

    def progress(self, flight: Flight, done: int, *, started: bool) -> None:
        """Bring the state to ``done`` completed iterations; ``started``: the next one holds its blocks."""
        cohort, steps = flight.cohort, done - flight.done
        while self.publishing and steps and cohort is not None and cohort.size:
            few = min(steps, self.iterations_to_publish(cohort))
            self._advance(flight, few, few - 1)  # the iteration under way has its blocks already
            self._publish_answers(cohort)  # before the next one takes any, which may evict what it would find
            steps -= few
            if steps or started:
                self._advance(flight, 0, 1)
        if steps:
            self._advance(flight, steps, steps if started else steps - 1)
        flight.done = done

    def _advance(self, flight: Flight, steps: int, charged: int) -> None:
        """So many iterations on, with the blocks of ``charged`` ones: those after the one under way."""
        cohort = flight.cohort
        if cohort is not None and cohort.size:
            if charged:
                self.ledger.take(cohort.growth(charged, skip=steps > 0))
            cohort.advance(steps)
        for job, tokens in flight.chunks:
            if charged:
                self.hold(job, job.computed_tokens + tokens * (charged + (steps > 0)))
            self.computed(job, tokens * steps)

    def hold(self, job: Job, tokens: int) -> None:
        """Take the blocks that so many tokens of the job need beyond those it has."""
        missing = self.ledger.blocks(tokens) - job.held_blocks
        if missing > 0:
            self.ledger.take(missing)
            job.blocks += missing
