"""Blocks belong to the request that computed them: after a preemption it comes back to those that are left."""

from __future__ import annotations

from typing import Any

import pytest

from sim import Request, Result
from sim.memory import Ledger, Run
from tests.lab import ONE, Fill, spied, system
from tests.toys import request, run


def fills_of(requests: list[Request], **limits: Any) -> tuple[Result, list[Fill]]:
    lab, fills = spied(system(**{"num_kv_blocks": 10, "prefix_caching": True} | limits))
    return run(lab, requests, plan=ONE, step_by_step=True), fills


def test_what_a_preempted_request_left_is_evicted_from_its_end_and_found_again() -> None:
    """Ten blocks: six belong to one that is preempted, four to one that grows by two before the first comes back."""
    ledger = Ledger(10, 16, prefix_caching=True)
    ledger.take(10)
    run = ledger.keep(6, owner="first")
    assert (ledger.free, ledger.kept(run)) == (6, 6)
    ledger.take(2)  # the second one grows
    assert (ledger.free, ledger.kept(run)) == (4, 4)
    ledger.take_back(run)
    assert (ledger.free, ledger.kept(run)) == (0, 0)


def test_blank_blocks_and_what_nobody_waits_for_go_before_a_run() -> None:
    ledger = Ledger(10, 16, prefix_caching=True)
    ledger.take(10)
    ledger.give(2)
    ledger.give(1)  # blank blocks that follow each other are one entry
    run = ledger.keep(4, owner="first")
    ledger.give(3)
    assert ledger.blank_first(("first",)) == 3
    assert ledger.blank_first(()) == 10  # its owner does not wait here
    ledger.take(5)
    assert ledger.kept(run) == 2
    ledger.take(5)
    assert ledger.kept(run) == 0
    assert ledger.kept(Run("another")) == ledger.kept(None) == 0


@pytest.mark.parametrize(("answer", "left"), [(10, 4), (20, 3)])
def test_a_preempted_request_computes_only_what_is_gone(answer: int, left: int) -> None:
    """Ten blocks, no hashes. Both prompts take five; the first needs a sixth at once, so the second is preempted.

    Four of its five blocks are whole; the other one goes first. With 20 tokens the first needs a seventh block too (at
    96 tokens), and takes the last of the four. The second wants five and waits for the first to end.
    """
    result, fills = fills_of([request(0, 0.0, 80, answer), request(1, 0.0, 75, 10)])
    assert [fill.preempted for fill in fills if fill.preempted] == [[1]]
    chunks = [fill.chunks for fill in fills if fill.chunks]
    assert chunks == [{0: 80, 1: 75}, {1: 75 + 1 - 16 * left}]  # it had emitted one token
    assert [row.cached_tokens for row in result.rows.requests] == [0, 16 * left]


def test_without_prefix_caching_all_is_computed_again() -> None:
    result, fills = fills_of([request(0, 0.0, 80, 10), request(1, 0.0, 75, 10)], prefix_caching=False)
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 80, 1: 75}, {1: 75 + 1}]
    assert [row.cached_tokens for row in result.rows.requests] == [0, 0]


def test_a_prompt_preempted_between_its_chunks_goes_on_where_it_was() -> None:
    """64 tokens a batch, nine blocks, seven of them the first's: the second has computed 18 tokens when they end."""
    result, fills = fills_of(
        [request(0, 0.0, 110, 8), request(1, 0.0, 60, 1)], max_num_batched_tokens=64, num_kv_blocks=9
    )
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 64}, {0: 46, 1: 16 + 2}, {1: 60 - 16}]
    assert [row.cached_tokens for row in result.rows.requests] == [0, 16]


@pytest.mark.parametrize(("at_s", "found"), [(0.15, 16), (0.25, 32)])
def test_blocks_of_an_answer_are_shared_as_they_fill(at_s: float, found: int) -> None:
    """An iteration takes 10 ms and a bit: the second block is full with the 17th of the first's 40 tokens."""
    first = Request(id=0, arrival_s=0.0, input_tokens=16, output_tokens=40, prefix=(1, 2, 3), prefix_block_tokens=16)
    second = Request(id=1, arrival_s=at_s, input_tokens=40, output_tokens=2, prefix=(1, 2), prefix_block_tokens=16)
    result, _ = fills_of([first, second])
    assert {row.request.id: row.cached_tokens for row in result.rows.requests} == {0: 0, 1: found}
