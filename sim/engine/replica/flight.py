"""From a filled draft to a flight: how long an iteration takes, and how many equal ones collapse into one event."""

from __future__ import annotations

from sim.engine.replica.batch import Draft
from sim.engine.replica.state import Flight, ReplicaState
from sim.types import Line, Work


def launch(replica: ReplicaState, draft: Draft, now_ps: int, extra_ps: int) -> tuple[Flight, bool]:
    """Put the draft on its way as one iteration; also whether it used a shape outside the measured range.

    A micro-batch passes the stages in order, waits where an earlier one still computes, and hops to the next
    stage over the link between them. ``extra_ps`` (swapping) delays its start.
    """
    cohort = draft.cohort
    seqs = context = 0
    if cohort is not None and cohort.size:
        replica.idle = None
        seqs, context = cohort.size, cohort.context
    else:
        cohort = None
    chunks = draft.chunks
    for job, _ in chunks:
        job.in_flight = True
        if job.first_scheduled_ps is None:
            job.first_scheduled_ps = now_ps
    work = Work(tuple([(tokens, job.computed_tokens) for job, tokens in chunks]) if chunks else (), seqs, context)
    if replica.lanes == 1:
        line = replica.costs[0].line(work)
        stage_lines: tuple[Line, ...] = (line,)
    else:
        line, stage_lines = _through_stages(replica, work, now_ps + extra_ps)
    first_ps, slope_ps, longest, outside = line
    if extra_ps or draft.preempted:
        longest = 1
    elif draft.most_iterations is not None:
        longest = min(longest, draft.most_iterations)
    flight = Flight(cohort, chunks, now_ps, first_ps + extra_ps, slope_ps, 1, context, stage_lines, longest)
    replica.flights.append(flight)
    return flight, outside


def _through_stages(replica: ReplicaState, work: Work, start_ps: int) -> tuple[Line, tuple[Line, ...]]:
    hop_ps = replica.hop_ps(work.tokens)
    at_ps = start_ps
    lines = [cost.line(work) for cost in replica.costs]
    waited = False
    for number, line in enumerate(lines):
        free_ps = replica.stage_free_ps[number]
        waited |= free_ps > at_ps
        at_ps = max(at_ps, free_ps) + line.first_ps
        replica.stage_free_ps[number] = at_ps
        if number + 1 < len(lines):
            at_ps += hop_ps
    whole = Line(
        at_ps - start_ps,
        sum(line.slope_ps for line in lines),
        1 if waited else min(line.iterations for line in lines),
        any(line.extrapolated for line in lines),
    )
    return whole, tuple(lines)


def extend(replica: ReplicaState, flight: Flight) -> None:
    """Collapse: repeat the iteration for as long as the batcher would decide the same again.

    Until then nobody finishes, no chunk gets shorter, and no block is missing. A prompt that leaves for
    another replica takes its last iteration alone, so that its KV can leave layer by layer.
    """
    most = flight.longest
    cohort, ledger = flight.cohort, replica.ledger
    if cohort is not None:
        most = min(most, cohort.iterations_to_change())
        if replica.publishing and (replica.waiting or replica.inbox):
            most = min(most, replica.iterations_to_publish(cohort))
    for job, tokens in flight.chunks:
        full = (job.remaining_tokens - job.moves_on(replica.leg)) // tokens
        most = min(most, max(1, full))
        if job.hashes and ledger.prefix_caching:
            most = 1  # what it publishes may shorten the prompts that wait
    # a prompt that waits for blocks may need fewer once content that it shares is evicted
    blocks = ledger.blank_first(replica.waiting) if replica.waiting else ledger.free
    if most > 1 and not flight.chunks and cohort is not None:
        most = 1 + cohort.iterations_within(blocks, most - 1, skip=1)
    elif most > 1:
        low = 1
        while low < most:  # most iterations whose blocks are there
            middle = (low + most + 1) // 2
            if blocks_to_come(replica, flight, middle) <= blocks:
                low = middle
            else:
                most = middle - 1
        most = low
    flight.iterations = most


def blocks_to_come(replica: ReplicaState, flight: Flight, iterations: int | None = None) -> int:
    """Blocks the flight still takes until it has run so many iterations (default: its own number)."""
    more = (flight.iterations if iterations is None else iterations) - flight.done - 1
    blocks = flight.cohort.growth(more, skip=1) if flight.cohort is not None else 0
    for job, tokens in flight.chunks:
        blocks += max(0, replica.ledger.blocks(job.computed_tokens + tokens * (more + 1)) - job.held_blocks)
    return blocks


def reoccupy_stages(replica: ReplicaState, flight: Flight) -> None:
    """After ``settle``: when each stage gets free of the iteration under way in a lone collapsed flight."""
    tokens = sum([tokens for _, tokens in flight.chunks]) + (flight.cohort.size if flight.cohort is not None else 0)
    hop_ps = replica.hop_ps(tokens)
    at_ps = flight.boundary_ps(flight.done)
    for number, line in enumerate(flight.stage_lines):  # not from the costs: those may have changed since
        at_ps += line.first_ps + flight.done * line.slope_ps
        replica.stage_free_ps[number] = at_ps
        at_ps += hop_ps
