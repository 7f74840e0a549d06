"""Sarathi-Serve: stall-free batches. The invariants of its spec, and the directions its paper shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ConfigError, Request, Result
from tests.lab import Fill, longest_gap_s, retell, spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import MS, ToyCost, cluster, problem, request, run, with_limits

US = 10**6


def watched(
    token_budget: int, requests: Sequence[Request], cost: ToyCost | None = None, **limits: Any
) -> tuple[Result, list[Fill]]:
    spy, fills = spied(with_limits(SYSTEMS["sarathi-serve"](token_budget=token_budget, replicas=1, tp=1), **limits))
    return run(spy, requests, problem(cluster(1), cost), step_by_step=True), fills


def test_chunks_fill_what_the_decodes_leave_of_the_budget() -> None:
    """Algorithm 3: c = min(remaining, tau - n)."""
    _, fills = watched(64, [request(0, 0.0, 10, 5), request(1, 0.001, 100, 1), request(2, 0.001, 40, 1)])
    assert [(fill.chunks, fill.decodes) for fill in fills[:4]] == [
        ({0: 10}, []),
        ({1: 63}, [0]),
        ({1: 37, 2: 26}, [0]),
        ({2: 14}, [0]),
    ]


def test_a_wrong_budget_is_named() -> None:
    with pytest.raises(ConfigError, match=r"system\.token_budget is 0; it must be a whole number >= 1"):
        SYSTEMS["sarathi-serve"](token_budget=0)


# ------------------------------------------------------------ invariants (spec, section 7)


@settings(max_examples=80)
@given(
    requests=traffic(), budget=st.sampled_from([8, 64, 512]), blocks=st.sampled_from([20, 40, 1000]),
    seqs=st.sampled_from([2, 128]),
)  # fmt: skip
def test_every_batch_keeps_to_the_rules(requests: list[Request], budget: int, blocks: int, seqs: int) -> None:
    """Tokens <= max(tau, decodes); chunks add up to the prompt; no running decode is ever left out."""
    result, fills = watched(budget, requests, num_kv_blocks=blocks, max_num_seqs=seqs)
    served = [row.request for row in result.rows.requests if row.outcome == "completed"]
    for fill, state in retell(fills, served, steady=True):
        assert fill.tokens <= max(budget, len(fill.decodes))
        assert not fill.left_out
        assert fill.num_running == sum(one.running for one in state.values()) <= seqs
        held = sum(-(-max(one.target, one.computed) // 16) for one in state.values() if one.running)
        assert fill.total_blocks - fill.free_blocks == held  # the whole prompt's, from admission on
    if blocks == 1000:
        assert not any(fill.preempted for fill in fills)


@settings(max_examples=25)
@given(requests=traffic(), budget=st.sampled_from([16, 64, 256]))
def test_no_iteration_takes_longer_than_a_full_budget(requests: list[Request], budget: int) -> None:
    """T(tau), on costs that know tokens only; so no decode waits longer for its next token."""
    flat = ToyCost(per_context_ps=0, per_pair_ps=0)
    result, _ = watched(budget, requests, flat, max_num_seqs=budget)
    longest_ps = 10 * MS + 10 * US * budget
    assert all(step.end_ps - step.start_ps <= longest_ps for step in result.rows.steps)
    gaps = [longest_gap_s(result.token_times_ps(r.id)) for r in requests if r.output_tokens > 1]
    assert max(gaps, default=0.0) <= longest_ps / 1e12


@settings(max_examples=25)
@given(gaps=st.lists(st.integers(0, 30), min_size=1, max_size=20), blocks=st.sampled_from([20, 60]))
def test_equal_prompts_are_served_in_order_of_arrival(gaps: list[int], blocks: int) -> None:
    arrivals = np.cumsum(gaps) / 1000
    result, _ = watched(64, [request(n, float(at), 90, 30) for n, at in enumerate(arrivals)], num_kv_blocks=blocks)
    firsts = [row.first_token_ps for row in result.rows.requests]
    assert firsts == sorted(firsts)


@given(requests=traffic())
def test_an_infinite_budget_removes_chunking(requests: list[Request]) -> None:
    result, fills = watched(10**9, requests)
    chunks = [item for fill in fills for item in fill.chunks.items()]
    assert sorted(chunks) == sorted((r.id, r.input_tokens) for r in requests)
    assert all(row.preemptions == 0 for row in result.rows.requests)


def test_one_request_at_a_time_in_one_chunk_is_plain_iteration_level_scheduling() -> None:
    requests = [request(n, 2.0 * n, 300, 20) for n in range(4)]
    sarathi, _ = watched(512, requests)
    other = run(
        with_limits(SYSTEMS["vllm"](replicas=1, tp=1, mode="v0"), max_num_batched_tokens=512),
        requests,
        problem(cluster(1)),
    )
    assert sarathi.log() == other.log()


def test_decodes_beyond_the_budget_starve_prompts_and_nobody_else() -> None:
    """Section 5 of the spec: with as many decodes as budget, no prompt is computed until some end."""
    first = [request(n, 0.0, 1, 30) for n in range(8)]
    result, fills = watched(8, [*first, request(9, 0.02, 5, 2)])
    assert result.rows.requests[8].scheduled_ps == result.rows.requests[0].finish_ps
    assert all(fill.tokens <= 8 for fill in fills)


# ------------------------------------------------------------ directions


def test_a_larger_budget_gives_earlier_first_tokens_and_longer_gaps() -> None:
    """OSDI 2024, sections 4.3 and 5.4: TTFT falls or stays, P99 TBT rises."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(0.25, 80))
    requests = [request(n, float(at), int(rng.integers(200, 3000)), 60) for n, at in enumerate(arrivals)]
    ttft, tbt = [], []
    for budget in (128, 256, 512, 1024, 2048):
        result, _ = watched(budget, requests)
        ttft.append(float(np.median(result.columns["ttft_s"])))
        tbt.append(float(np.percentile(result.itl_s(), 99)))
    assert ttft == sorted(ttft, reverse=True)
    assert tbt == sorted(tbt)
    assert ttft[0] > 1.5 * ttft[-1]
    assert tbt[-1] > 1.5 * tbt[0]


def test_it_has_no_generation_stalls_where_v0_has() -> None:
    """OSDI 2024, figures 1 and 7: while prompts of 3,000 tokens come in, decodes go on at the pace of the budget."""
    requests = [request(0, 0.0, 10, 200), *(request(1 + n, 0.2 + 0.1 * n, 3000, 5) for n in range(10))]
    sarathi, _ = watched(256, requests)
    v0 = run(
        with_limits(SYSTEMS["vllm"](replicas=1, tp=1, mode="v0"), max_num_batched_tokens=4096),
        requests,
        problem(cluster(1)),
    )
    stall = longest_gap_s(v0.token_times_ps(0))
    assert longest_gap_s(sarathi.token_times_ps(0)) < 0.02 < 0.04 < stall
    assert np.median(sarathi.columns["ttft_s"][1:]) >= np.median(v0.columns["ttft_s"][1:])  # what it costs


def test_uniform_batches_leave_smaller_bubbles() -> None:
    """OSDI 2024, section 3.3 and 5.3: a smaller budget makes micro-batches more alike, so stages idle less."""
    rng = np.random.default_rng(1)
    requests = [request(n, 0.0, int(rng.integers(100, 3000)), 20) for n in range(30)]
    cost = ToyCost(base_ps=MS // 10, per_context_ps=0, per_pair_ps=0)
    idle = []
    for budget in (128, 512, 4096):
        system = SYSTEMS["sarathi-serve"](token_budget=budget, replicas=1, tp=1, pp=2)
        result = run(system, requests, problem(cluster(2), cost))
        busy = sum(result.rows.replicas[0].stage_busy_s)
        idle.append(1 - busy / (2 * result.makespan_s))
    assert idle == sorted(idle)
    assert idle[-1] > 2 * idle[0]
