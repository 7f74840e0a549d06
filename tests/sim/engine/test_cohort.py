"""Cohorts, flights and jobs: closed forms against counting token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.replica.cohort import Cohort
from sim.engine.replica.job import Job, block_hashes
from sim.engine.replica.state import Flight
from tests.toys import request

BLOCK = 4


def decoding(number: int, kv: int = 8, left: int = 10, spare_blocks: int = 0) -> Job:
    """A job with ``kv`` tokens computed and ``left`` still to come, holding its blocks and some spare ones."""
    job = Job(request(number, input_tokens=kv, output_tokens=left + 1), 10)
    job.computed_tokens = kv
    job.generated_tokens = 1
    job.blocks = -(-kv // BLOCK) + spare_blocks
    return job


def test_a_cohort_advances_without_touching_its_members() -> None:
    cohort = Cohort((0, 0), BLOCK)
    first, second = decoding(0, kv=8, left=3), decoding(1, kv=5, left=9)
    cohort.join(first)
    cohort.join(second)
    assert (cohort.size, cohort.context, cohort.iterations_to_change()) == (2, 9 + 6, 3)
    cohort.advance(3)
    assert (first.kv_tokens, second.kv_tokens, cohort.context) == (11, 8, 12 + 9)
    assert cohort.pop_finished() == [first]
    assert cohort.pop_finished() == []
    assert first.tokens_left == 0
    assert first.tokens == [((0, 0), 0, 3)]
    assert cohort.members() == [second]


def test_members_with_spare_blocks_do_not_grow_until_those_are_full() -> None:
    cohort = Cohort((0, 0), BLOCK)
    job = decoding(0, kv=8, left=30, spare_blocks=2)
    cohort.join(job)
    assert cohort.growth(8) == 0
    assert cohort.iterations_to_change() == 8
    cohort.advance(8)
    cohort.turn()
    assert (cohort.growth(1), cohort.growth(4), cohort.growth(5)) == (1, 1, 2)


def test_a_job_that_left_early_is_forgotten() -> None:
    cohort = Cohort((0, 0), BLOCK)
    gone, stays = decoding(0, left=2), decoding(1, left=7)
    cohort.join(gone)
    cohort.join(stays)
    cohort.advance(1)
    cohort.leave(gone)
    assert (gone.kv_tokens, gone.tokens_left, gone.held_blocks) == (9, 1, 3)
    assert cohort.iterations_to_change() == 6
    cohort.advance(6)
    assert cohort.pop_finished() == [stays]


def test_a_job_may_leave_and_come_back() -> None:
    cohort = Cohort((0, 0), BLOCK)
    job = decoding(0, left=5)
    cohort.join(job)
    cohort.advance(2)
    cohort.leave(job)
    cohort.join(job)
    assert cohort.iterations_to_change() == 3
    cohort.advance(3)
    assert cohort.pop_finished() == [job]
    assert job.tokens == [((0, 0), 0, 2), ((0, 0), 2, 5)]


@dataclass
class Naive:
    """One member, counted token by token."""

    kv: int
    blocks: int

    def step(self) -> int:
        self.kv += 1
        grown = max(0, -(-self.kv // BLOCK) - self.blocks)
        self.blocks += grown
        return grown


members = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=8)


def both(lengths: list[tuple[int, int]]) -> tuple[Cohort, list[Naive]]:
    cohort = Cohort((0, 0), BLOCK)
    for number, (kv, spare) in enumerate(lengths):
        cohort.join(decoding(number, kv=kv, left=1000, spare_blocks=spare))
    return cohort, [Naive(kv, -(-kv // BLOCK) + spare) for kv, spare in lengths]


@given(lengths=members, steps=st.integers(1, 30))
def test_growth_step_by_step_is_what_counting_gives(lengths: list[tuple[int, int]], steps: int) -> None:
    cohort, naive = both(lengths)
    for _ in range(steps):
        cohort.turn()
        assert cohort.context == sum(member.kv + 1 for member in naive)
        assert cohort.growth(1) == sum(member.step() for member in naive)
        cohort.advance(1)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    before=st.integers(0, 9),
    skip=st.integers(0, 5),
    steps=st.integers(0, 40),
    blocks=st.integers(0, 60),
)
def test_growth_in_closed_form(lengths: list[int], before: int, skip: int, steps: int, blocks: int) -> None:
    cohort, naive = both([(kv, 0) for kv in lengths])
    cohort.advance(before)
    for _ in range(before + skip):
        for member in naive:
            member.step()
    each = [sum(member.step() for member in naive) for _ in range(steps)]
    assert cohort.growth(steps, skip=skip) == sum(each)
    possible = max(count for count in range(steps + 1) if sum(each[:count]) <= blocks)
    assert cohort.iterations_within(blocks, steps, skip=skip) == possible


def test_nobody_grows_no_limit() -> None:
    cohort, _ = both([(8, 3)])
    assert cohort.iterations_within(0, 77, skip=1) == 77


@given(small=members, large=members, steps=st.integers(0, 9))
def test_absorbing_keeps_everybodys_progress(
    small: list[tuple[int, int]], large: list[tuple[int, int]], steps: int
) -> None:
    one, two = Cohort((0, 0), BLOCK), Cohort((0, 1), BLOCK)
    jobs = [decoding(n, kv=kv, left=50 + n) for n, (kv, _) in enumerate(small + large)]
    for number, job in enumerate(jobs):
        (one if number < len(small) else two).join(job)
    one.advance(steps)
    two.absorb(one)
    assert (one.size, two.size) == (0, len(jobs))
    assert two.context == sum(job.kv_tokens + 1 for job in jobs)
    assert two.iterations_to_change() == min(50 + n - (steps if n < len(small) else 0) for n in range(len(jobs)))
    assert one.pop_finished() == []


# ------------------------------------------------------------ flights


def flight(first_ps: int, slope_ps: int, iterations: int) -> Flight:
    return Flight(None, [], 100, first_ps, slope_ps, iterations, 0, (), iterations)


def boundaries(first_ps: int, slope_ps: int, iterations: int) -> Iterator[int]:
    at = 100
    for step in range(iterations):
        yield at
        at += first_ps + step * slope_ps


@given(first=st.integers(1, 20), slope=st.integers(0, 5), iterations=st.integers(1, 30), now=st.integers(100, 3000))
def test_the_iteration_under_way(first: int, slope: int, iterations: int, now: int) -> None:
    """The last one that starts strictly before now (on a boundary: the one that ends there), at least the first."""
    starts = list(boundaries(first, slope, iterations))
    expected = max(0, sum(1 for start in starts if start < now) - 1)
    one = flight(first, slope, iterations)
    assert [one.boundary_ps(step) for step in range(iterations)] == starts
    assert one.under_way(now) == expected


# ------------------------------------------------------------ jobs


def test_block_hashes_of_equal_larger_and_smaller_trace_blocks() -> None:
    prompt = request(0, input_tokens=70, prefix=(7, 8), prefix_block_tokens=32)
    assert block_hashes(prompt, 32) == (7, 8)
    assert block_hashes(prompt, 16) == ((7, 0), (7, 1), (8, 0), (8, 1))
    assert block_hashes(prompt, 64) == ((7, 8),)
    assert block_hashes(prompt, 48) == ((7, 8),)  # 48 of the 64 tokens known
    assert block_hashes(request(0), 16) == ()


def test_block_hashes_cover_full_blocks_of_prompt_and_answer_only() -> None:
    """A trace's last block may be partly filled (Mooncake: 512 tokens a block)."""
    prompt = request(0, input_tokens=600, prefix=(1, 2), prefix_block_tokens=512)
    assert len(block_hashes(prompt, 16)) == (600 + 10) // 16
    assert block_hashes(prompt, 1024) == ()


@pytest.mark.parametrize("size", [16, 24, 32, 48])
def test_equal_prefixes_and_only_those_hash_equal(size: int) -> None:
    a = request(0, input_tokens=96, prefix=(1, 2, 3), prefix_block_tokens=32)
    b = request(1, input_tokens=96, prefix=(1, 2, 9), prefix_block_tokens=32)
    same = [x == y for x, y in zip(block_hashes(a, size), block_hashes(b, size), strict=True)]
    assert same == [True] * (64 // size) + [False] * (96 // size - 64 // size)


def test_starting_over_keeps_what_was_generated() -> None:
    job = decoding(0, kv=8, left=10)
    job.generated_tokens = 4
    job.start_over()
    assert (job.computed_tokens, job.target_tokens, job.remaining_tokens) == (0, 12, 12)
