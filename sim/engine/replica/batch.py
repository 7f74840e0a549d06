"""The draft of a replica's next iteration: what a batcher reads and does, checked as it happens.

Fits ``sim.policy.Batch``; the meaning of every read and action is documented there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, cast

from sim.types import PolicyError, Role, Work, to_s

if TYPE_CHECKING:
    from sim.engine.replica.cohort import Cohort
    from sim.engine.replica.job import Job
    from sim.engine.replica.state import ReplicaState
    from sim.policy import RequestView


class Draft:
    """One per fill. Actions change the replica's queues and ledger at once; the flight is made from the rest."""

    __slots__ = ("chunks", "cohort", "limits", "most_iterations", "now_ps", "preempted", "replica", "swap_blocks")

    def __init__(self, replica: ReplicaState, now_ps: int) -> None:
        self.replica = replica
        self.limits = replica.limits
        self.now_ps = now_ps
        self.chunks: list[tuple[Job, int]] = []
        self.cohort: Cohort | None = None
        self.preempted = 0
        self.swap_blocks = 0
        self.most_iterations: int | None = None
        if replica.idle is not None and replica.idle.turns:
            replica.idle.turn()

    # ------------------------------------------------------------ reads

    @property
    def now_s(self) -> float:
        return to_s(self.now_ps)

    @property
    def role(self) -> Role:
        return self.replica.role

    @property
    def waiting(self) -> Iterator[Job]:
        queue = self.replica.waiting
        if not queue:
            return iter(())
        return takewhile(lambda job: not self.replica.veil.hides(job), self._waiting())

    def _waiting(self) -> Iterator[Job]:
        queue = self.replica.waiting
        while queue:
            head = next(iter(queue))
            yield head
            if head in queue:
                yield from list(islice(queue, 1, None))
                return

    @property
    def arrived(self) -> Sequence[Job]:
        arrived, veil = self.replica.arrived, self.replica.veil
        return tuple([job for job in arrived if not veil.hides(job)]) if arrived else ()

    @property
    def prefilling(self) -> Sequence[Job]:
        jobs = self.replica.prefilling
        return [job for job in jobs if not job.in_flight] if jobs else ()

    def ahead(self) -> Sequence[tuple[Job, int]]:
        running = self.replica.running
        if not self.replica.prefilling:
            return ()
        behind = sum(1 for _ in takewhile(self.replica.prefilling.__contains__, reversed(running)))
        if behind == len(self.replica.prefilling):
            return ()
        decoding, before, found = set(self.decoding), 0, []
        for job in islice(running, len(running) - behind):
            before += job in decoding
            if job in self.replica.prefilling and not job.in_flight:
                found.append((job, before))
        return found

    @property
    def swapped(self) -> Sequence[Job]:
        return tuple(self.replica.swapped)

    @property
    def paused(self) -> Sequence[Job]:
        return tuple(self.replica.paused)

    @property
    def decoding(self) -> Sequence[Job]:
        paused = self.replica.paused
        cohort = self.replica.idle
        return [job for job in self.replica.running if job in paused or (cohort is not None and job.cohort is cohort)]

    @property
    def num_running(self) -> int:
        running, ended = self.replica.running, self.replica.veil.ended
        if not self.replica.has_groups:
            return len(running) + len(ended)
        return sum([job.samples for job in running]) + sum([job.samples for job in ended])

    @property
    def num_decodes(self) -> int:
        idle = self.replica.idle
        size = idle.size if idle is not None else 0
        return size + sum([job.samples for job in self.replica.paused]) if self.replica.paused else size

    @property
    def free_blocks(self) -> int:
        return self.replica.ledger.free

    @property
    def total_blocks(self) -> int:
        return self.replica.ledger.total

    def seconds(self, work: Work) -> float:
        replica = self.replica
        hops_ps = (len(replica.costs) - 1) * replica.hop_ps(work.tokens)
        return to_s(sum(cost.line(work).first_ps for cost in replica.costs) + hops_ps)

    def tokens_wanted(self, request: RequestView) -> int:
        job = cast("Job", request)
        return job.target_tokens - (job.computed_tokens or self._cached_tokens(job))

    @property
    def blocks_to_grow(self) -> int:
        if self.cohort is not None:
            return 0
        idle = self.replica.idle
        need = idle.growth(1) if idle is not None else 0
        if self.replica.paused:
            need += sum(self._growth(job) for job in self.replica.paused)
        return need

    def last_running(self) -> Job | None:
        for job in reversed(self.replica.running):
            if not self._away(job):
                return job
        return None

    @property
    def empty(self) -> bool:
        return not self.chunks and (self.cohort is None or not self.cohort.size)

    # ------------------------------------------------------------ actions

    def preempt(self, request: RequestView, how: Literal["recompute", "swap"] = "recompute") -> None:
        job, replica = cast("Job", request), self.replica
        if job not in replica.running or self._away(job):
            raise self._illegal(f"preempts {job}, which is not running here")
        self.chunks = [chunk for chunk in self.chunks if chunk[0] is not job]
        if how == "swap" and job.remaining_tokens:
            raise self._illegal(f"swaps out {job}, whose prompt is not finished ({job.remaining_tokens} tokens left)")
        self._drop_decode(job)
        self.preempted += 1
        job.preemptions += 1
        del replica.running[job]
        replica.paused.pop(job, None)
        if how == "swap":
            self.swap_blocks += job.held_blocks + job.copied_blocks
            replica.release(job)
            replica.swapped[job] = None
            return
        if job in replica.prefilling:
            del replica.prefilling[job]
            replica.forget_prefill(job)
        whole = min(job.computed_tokens, job.target_tokens - 1) // replica.block_size
        replica.release(job, whole if job.samples == 1 else min(whole, (job.input_tokens - 1) // replica.block_size))
        job.start_over()
        replica.enqueue(job, in_front=True)

    def admit(
        self, request: RequestView, tokens: int, *, reserve_tokens: int | None = None, keep_free_blocks: int = 0
    ) -> bool:
        job, replica, ledger = cast("Job", request), self.replica, self.replica.ledger
        if job not in replica.waiting:
            raise self._illegal(f"admits {job}, which is not waiting here")
        cached = 0 if job.computed_tokens else self._cached_tokens(job)
        wanted = job.target_tokens - (job.computed_tokens or cached)
        if not 0 < tokens <= wanted:
            raise self._illegal(f"admits {job} with {tokens} tokens; it wants {wanted}")
        known = job.hashes[: cached // ledger.block_size]
        own = cached // ledger.block_size - len(known)
        keep = job.computed_tokens + cached + tokens
        hold = max(keep, reserve_tokens or 0)
        copies = job.copies(hold, ledger.block_size) - job.copied_blocks
        need = max(0, ledger.blocks(hold) - job.held_blocks - len(known) - own) + copies
        if ledger.free - need - own - (ledger.idle_blocks(known) if known else 0) < keep_free_blocks:
            return False
        del replica.waiting[job]
        if cached:
            self._come_back(job, known, own)
        ledger.take(need)
        job.blocks += need - copies
        job.copied_blocks += copies
        replica.running[job] = None
        replica.prefilling[job] = None
        self._schedule(job, tokens)
        return True

    def welcome(self, request: RequestView) -> None:
        job, replica = cast("Job", request), self.replica
        if job not in replica.arrived or self.cohort is not None:
            raise self._illegal(f"welcomes {job}, which is not newly arrived, or after decode was called")
        del replica.arrived[job]
        replica.running[job] = None
        self._join(job)

    def prefill(self, request: RequestView, tokens: int) -> bool:
        job, replica = cast("Job", request), self.replica
        if job not in replica.prefilling or self._away(job):
            raise self._illegal(f"prefills {job}, which has no unfinished prompt here")
        if not 0 < tokens <= job.remaining_tokens or any(other is job for other, _ in self.chunks):
            raise self._illegal(f"prefills {tokens} tokens of {job}, which has {job.remaining_tokens} left")
        missing = replica.ledger.blocks(job.computed_tokens + tokens) - job.held_blocks
        if missing > replica.ledger.free:
            return False
        if missing > 0:
            replica.ledger.take(missing)
            job.blocks += missing
        self._schedule(job, tokens)
        return True

    def swap_in(self, request: RequestView, *, keep_free_blocks: int = 0) -> bool:
        job, replica = cast("Job", request), self.replica
        if job not in replica.swapped:
            raise self._illegal(f"swaps in {job}, which is not swapped out here")
        copies = job.copies(job.computed_tokens, replica.ledger.block_size)
        need = replica.ledger.blocks(job.computed_tokens) + copies
        if replica.ledger.free - need - self._growth(job) < keep_free_blocks:
            return False
        del replica.swapped[job]
        replica.ledger.take(need)
        job.blocks, job.copied_blocks = need - copies, copies
        self.swap_blocks += need
        replica.running[job] = None
        self._join(job)
        return True

    def decode(self, leave_out: Iterable[RequestView] = ()) -> None:
        replica = self.replica
        if self.cohort is not None:
            raise self._illegal("calls decode twice for one batch")
        idle = replica.idle_cohort()
        left_out = cast("list[Job]", list(leave_out))
        if replica.paused:
            for job in [job for job in replica.paused if job not in left_out]:
                del replica.paused[job]
                idle.join(job)
        for job in left_out:
            if job.cohort is idle:
                idle.leave(job)
                replica.paused[job] = None
            elif job not in replica.paused:
                raise self._illegal(f"leaves out {job}, which is not decoding here")
        need = idle.growth(1)
        if need > replica.ledger.free:
            raise self._illegal(f"decodes {idle.size} requests: {need} blocks wanted, {replica.ledger.free} free")
        if need:
            replica.ledger.take(need)
        self.cohort = idle

    def repeat_at_most(self, iterations: int) -> None:
        if iterations < 1:
            raise self._illegal(f"repeats a batch at most {iterations} times; it must be >= 1")
        self.most_iterations = min(iterations, self.most_iterations or iterations)

    # ------------------------------------------------------------ inside

    def _schedule(self, job: Job, tokens: int) -> None:
        self.chunks.append((job, tokens))
        if job.hashes:
            self.replica.publish(job, job.computed_tokens + tokens)

    def _cached_tokens(self, job: Job) -> int:
        """Known prefix, less the last block if that would leave nothing to compute (vLLM v1)."""
        ledger = self.replica.ledger
        if not (job.hashes or job.run) or not ledger.prefix_caching:
            return 0
        known = ledger.known_prefix(job.hashes[: (job.target_tokens - 1) // ledger.block_size])
        if known == len(job.hashes):
            known += ledger.kept(job.run)
        return known * ledger.block_size

    def _come_back(self, job: Job, known: Sequence[Hashable], own: int) -> None:
        """Hold what is in memory of the job's content: shared by hash, and ``own`` blocks of its run."""
        ledger = self.replica.ledger
        ledger.share(known)
        job.shared.extend(known)
        job.published = len(known)
        if own:
            assert job.run is not None
            ledger.take_back(job.run)
            job.blocks += own
        cached = (len(known) + own) * ledger.block_size
        job.cached_tokens += cached
        self.replica.computed(job, cached)

    def _join(self, job: Job) -> None:
        self.replica.join(job)
        if self.cohort is not None:
            self.replica.ledger.take(self._growth(job))

    def _drop_decode(self, job: Job) -> None:
        """Out of the decodes; the block it was given for this very batch goes back with the others."""
        if job.cohort is None:
            return
        grown = self._growth(job) if self.cohort is not None else 0
        job.cohort.leave(job)
        job.blocks += grown

    def _growth(self, job: Job) -> int:
        """Blocks the job needs to append one token."""
        kv, size = job.kv_tokens, self.replica.ledger.block_size
        if kv % size:
            return 0
        return job.growth(kv, size)[0] if job.cohort is None else job.grows

    def _away(self, job: Job) -> bool:
        """The job is inside another micro-batch in flight."""
        return job.in_flight or (job.cohort is not None and job.cohort is not self.replica.idle)

    def _illegal(self, what: str) -> PolicyError:
        policy: Any = type(self.replica.batcher).__name__
        return PolicyError(f"{policy} on {self.replica.name}: {what}")
