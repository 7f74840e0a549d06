"""vLLM, V0 and V1: the invariants of its spec, over random traffic, and what its paper printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, ConfigError, Request, Result, System
from tests.lab import Fill, retell, spied
from tests.toys import MS, cluster, problem, request, run, with_limits


def test_v1_runs_a_request() -> None:
    result = run(SYSTEMS["vllm"](replicas=1, tp=1), [request(0)])
    assert result.rows.requests[0].outcome == "completed"
    assert result.mirrors == "vLLM 0.20 (V1 scheduler)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "v2"}, "system.mode is 'v2'; vllm has"),
        ({"mode": "v1", "preemption": "swap"}, "system.preemption is 'swap'; vllm v1 has recompute"),
        ({"mode": "v0", "preemption": "drop"}, "system.preemption is 'drop'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["vllm"](**options)


# ------------------------------------------------------------ invariants (spec, section 7)


@st.composite
def traffic(draw: st.DrawFn) -> list[Request]:
    count = draw(st.integers(1, 25))
    gap = draw(st.sampled_from([0.0, 0.01, 0.1]))
    shapes = draw(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=count, max_size=count))
    return [request(n, round(gap * n, 3), tokens, out) for n, (tokens, out) in enumerate(shapes)]


MODES = {
    "v0": {"mode": "v0"},
    "v0 swap": {"mode": "v0", "preemption": "swap"},
    "v1": {},
    "v1 capped": {"long_prefill_token_threshold": 48},
    "v1 unchunked": {"chunked_prefill": False},
}


def watched(system: System, requests: Sequence[Request], **limits: Any) -> tuple[Result, list[Fill]]:
    spy, fills = spied(with_limits(system, **limits))
    return run(spy, requests, problem(cluster(1)), step_by_step=True), fills


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40)
@given(
    requests=traffic(), blocks=st.sampled_from([20, 40, 1000]), seqs=st.sampled_from([2, 9, 256]),
    budget=st.sampled_from([260, 2048]),
)  # fmt: skip
def test_every_batch_keeps_to_the_rules(
    mode: str, requests: list[Request], blocks: int, seqs: int, budget: int
) -> None:
    """Chunks add up, tokens survive preemption, blocks are those the tokens need, limits hold, phases do not mix."""
    system = SYSTEMS["vllm"](replicas=1, tp=1, **MODES[mode])
    result, fills = watched(system, requests, num_kv_blocks=blocks, max_num_seqs=seqs, max_num_batched_tokens=budget)
    served = [row.request for row in result.rows.requests if row.outcome == "completed"]
    assert {row.outcome for row in result.rows.requests} <= {"completed", "rejected"}
    swap = mode == "v0 swap"
    for fill, state in retell(fills, served, swap=swap):
        running = [one for one in state.values() if one.running]
        assert fill.num_running == len(running) <= seqs
        assert fill.total_blocks - fill.free_blocks == sum(-(-one.computed // 16) for one in running)
        if mode.startswith("v0"):
            assert not (fill.chunks and fill.decodes)
            assert sum(fill.chunks.values()) <= budget or len(fill.chunks) == 1
            assert not fill.left_out
        else:
            assert fill.tokens <= budget
        if mode.startswith("v1"):
            assert not (fill.preempted and fill.admitted)
        if mode == "v1 capped":
            assert max(fill.chunks.values(), default=0) <= 48
    if blocks == 1000:
        assert not any(fill.preempted for fill in fills)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15)
@given(gaps=st.lists(st.integers(0, 30), min_size=1, max_size=20), blocks=st.sampled_from([20, 60]))
def test_equal_prompts_are_served_in_order_of_arrival(mode: str, gaps: list[int], blocks: int) -> None:
    arrivals = np.cumsum(gaps) / 1000
    requests = [request(n, float(at), 90, 30) for n, at in enumerate(arrivals)]
    result, _ = watched(SYSTEMS["vllm"](replicas=1, tp=1, **MODES[mode]), requests, num_kv_blocks=blocks)
    firsts = [row.first_token_ps for row in result.rows.requests]
    assert firsts == sorted(firsts)


@given(tokens=st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_v1_with_budget_for_all_prompts_and_no_decodes_is_v0(tokens: list[int]) -> None:
    requests = [request(n, 0.004 * n, count, 1) for n, count in enumerate(tokens)]
    logs = [
        watched(SYSTEMS["vllm"](replicas=1, tp=1, mode=mode), requests, max_num_batched_tokens=4096)[0].log()
        for mode in ("v0", "v1")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("mode", MODES)
def test_more_memory_is_never_slower_under_overload(mode: str) -> None:
    requests = [request(n, 0.0, 100, 100) for n in range(40)]
    ends = [
        watched(SYSTEMS["vllm"](replicas=1, tp=1, **MODES[mode]), requests, num_kv_blocks=blocks)[0].makespan_s
        for blocks in (30, 80, 200, 700)
    ]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > 2 * ends[-1]


def test_the_youngest_is_preempted_and_the_oldest_always_progresses() -> None:
    """LIFO: however short the memory, the oldest request runs as if it were alone with its batch."""
    requests = [request(n, 0.0, 30, 100) for n in range(6)]
    result, fills = watched(SYSTEMS["vllm"](replicas=1, tp=1), requests, num_kv_blocks=15)
    assert result.rows.requests[0].preemptions == 0
    assert [row.finish_ps for row in result.rows.requests] == sorted(row.finish_ps or 0 for row in result.rows.requests)
    for fill, state in retell(fills, requests):
        for number in fill.preempted:
            elders = [n for n, one in state.items() if n < number and one.generated < one.output]
            assert all(state[n].running for n in elders if n not in fill.preempted)


# ------------------------------------------------------------ what the papers print


def test_generation_stalls_of_v0() -> None:
    """Sarathi-Serve, figure 1: V0 stops every decode for as long as a prompt takes; the new prompt waits little."""
    requests = [request(0, 0.0, 10, 60), *(request(1 + n, 0.1 + 0.05 * n, 4000, 2) for n in range(3))]
    result, _ = watched(SYSTEMS["vllm"](replicas=1, tp=1, mode="v0"), requests, max_num_batched_tokens=4096)
    gaps = np.diff(result.token_times_ps(0))
    assert gaps.max() >= 50 * MS  # 10 ms and 4,000 tokens
    chunked, _ = watched(SYSTEMS["vllm"](replicas=1, tp=1), requests, max_num_batched_tokens=256)
    assert np.diff(chunked.token_times_ps(0)).max() < 20 * MS


def test_sosp_2023_figure_2_share_of_kv_memory_that_holds_tokens() -> None:
    """vLLM 96.3 %, Orca at most 38.2 %: less than a block a sequence is empty (ShareGPT: 161 tokens in, 338 out)."""
    rng = np.random.default_rng(0)
    shapes = zip(rng.exponential(161, 300).astype(int) + 1, rng.exponential(338, 300).astype(int) + 1, strict=True)
    requests = [request(n, 0.1 * n, min(int(i), 1024), min(int(o), 1024)) for n, (i, o) in enumerate(shapes)]
    _, fills = watched(SYSTEMS["vllm"](replicas=1, tp=1, mode="v0"), requests)
    tokens = slots = 0
    for fill, state in retell(fills, requests):
        tokens += sum(one.computed for one in state.values() if one.running)
        slots += 16 * (fill.total_blocks - fill.free_blocks)
    assert 0.96 < tokens / slots < 1


def test_a_split_vllm_pulls_the_prompts_kv() -> None:
    options: dict[str, Any] = {"prefill": {"replicas": 1, "tp": 1}, "decode": {"replicas": 1, "tp": 1}}
    result = run(SYSTEMS["vllm"](**options), [request(0)], problem(cluster(1, 2)))
    row = result.rows.requests[0]
    assert (row.prefill_stage, row.decode_stage) == ("prefill0", "decode0")
    assert row.bytes_moved == 100 * 32768
    assert row.transfer_ps > 2 * 10 * 10**6  # two latencies: it asks, then it gets
