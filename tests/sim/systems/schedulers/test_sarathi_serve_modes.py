"""Sarathi-Serve's ablations, dynamic chunks, and the budget that keeps a bound on the time between tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import SYSTEMS, Cluster, ConfigError, Problem, Request, Workload, simulate
from sim.batchers import ChunkSchedule, token_budget_for
from sim.cost import Roofline
from sim.model import model
from sim.types import Work
from tests.lab import ONE, Fill, longest_gap_s, spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import Requests, ToyCost, problem, request, run, with_limits


def serve(**options: Any) -> Any:
    return SYSTEMS["sarathi-serve"](replicas=1, tp=1, **options)


def watched(system: Any, requests: list[Request], **more: Any) -> list[Fill]:
    lab, fills = spied(system)
    run(lab, requests, plan=ONE, step_by_step=True, **more)
    return fills


def test_chunked_only_takes_turns() -> None:
    requests = [request(0, input_tokens=30, output_tokens=9), request(1, 0.001, input_tokens=100, output_tokens=3)]
    fills = watched(serve(mode="chunked-only", token_budget=32), requests)
    assert [(fill.chunks, fill.decodes) for fill in fills[:9]] == [
        ({0: 30}, []), ({}, [0]), ({1: 32}, []), ({}, [0]), ({1: 32}, []), ({}, [0]), ({1: 32}, []), ({}, [0]),
        ({1: 4}, []),
    ]  # fmt: skip


@settings(max_examples=30)
@given(traffic(), st.sampled_from([16, 64]))
def test_chunked_only_batches_are_of_one_kind_and_in_turn(requests: list[Request], budget: int) -> None:
    """Two batches of chunks follow each other only while nobody decodes."""
    fills = watched(serve(mode="chunked-only", token_budget=budget), requests)
    computed = dict.fromkeys(range(len(requests)), 0)
    decoded = dict.fromkeys(range(len(requests)), 0)
    before: Fill | None = None
    for fill in fills:
        decoding = [
            one.id for one in requests
            if computed[one.id] == one.input_tokens and decoded[one.id] < one.output_tokens - 1
        ]  # fmt: skip
        assert not (fill.chunks and fill.decodes)
        assert sum(fill.chunks.values()) <= budget
        assert sorted(fill.decodes) in ([], decoding)
        assert not (before and before.chunks and fill.chunks and decoding)
        for number, tokens in fill.chunks.items():
            computed[number] += tokens
        for number in fill.decodes:
            decoded[number] += 1
        before = fill


@settings(max_examples=30)
@given(traffic(), st.sampled_from([24, 80]))
def test_hybrid_only_never_cuts_a_prompt(requests: list[Request], blocks: int) -> None:
    fills = watched(with_limits(serve(mode="hybrid-only"), num_kv_blocks=blocks), requests)
    first: dict[int, int] = {}
    for fill in fills:
        for number, tokens in fill.chunks.items():
            first.setdefault(number, tokens)
    assert all(tokens == requests[number].input_tokens for number, tokens in first.items())


def test_hybrid_only_is_an_infinite_budget() -> None:
    requests = [request(n, 0.01 * n, 50 * n + 1, 20) for n in range(9)]
    assert run(serve(mode="hybrid-only"), requests).log() == run(serve(token_budget=10**6), requests).log()


# ------------------------------------------------------------ dynamic chunks


SCHEDULE = {"high_tokens": 256, "low_tokens": 64, "stages": 4, "max_tokens": 400}


def test_chunks_shrink_as_a_prompt_proceeds() -> None:
    """Stages of 100 tokens with 256, 192, 128 and 64: the code's even spacing."""
    schedule = ChunkSchedule(**SCHEDULE)
    assert [schedule.budget(done) for done in (0, 99, 100, 200, 300, 399, 4000)] == [256, 256, 192, 128, 64, 64, 64]
    fills = watched(serve(dynamic_chunks=SCHEDULE), [request(0, input_tokens=600, output_tokens=1)])
    assert [fill.chunks[0] for fill in fills] == [256, 128, 64, 64, 64, 24]


def test_a_schedule_of_one_stage_is_a_budget() -> None:
    plain = {"high_tokens": 96, "low_tokens": 96, "stages": 1, "max_tokens": 500}
    requests = [request(n, 0.01 * n, 50 * n + 1, 20) for n in range(9)]
    assert run(serve(dynamic_chunks=plain), requests).log() == run(serve(token_budget=96), requests).log()


def test_stage_sizes_are_rounded_to_32() -> None:
    schedule = ChunkSchedule(high_tokens=256, low_tokens=32, stages=4, max_tokens=4)
    assert [schedule.budget(done) for done in range(4)] == [256, 192, 96, 32]  # 181.3 and 106.7


# ------------------------------------------------------------ the budget


def linear(work: Work) -> float:
    return 0.01 + 1e-4 * work.tokens + 1e-7 * work.decode_context


def test_the_budget_is_the_most_tokens_in_time() -> None:
    """10 decodes behind 999 tokens: 0.011 s + 0.1 ms a token; 0.1 s are 890 tokens, 6 tiles of 128."""
    assert token_budget_for(linear, 0.1, 10, 999) == 768
    assert token_budget_for(linear, 0.011 + 0.0896, 10, 999) == 896
    assert token_budget_for(linear, 0.1, 10, 999, tile=1) == 890
    assert token_budget_for(linear, 100.0, 10, 999) == 65536
    assert token_budget_for(linear, 0.05, 128, 999) == 256  # a whole tile of decodes, and one for chunks


def test_a_bound_that_decodes_alone_exceed_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"system\.tbt_s is 0\.02; 10 decodes behind 999 tokens and a chunk of 118 take"
    ):
        token_budget_for(linear, 0.02, 10, 999)


def test_the_bound_holds() -> None:
    """Ten decodes at most; 10 ms, 0.1 ms a token and 41 us for contexts: 7 tiles fit; no gap exceeds 100 ms."""
    requests = [request(n, 0.02 * n, 300 + 37 * n % 900, 40) for n in range(60)]
    where = problem(cost=ToyCost(per_token_ps=10**8, per_pair_ps=0))
    system = with_limits(serve(tbt_s=0.1), max_num_seqs=10, num_kv_blocks=4000)
    fills = watched(system, requests, where=where)
    assert max(fill.tokens for fill in fills) == 896
    result = run(system, requests, where, plan=ONE)
    gaps = [longest_gap_s(result.token_times_ps(one.id)) for one in requests]
    assert 0.07 < max(gaps) <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, r"system\.mode is 'both'; sarathi-serve has stall-free, chunked-only, hybrid-only"),
        ({"tbt_s": 0.0}, r"system\.tbt_s is 0\.0; it must be a number > 0"),
        ({"tbt_s": 0.1, "token_budget": 512}, "exclude each other"),
        ({"tbt_s": 0.1, "mode": "hybrid-only"}, "hybrid-only has none of them"),
        ({"token_budget": 512, "dynamic_chunks": SCHEDULE}, "exclude each other"),
        ({"dynamic_chunks": {"high_tokens": 64}}, "dynamic_chunks has high_tokens; it needs high_tokens, low_tokens"),
        ({"dynamic_chunks": {**SCHEDULE, "low_tokens": 65}}, r"dynamic_chunks: high_tokens 256 and low_tokens 65 must"),
        ({"dynamic_chunks": {**SCHEDULE, "stages": 0}}, r"dynamic_chunks: stages is 0, max_tokens 400"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(**options)


# ------------------------------------------------------------ what the paper printed


def sharegpt4(count: int, rate_per_s: float) -> list[Request]:
    """Prompts of median 1730 and P90 5696, outputs of 415 and 834 (table 2)."""
    rng = np.random.default_rng(0)
    columns = [
        np.clip(rng.lognormal(np.log(median), np.log(p90 / median) / 1.2816, count), 4, most).astype(int)
        for median, p90, most in ((1730, 5696, 6144), (415, 834, 2048))
    ]
    at_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    return [request(n, float(at_s[n]), int(columns[0][n]), int(columns[1][n])) for n in range(count)]


def test_osdi_2024_table_4_what_each_half_is_good_for() -> None:
    """Yi-34B TP2, 128 requests, budget 1024: median TTFT/P99 TBT of hybrid .53/.68, chunked 1.04/.17, both .76/.14."""
    where = Problem(
        cluster=Cluster.of(nodes=[{"gpu": "A100-80G-SXM", "count": 2}]),
        model=replace(model("yi-34b"), max_position_embeddings=16384),
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((1730, 415),)),
    )
    ttft_s, tbt_s = {}, {}
    for mode in ("hybrid-only", "chunked-only", "stall-free"):
        budget = {} if mode == "hybrid-only" else {"token_budget": 1024}
        system = with_limits(SYSTEMS["sarathi-serve"](mode=mode, replicas=1, tp=2, **budget), num_kv_blocks=8000)
        result = simulate(where, system, Requests(sharegpt4(128, 1.0)))
        ttft_s[mode] = float(np.median(result.columns["ttft_s"]))
        tbt_s[mode] = float(np.percentile(result.itl_s(), 99))
    assert ttft_s["hybrid-only"] < ttft_s["stall-free"] < ttft_s["chunked-only"]
    assert tbt_s["stall-free"] < tbt_s["chunked-only"] < tbt_s["hybrid-only"]
    assert tbt_s["hybrid-only"] / tbt_s["stall-free"] > 2.5
