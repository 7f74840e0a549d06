"""Decoding sequences that advance together, one token each per iteration.

A request is one sequence, a group of samples that many of equal length.

Nothing per request is touched when the cohort advances: a member's KV length is ``base + it``, its blocks
follow from a histogram of ``base`` modulo the block size, the next completion is the top of a heap, and
token times are recovered from the log of segments.
"""

from __future__ import annotations

from heapq import heappop, heappush

from sim.engine.replica.job import Job
from sim.record import CohortId, Segment


class Cohort:
    """``it`` counts the iterations this cohort has completed since it was made."""

    __slots__ = ("_bases", "_finishing", "_order", "block_size", "context", "id", "it", "log", "size", "turns")

    def __init__(self, name: CohortId, block_size: int) -> None:
        self.id = name
        self.block_size = block_size
        self.it = 0
        self.size = 0
        self.context = 0  # sum over sequences of KV tokens + 1: what attention reads, the new token included
        self._bases = [0] * block_size  # sequences that grow, by base modulo the block size
        self._finishing: list[tuple[int, int, Job]] = []
        self.turns: list[tuple[int, int, Job]] = []  # when a member's growth changes
        self._order = 0
        self.log: list[Segment] = []

    # ------------------------------------------------------------ members

    def join(self, job: Job) -> None:
        """The job's prompt is computed and it has emitted at least one token."""
        kv = job.computed_tokens
        job.cohort = self
        job.join_it = self.it
        job.base = kv - self.it
        self.size += job.samples
        self.context += (kv + 1) * job.samples
        self._order += 1
        job.seat = self._order
        self._grow(job, kv)
        heappush(self._finishing, (self.it + job.tokens_left, self._order, job))

    def leave(self, job: Job) -> None:
        """Note the job's progress and let it go; its heap entry is dead once ``job.seat`` moved on."""
        done = self.it - job.join_it
        if done:
            job.tokens.append((self.id, job.join_it, self.it))
        job.generated_tokens += done
        job.computed_tokens = job.target_tokens = job.base + self.it
        self.size -= job.samples
        self.context -= (job.computed_tokens + 1) * job.samples
        if job.grows:
            self._bases[job.base % self.block_size] -= job.grows
            job.blocks = -(-job.computed_tokens // self.block_size) - len(job.shared)
            job.copied_blocks = job.copies(job.computed_tokens, self.block_size)
        job.cohort = None

    def members(self) -> list[Job]:
        """In order of joining."""
        live = [(seat, job) for _, seat, job in self._finishing if job.cohort is self and job.seat == seat]
        return [job for _, job in sorted(live, key=lambda pair: pair[0])]

    def pop_finished(self) -> list[Job]:
        """Members whose last token has been emitted, removed, in the order in which they were to finish."""
        queue, finished = self._finishing, []
        while queue and queue[0][0] <= self.it:
            _, seat, job = heappop(queue)
            if job.cohort is self and job.seat == seat:
                self.leave(job)
                finished.append(job)
        return finished

    def absorb(self, other: Cohort) -> None:
        """Take over every member of another cohort."""
        for job in other.members():
            other.leave(job)
            self.join(job)

    # ------------------------------------------------------------ progress

    def iterations_to_change(self) -> int:
        """Iterations until a member finishes or grows otherwise (the cohort must not be empty)."""
        change = self._next(self._finishing)
        assert change is not None
        if self.turns:
            change = min(change, self._next(self.turns) or change)
        return change - self.it

    def _next(self, queue: list[tuple[int, int, Job]]) -> int | None:
        while queue:
            at, seat, job = queue[0]
            if job.cohort is self and job.seat == seat:
                return at
            heappop(queue)
        return None

    def turn(self) -> None:
        """Members whose reservation is used up, or whose beams differ in no more blocks, grow otherwise from now on."""
        while self.turns and self._next(self.turns) == self.it:
            _, _, job = heappop(self.turns)
            self._bases[job.base % self.block_size] -= job.grows
            self._grow(job, job.base + self.it)

    def _grow(self, job: Job, kv: int) -> None:
        size = self.block_size
        if job.samples == 1 and (job.blocks + len(job.shared)) * size - kv < size:  # one sequence, nothing reserved
            job.grows = 1
            self._bases[job.base % size] += 1
            return
        job.grows, until = job.growth(kv, self.block_size)
        self._bases[job.base % self.block_size] += job.grows
        if until is not None:
            heappush(self.turns, (self.it + until - kv, job.seat, job))

    def growth(self, iterations: int, skip: int = 0) -> int:
        """Blocks that ``iterations`` iterations take, after skipping the next ``skip`` ones."""
        size = self.block_size
        bases = self._bases
        if iterations == 1:
            return bases[-(self.it + skip) % size]
        cycles, rest = divmod(iterations, size)
        start = self.it + skip
        blocks = cycles * sum(bases) if cycles else 0
        for step in range(rest):
            blocks += bases[-(start + step) % size]
        return blocks

    def iterations_within(self, blocks: int, at_most: int, skip: int) -> int:
        """Most iterations (``at_most`` or fewer) that take no more than so many blocks, after ``skip``."""
        bases = self._bases
        per_cycle = sum(bases)
        if not per_cycle:
            return at_most
        size = self.block_size
        cycles = blocks // per_cycle
        done = cycles * size
        if done >= at_most:
            return at_most
        blocks -= cycles * per_cycle
        start = self.it + skip
        for step in range(size):
            blocks -= bases[-(start + step) % size]
            if blocks < 0:
                return min(done + step, at_most)
        return min(done + size, at_most)

    def advance(self, iterations: int) -> None:
        self.it += iterations
        self.context += iterations * self.size
