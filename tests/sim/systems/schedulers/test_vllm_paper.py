"""vLLM as its paper describes it: mixed batches, swapped groups, samples that share blocks; and v1's priorities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ClusterEvent, ConfigError, Plan, Request, Result
from sim.batchers import MixedPrompts
from sim.memory import beam_blocks, beam_tail_blocks, copied_blocks, sharing_saving
from sim.model import model
from tests.lab import ONE, SPLIT, Fill, Way, spied, system
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import MS, cluster, problem, replica, request, run, with_limits


def paper(**limits: Any) -> Any:
    mode = {key: limits.pop(key) for key in ("mode", "preemption", "policy") if key in limits}
    return with_limits(SYSTEMS["vllm"](replicas=1, tp=1, **{"mode": "paper", **mode}), **limits)


def watched(lab: Any, requests: list[Request]) -> tuple[Result, list[Fill]]:
    lab, fills = spied(lab)
    return run(lab, requests, plan=ONE, step_by_step=True), fills


def test_prompts_join_the_running_decodes() -> None:
    _, fills = watched(paper(), [request(0), request(1, 0.011), request(2, 0.011)])
    assert [(fill.chunks, fill.decodes) for fill in fills[:3]] == [
        ({0: 100}, []),
        ({1: 100, 2: 100}, [0]),
        ({}, [0, 1, 2]),
    ]


def test_decodes_count_in_the_token_limit() -> None:
    """200 tokens: a decode and one prompt of 100 are 101, the second would make 201."""
    _, fills = watched(paper(max_num_batched_tokens=200), [request(0), request(1, 0.011), request(2, 0.011)])
    assert [fill.chunks for fill in fills[:3]] == [{0: 100}, {1: 100}, {2: 100}]
    _, fills = watched(paper(max_num_batched_tokens=201), [request(0), request(1, 0.011), request(2, 0.011)])
    assert [fill.chunks for fill in fills[:2]] == [{0: 100}, {1: 100, 2: 100}]


@settings(max_examples=40)
@given(traffic(), st.sampled_from([24, 40]), st.sampled_from(["recompute", "swap"]), st.data())
def test_every_batch_keeps_to_the_rules(
    requests: list[Request], blocks: int, preemption: str, data: st.DataObject
) -> None:
    samples = data.draw(st.lists(st.sampled_from([1, 1, 3]), min_size=len(requests), max_size=len(requests)))
    requests = [
        request(one.id, one.arrival_s, one.input_tokens, one.output_tokens, samples=count)
        for one, count in zip(requests, samples, strict=True)
    ]
    limits = {"num_kv_blocks": blocks, "max_num_seqs": 7, "max_num_batched_tokens": 256}
    _, fills = watched(paper(preemption=preemption, **limits), requests)
    for fill in fills:
        sequences = sum(samples[number] for number in fill.decodes)
        assert fill.num_running <= 7
        assert sum(fill.chunks.values()) + sequences <= 256 or (len(fill.chunks) == 1 and not fill.decodes)
        if fill.preempted or set(fill.swapped) - set(fill.swapped_in):
            assert not fill.admitted
        if fill.preempted:
            assert not fill.swapped_in
            assert max(fill.preempted) == max(fill.decodes + fill.preempted)  # ids are in order of arrival


def test_the_latest_to_arrive_is_preempted_though_it_was_there_first() -> None:
    """Split: the KV of the short prompt 1 comes before that of the long prompt 0; 1 is the victim all the same."""
    lab = system(MixedPrompts, router=lambda: Way(("p", "q"), "d"), num_kv_blocks=36)
    plan = Plan(replicas=(*SPLIT.replicas, replica("q", ["n2.g0"], "prefill")))
    requests = [request(0, 0.0, 360, 200), request(1, 0.001, 40, 200)]
    rows = run(lab, requests, problem(cluster(1, 3)), plan=plan).rows.requests
    assert (rows[1].first_token_ps or 0) < (rows[0].first_token_ps or 0)
    assert [row.preemptions > 0 for row in rows] == [False, True]


def test_swapped_requests_come_back_in_order_of_arrival() -> None:
    """The latest left first; the earlier one is back before it."""
    requests = [request(n, 0.0, 48, 60, samples=2) for n in range(3)]
    _, fills = watched(paper(num_kv_blocks=20), requests)
    out = [number for fill in fills for number in fill.preempted]
    back = [number for fill in fills for number in fill.swapped_in]
    assert out[:2] == [2, 1]
    assert back == [1, 2]


def test_a_recompute_longer_than_the_limit_waits_until_nobody_else_runs() -> None:
    requests = [request(n, input_tokens=40, output_tokens=30) for n in range(2)]
    result, fills = watched(paper(max_num_batched_tokens=41, num_kv_blocks=7), requests)
    longer = [fill for fill in fills if sum(fill.chunks.values()) > 41]
    assert longer
    assert all(not fill.decodes for fill in longer)
    assert {row.outcome for row in result.rows.requests} == {"completed"}


# ------------------------------------------------------------ priorities (v1)


def priority(*ranks: int, **limits: Any) -> tuple[Result, list[Fill]]:
    requests = [request(n, 0.001 * n, priority=rank) for n, rank in enumerate(ranks)]
    return watched(paper(mode="v1", policy="priority", **limits), requests)


def test_the_lowest_priority_waits_longest() -> None:
    """One seat; request 0 is alone when it comes, the others go by (priority, arrival)."""
    result, _ = priority(5, 2, 1, 2, 0, max_num_seqs=1)
    order = sorted(result.rows.requests, key=lambda row: row.scheduled_ps or 0)
    assert [row.request.id for row in order] == [0, 4, 2, 1, 3]


def test_the_least_urgent_is_preempted() -> None:
    """Nine blocks for three requests of three and growing: 1 has the worst rank, then 2 by its arrival."""
    requests = [request(n, 0.0, 40, 30, priority=rank) for n, rank in enumerate((0, 7, 0))]
    result, fills = watched(paper(mode="v1", policy="priority", num_kv_blocks=11), requests)
    victims = [number for fill in fills for number in fill.preempted]
    assert victims
    assert set(victims) == {1}
    fcfs, _ = watched(paper(mode="v1", num_kv_blocks=11), requests)
    assert [row.preemptions > 0 for row in fcfs.rows.requests] == [False, False, True]
    assert [row.preemptions > 0 for row in result.rows.requests] == [False, True, False]


def test_equal_priorities_are_first_come_first_served() -> None:
    requests = [request(n, 0.002 * n, 30 + 7 * n, 20) for n in range(20)]
    limits = {"mode": "v1", "num_kv_blocks": 40}
    assert run(paper(policy="priority", **limits), requests).log() == run(paper(**limits), requests).log()


def capped(requests: list[Request], **limits: Any) -> list[Fill]:
    """v1 by priority, chunks of at most 20 tokens."""
    lab = SYSTEMS["vllm"](
        policy="priority", long_prefill_token_threshold=20, reserve_full_prompt=False, replicas=1, tp=1
    )
    return watched(with_limits(lab, **limits), requests)[1]


def test_a_victim_returns_its_tokens_to_the_budget() -> None:
    """Budget 50: chunks of 20, 20 and 10; when 2 finds no block, 1 leaves the batch and 3 gets what it had."""
    requests = [request(n, 0.001 * (n > 1), 150, 2, priority=(9, 1, 2)[n - 1]) for n in (1, 2, 3)]
    fills = capped(requests, num_kv_blocks=10, max_num_batched_tokens=50)
    assert [(fill.chunks, fill.preempted) for fill in fills[1:5]] == [
        ({1: 20, 2: 20, 3: 10}, []), ({1: 20, 2: 20, 3: 10}, []), ({2: 20, 3: 20}, [1]), ({2: 20, 3: 20, 1: 10}, []),
    ]  # fmt: skip


@pytest.mark.parametrize("blocks", range(10, 16))
def test_the_others_go_on_when_the_least_urgent_preempts_itself(blocks: int) -> None:
    """First admitted and first served, it finds no block, and is the victim: the batch is not empty for that."""
    requests = [request(n, 0.001 * (n > 1), 150, 2, priority=(9, 1, 2)[n - 1]) for n in (1, 2, 3)]
    fills = capped(requests, num_kv_blocks=blocks, max_num_batched_tokens=50)
    assert all(fill.tokens for fill in fills[:-1])


@pytest.mark.parametrize("mode", ["v0", "paper"])
def test_only_v1_has_priorities(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"system\.policy is 'priority'; vllm v1 has fcfs and priority"):
        SYSTEMS["vllm"](mode=mode, policy="priority")


# ------------------------------------------------------------ parallel samples


def used(result: Result) -> list[int]:
    return [row.used_blocks for row in result.rows.memory]


@pytest.mark.parametrize("mode", ["v0", "paper"])
def test_samples_share_the_prompts_full_blocks(mode: str) -> None:
    """40 tokens are two full blocks, shared, and half a one, copied: 2 + 3 samples; 9 tokens later a third each."""
    result = run(
        paper(mode=mode), [request(0, input_tokens=40, output_tokens=12, samples=3)], plan=ONE, step_by_step=True
    )
    assert used(result) == [2 + 3] * 9 + [2 + 3 * 2] * 3


def test_samples_of_a_prompt_of_whole_blocks_copy_nothing() -> None:
    result = run(paper(), [request(0, input_tokens=32, output_tokens=3, samples=4)], plan=ONE, step_by_step=True)
    assert used(result) == [2, 2 + 4, 2 + 4]


def test_every_sample_is_computed() -> None:
    """Three decodes of 100, then 101 context tokens each, itself included."""
    where = problem()
    row = run(paper(), [request(0, output_tokens=3, samples=3)], where, plan=ONE).rows.requests[0]
    prompt = 10 * MS + 100 * MS // 100
    decodes = [10 * MS + 3 * MS // 100 + 1000 * 3 * context for context in (101, 102)]
    assert row.finish_ps == prompt + sum(decodes)


def test_a_group_that_ends_costs_nothing_any_more() -> None:
    """Two steps with the group's three sequences, then two of request 1 alone."""
    requests = [request(0, output_tokens=3, samples=3), request(1, output_tokens=5)]
    rows = run(paper(), requests, plan=ONE).rows.requests
    steps = [(4, 101), (4, 102), (1, 103), (1, 104)]
    decodes = [10 * MS + seqs * (MS // 100 + 1000 * context) for seqs, context in steps]
    assert [row.finish_ps for row in rows] == [12 * MS + sum(decodes[:2]), 12 * MS + sum(decodes)]


def test_a_group_takes_as_many_seats_as_it_has_samples() -> None:
    _, fills = watched(paper(max_num_seqs=4), [request(n, samples=2) for n in range(3)])
    assert [fill.chunks for fill in fills if fill.chunks] == [{0: 100, 1: 100}, {2: 100}]
    row = run(paper(max_num_seqs=4), [request(0, samples=5)]).rows.requests[0]
    assert row.reason.endswith("5 samples exceed max_num_seqs 4")


@pytest.mark.parametrize("mode", ["v0", "paper"])
def test_a_group_is_swapped_where_a_single_request_is_recomputed(mode: str) -> None:
    """The later group leaves with its 2 + 2 x 2 blocks and comes back with them: nothing is computed twice."""
    requests = [request(n, 0.001 * n, 40, 40, samples=2) for n in range(2)]
    result, fills = watched(paper(mode=mode, num_kv_blocks=12), requests)
    assert [fill.preempted for fill in fills if fill.preempted] == [[1]]
    assert [fill.swapped_in for fill in fills if fill.swapped_in] == [[1]]
    assert [tokens for fill in fills for tokens in fill.chunks.values()] == [40, 40]
    assert {row.outcome for row in result.rows.requests} == {"completed"}


def test_a_group_that_loses_its_machine_begins_anew() -> None:
    events = [ClusterEvent(at_s=0.05, kind="node_lost", target="n0")]
    two = SYSTEMS["vllm"](mode="paper", replicas=2, tp=1)
    requests = [request(0, output_tokens=20, samples=3)]
    result = run(two, requests, problem(cluster(1, 2)), events=events)
    alone = run(two, requests, problem(cluster(1, 2)))
    row = result.rows.requests[0]
    assert row.outcome == "completed"
    assert len(result.token_times_ps(0)) == 20
    assert row.finish_ps == 50 * MS + (alone.rows.requests[0].finish_ps or 0)


def test_samples_are_forked_where_they_decode() -> None:
    """Split: the prompt's 3 blocks move, the copies are made at the target."""
    lab = with_limits(SYSTEMS["vllm"](mode="paper", prefill={"tp": 1, "replicas": 1}, decode={"tp": 1, "replicas": 1}))
    result = run(lab, [request(0, input_tokens=40, output_tokens=4, samples=3)], problem(cluster(1, 2)), plan=SPLIT)
    assert result.rows.requests[0].bytes_moved == 40 * 32768
    assert {row.used_blocks for row in result.rows.memory if row.replica == "d"} == {2 + 3}


@pytest.mark.parametrize("name", ["vllm", "sarathi-serve"])
def test_who_only_recomputes_refuses_groups(name: str) -> None:
    row = run(SYSTEMS[name](replicas=1, tp=1), [request(0, samples=2)]).rows.requests[0]
    assert row.reason.endswith("2 samples: this scheduler has one a request; vllm serves groups in modes paper and v0")


def test_what_a_group_needs_at_its_end_decides_whether_it_fits() -> None:
    """100 + 9 tokens: 6 shared blocks and one for each sample."""
    for blocks, outcome in ((6 + 9, "completed"), (6 + 8, "rejected")):
        assert run(paper(num_kv_blocks=blocks), [request(0, samples=9)]).rows.requests[0].outcome == outcome


# ------------------------------------------------------------ block arithmetic


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 6), st.sampled_from([1, 8, 16]))
def test_parallel_samples_are_beams_that_never_meet(input_tokens: int, steps: int, samples: int, size: int) -> None:
    """Each continuing itself, after the first token came from the prompt alone."""
    beams = beam_blocks(input_tokens, [range(samples)] * steps, size)
    total = input_tokens + steps
    alone = -(-total // size)
    assert beams == alone + (copied_blocks(total, input_tokens, samples, size) if steps else 0)


def test_a_beam_search_shares_what_its_beams_inherit() -> None:
    """Blocks of 4, a prompt of 6 (a full and a half block), beams of 2, four steps: the winner of step 3 has both."""
    assert beam_blocks(6, [], 4) == 2
    assert beam_blocks(6, [(0, 0)], 4) == 1 + 2  # the half block is copied for one, written in place by the other
    assert beam_blocks(6, [(0, 0), (0, 1)], 4) == 1 + 2  # both fill theirs
    assert beam_blocks(6, [(0, 0), (0, 1), (0, 0)], 4) == 1 + 1 + 2  # they share two full ones, and part
    assert beam_blocks(6, [(0, 0), (0, 1), (0, 0), (1, 1)], 4) == 1 + 1 + 2  # one's block is copied for the other


@given(st.integers(1, 100), st.integers(1, 60), st.integers(1, 6), st.randoms(use_true_random=False))
def test_beams_hold_no_more_than_parallel_samples_and_no_less_than_one(
    input_tokens: int, steps: int, width: int, rng: Any
) -> None:
    parents = [[rng.randrange(width) for _ in range(width)] for _ in range(steps)]
    one, blocks = -(-(input_tokens + steps) // 16), beam_blocks(input_tokens, parents, 16)
    assert one <= blocks <= one + copied_blocks(input_tokens + steps, input_tokens, width, 16)


@pytest.mark.parametrize(("beams", "size"), [(2, 16), (4, 16), (6, 16), (8, 16), (6, 2), (4, 1)])
def test_the_beams_of_the_engine_hold_what_beams_of_random_descent_hold_in_the_mean(beams: int, size: int) -> None:
    rng = np.random.default_rng(0)
    steps = [120 + n for n in range(40)]
    drawn = [beam_blocks(100, rng.integers(0, beams, (count, beams)).tolist(), size) for count in steps]
    more = np.mean([blocks - -(-(100 + count) // size) for blocks, count in zip(drawn, steps, strict=True)])
    assert copied_blocks(260, 100, beams, size, beam_tail_blocks(beams, size)) == pytest.approx(more, rel=0.2, abs=0.5)


def test_beams_differ_in_their_last_block_only() -> None:
    """40 tokens, 3 beams: 2 shared blocks and 3 own; at 48 tokens one more is shared, and each begins another."""
    search = request(0, input_tokens=40, output_tokens=12, samples=3, beam_search=True)
    result = run(paper(), [search], plan=ONE, step_by_step=True)
    used = [row.used_blocks for row in result.rows.memory]
    assert (used[0], used[-1]) == (2 + 3, 3 + 3)
    independent = run(paper(), [replace(search, beam_search=False)], plan=ONE, step_by_step=True)
    assert independent.rows.memory[-1].used_blocks == 2 + 3 + 3
    assert result.rows.requests[0].finish_ps == independent.rows.requests[0].finish_ps  # as many sequences to compute


def test_a_long_beam_search_fits_where_as_many_samples_do_not() -> None:
    search = request(0, input_tokens=16, output_tokens=200, samples=4, beam_search=True)
    assert run(paper(num_kv_blocks=20), [search]).rows.requests[0].outcome == "completed"
    assert run(paper(num_kv_blocks=20), [replace(search, beam_search=False)]).rows.requests[0].outcome == "rejected"


def saving(kind: str, input_tokens: int, output_tokens: int, width: int) -> float:
    """Mean over a generation, looked at once a block; beams descend from parents drawn at random."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, width, width) if kind == "beam" else np.arange(width) for _ in range(output_tokens)]
    parents = [row.tolist() for row in drawn]
    return float(
        np.mean(
            [
                sharing_saving(beam_blocks(input_tokens, parents[:step], 16), input_tokens + step, width, 16)
                for step in range(1, output_tokens, 16)
            ]
        )
    )


def test_sosp_2023_figure_15_who_saves_more() -> None:
    """Alpaca (19 in, 58 out): parallel 6-10 %, beams 38-55 %; ShareGPT (161 in, 338 out): 16-31 % and 44-66 %."""
    for kind in ("parallel", "beam"):
        for lengths in ((19, 58), (161, 338)):
            shares = [saving(kind, *lengths, width) for width in (2, 4, 6)]
            assert shares == sorted(shares)
        assert saving(kind, 161, 338, 4) > saving(kind, 19, 58, 4)
    for lengths in ((19, 58), (161, 338)):
        assert saving("beam", *lengths, 4) > 1.5 * saving("parallel", *lengths, 4)


@pytest.mark.parametrize(
    ("name", "gib", "slots"), [("opt-13b", 12, 15_728), ("opt-66b", 21, 9_557), ("opt-175b", 264, 60_074)]
)
def test_sosp_2023_table_1_slots(name: str, gib: int, slots: int) -> None:
    """15.7K, 9.7K (its 21 GB are rounded: 9.6K) and 60.1K tokens of KV."""
    assert gib * 2**30 // model(name, "float16").kv_bytes_per_token() == slots
