"""Splitwise: pools, pauses and transfers. The invariants of its spec, and what its paper printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.profile.file import read_profile, shipped_profiles
from sim import SYSTEMS, Cluster, ConfigError, Problem, Request, Result, Workload
from sim.cost import Fitted
from sim.model import model
from sim.predictors import TrueLength
from tests.lab import spied
from tests.sim.systems.schedulers.test_vllm import traffic
from tests.toys import ToyCost, cluster, problem, request, run, with_limits

KV = 32768
"""Bytes of a token of the tiny model."""


def pools(prompt: int = 2, token: int = 2, **options: Any) -> Any:
    return SYSTEMS["splitwise"](prefill={"replicas": prompt, "tp": 1}, decode={"replicas": token, "tp": 1}, **options)


def machines(count: int = 4, gbps: float = 100) -> Problem:
    return problem(cluster(1, count, gbps))


def places(result: Result) -> list[tuple[str, str]]:
    return [(row.prefill_stage, row.decode_stage) for row in result.rows.requests]


def test_a_request_goes_from_a_prompt_to_a_token_machine() -> None:
    result = run(pools(), [request(0)], machines())
    assert places(result) == [("prefill0", "decode0")]
    assert result.rows.requests[0].bytes_moved == 100 * KV


# ------------------------------------------------------------ the cluster-level scheduler (section 4.1)


def test_at_low_load_the_mixed_pool_is_empty_and_ties_go_to_the_first() -> None:
    requests = [request(n, 1.0 * n) for n in range(10)]
    result = run(pools(), requests, machines())
    assert set(places(result)) == {("prefill0", "decode0")}
    again = run(pools(), requests, machines())
    assert result.log() == again.log()


def test_prompts_join_the_shortest_queue_of_pending_tokens() -> None:
    requests = [request(0, 0.0, 500), request(1, 0.001, 100), request(2, 0.002, 100), request(3, 0.003, 100)]
    result = run(pools(), requests, machines())
    assert [prefill for prefill, _ in places(result)] == ["prefill0", "prefill1", "prefill1", "prefill1"]


def test_tokens_go_where_the_least_kv_is_promised() -> None:
    requests = [
        request(0, 0.0, 300, 50),
        request(1, 0.001, 100, 50),
        request(2, 0.002, 100, 50),
        request(3, 0.003, 20, 5),
    ]
    result = run(pools(), requests, machines(), predictor=TrueLength())
    assert [decode for _, decode in places(result)] == ["decode0", "decode1", "decode1", "decode1"]


def test_a_full_prompt_pool_draws_a_token_machine_into_the_mixed_pool() -> None:
    """A queue of 1000 tokens per machine: the third prompt of 900 finds both full."""
    requests = [request(n, 0.0, 900, 5) for n in range(3)]
    result = run(pools(prompt_queue_tokens=1000), requests, machines())
    prefills = [prefill for prefill, _ in places(result)]
    assert prefills[:2] == ["prefill0", "prefill1"]
    assert prefills[2].startswith("decode")


def test_a_machine_returns_home_when_its_foreign_work_is_done() -> None:
    requests = [*(request(n, 0.0, 900, 5) for n in range(3)), *(request(10 + n, 5.0 + n, 100, 5) for n in range(3))]
    result = run(pools(prompt_queue_tokens=1000), requests, machines())
    assert set(places(result)[3:]) == {("prefill0", "decode0")}


def test_a_full_token_pool_draws_a_prompt_machine() -> None:
    requests = [request(n, 0.0, 100, 200) for n in range(3)]
    result = run(with_limits(pools(prompt=2, token=1), num_kv_blocks=40), requests, machines(3), predictor=TrueLength())
    decodes = [decode for _, decode in places(result)]
    assert decodes[:2] == ["decode0", "decode0"]
    assert decodes[2].startswith("prefill")


def test_without_a_pair_both_phases_run_on_one_machine() -> None:
    """One machine of each kind, both over their limits: the least loaded of all does everything, nothing moves."""
    requests = [request(n, 0.0, 300, 300) for n in range(6)]
    result = run(
        with_limits(pools(1, 1, prompt_queue_tokens=300), num_kv_blocks=40),
        requests,
        machines(2),
        predictor=TrueLength(),
    )
    assert all(row.outcome == "completed" for row in result.rows.requests)
    for row in result.rows.requests:
        assert (row.prefill_stage == row.decode_stage) == (row.bytes_moved == 0)
    assert any(prefill == decode for prefill, decode in places(result))


# ------------------------------------------------------------ the machine-level scheduler (section 4.2)


@settings(max_examples=60)
@given(
    requests=traffic(), seqs=st.sampled_from([3, 8, 512]), budget=st.sampled_from([120, 300, 2048]),
    blocks=st.sampled_from([30, 1000]), pauses=st.sampled_from([1, 4]),
)  # fmt: skip
def test_every_batch_keeps_to_the_rules(
    requests: list[Request], seqs: int, budget: int, blocks: int, pauses: int
) -> None:
    """Prompts whole; at most 2048 tokens unless one prompt; nobody is paused more often than allowed; FCFS."""
    spy, fills = spied(
        with_limits(
            pools(1, 2, max_pauses=pauses, prompt_queue_tokens=250), max_num_seqs=seqs, max_num_batched_tokens=budget,
            num_kv_blocks=blocks,
        )
    )  # fmt: skip
    result = run(spy, requests, machines(3), predictor=TrueLength(), step_by_step=True)
    paused: dict[int, int] = {}
    preempted = {row.request.id for row in result.rows.requests if row.preemptions}
    for fill in fills:
        for number in fill.left_out:
            paused[number] = paused.get(number, 0) + 1
        assert len(fill.chunks) + len(fill.decodes) <= max(seqs, len(fill.decodes))
        assert fill.tokens <= budget or len(fill.chunks) == 1 or not fill.chunks
        assert fill.admitted == [number for number in fill.waiting if number in fill.admitted]
        assert fill.admitted == fill.waiting[: len(fill.admitted)] or fill.preempted
    assert max((count for number, count in paused.items() if number not in preempted), default=0) <= pauses
    whole = {row.request.id: row.request.input_tokens for row in result.rows.requests}
    assert all(tokens == whole[n] for fill in fills for n, tokens in fill.chunks.items() if n not in preempted)


@settings(max_examples=30)
@given(requests=traffic(), transfer=st.sampled_from(["serial", "per-layer", "auto"]))
def test_bytes_that_leave_are_bytes_that_arrive(requests: list[Request], transfer: str) -> None:
    result = run(pools(1, 2, transfer=transfer, prompt_queue_tokens=250), requests, machines(3))
    assert sum(link.bytes for link in result.rows.links) == sum(row.bytes_moved for row in result.rows.requests)
    for row in result.rows.requests:
        moves = row.prefill_stage != row.decode_stage and row.request.output_tokens > 1
        assert row.bytes_moved == (row.request.input_tokens * KV if moves else 0) or row.preemptions


# ------------------------------------------------------------ transfers (section 4.3)


def visible_s(tokens: int, gbps: float = 10, **options: Any) -> float:
    result = run(pools(1, 1, **options), [request(0, 0.0, tokens)], machines(2, gbps))
    return float(result.columns["transfer_s"][0])


def test_serial_transfers_grow_with_the_prompt_and_layers_hide_them() -> None:
    """Figure 14: serial linear in the prompt, per-layer about constant and never more."""
    sizes = (500, 1000, 1500, 2000)
    serial = [visible_s(tokens, transfer="serial", sync_s=0.0) for tokens in sizes]
    layers = [visible_s(tokens, transfer="per-layer", sync_s=0.0) for tokens in sizes]
    assert np.allclose(np.diff(serial), 500 * KV / 1.25e9, rtol=1e-6)
    assert all(one <= two + 1e-9 for one, two in zip(layers, serial, strict=True))


def test_auto_is_serial_under_512_tokens_and_per_layer_from_there() -> None:
    for tokens, kind in ((511, "serial"), (512, "per-layer")):
        assert visible_s(tokens, transfer="auto") == visible_s(tokens, transfer=kind)
    assert visible_s(511, transfer="serial") != visible_s(511, transfer="per-layer")


def test_free_links_cost_a_second_token_nothing() -> None:
    free = Cluster.of(
        [{"gpu": "A100-80G-SXM", "count": 1, "nodes": 2, "nic_gbps": 1e12}], links={"inter_node": {"gbps": 1e12}}
    )
    split = run(pools(1, 1, transfer="serial", sync_s=0.0), [request(0)], problem(free))
    alone = run(SYSTEMS["vllm"](replicas=1, tp=1), [request(0)], problem(free))
    pcie_s = 100 * KV / 31.5e9  # the hop from card to GPU remains
    delay_ps = split.token_times_ps(0)[1] - alone.token_times_ps(0)[1]
    assert 0 < delay_ps <= 1.5 * pcie_s * 1e12
    assert split.token_times_ps(0)[0] == alone.token_times_ps(0)[0]


def test_the_token_pool_does_not_touch_first_tokens_at_low_load() -> None:
    requests = [request(n, 0.2 * n, 300, 20) for n in range(20)]
    firsts = [
        [row.first_token_ps for row in run(pools(1, token), requests, machines(4)).rows.requests] for token in (1, 2, 3)
    ]
    assert firsts[0] == firsts[1] == firsts[2]


def test_four_bits_send_less_and_cost_a_codec() -> None:
    """4.5 of 16 bits over a link of 1.25 GB/s, then the synchronisation as before, and the codec of 400 GB/s."""
    plain, few = (visible_s(500, transfer="serial", kv_bits=bits) for bits in (16, 4))
    codec_s = 2 * 500 * KV * (1 + 4.5 / 16) / 4e11
    assert plain - few == pytest.approx(500 * KV / 1.25e9 * (1 - 4.5 / 16) - codec_s, abs=1e-9)
    assert visible_s(2000, transfer="per-layer", kv_bits=4) < visible_s(2000, transfer="serial", kv_bits=4)


def test_the_authors_simulator_has_no_codec() -> None:
    with pytest.raises(ConfigError, match="leave out kv_bits or compat"):
        pools(compat="splitwise_sim", kv_bits=4)


def test_a_wrong_transfer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"system\.transfer is 'fast'; splitwise has auto, serial, per-layer"):
        pools(transfer="fast")


# ------------------------------------------------------------ what the paper prints


def dgx(gpu: str, count: int = 1) -> Problem:
    """Machines of eight GPUs with 200 (A100) or 400 (H100) Gbit/s a GPU, priced by the shipped profile."""
    profile = read_profile(shipped_profiles()["splitwise-2023"])
    gbps = 8 * (400 if gpu.startswith("H100") else 200)
    return Problem(
        cluster=Cluster.of(
            [{"gpu": gpu, "count": 8, "nodes": count, "nic_gbps": gbps}],
            links={"inter_node": {"gbps": gbps, "latency_us": 5}},
        ),
        model=model("llama-2-70b", "float16"),
        cost=Fitted(profiles=[profile]),
        workload=Workload(rate_per_s=1.0, lengths=((1020, 129),)),
    )


def lone(where: Problem, requests: Sequence[Request], system: Any) -> Result:
    return run(system, requests, where)


ALONE = {"replicas": 1, "tp": 8}


@pytest.mark.parametrize(
    ("gpu", "tokens", "output", "ttft_ms", "tbt_ms"),
    [
        ("A100-80G-SXM", 1020, 129, 155, 40),
        ("H100-SXM", 1020, 129, 84, 28),
        ("A100-80G-SXM", 1500, 13, 185, 52),
        ("H100-SXM", 1500, 13, 95, 31),
    ],
)
def test_table_4_unbatched_latencies(gpu: str, tokens: int, output: int, ttft_ms: float, tbt_ms: float) -> None:
    """Llama2-70B, medians of coding (1500 in, 13 out) and conversation (1020, 129), one request at a time."""
    result = lone(dgx(gpu), [request(0, 0.0, tokens, output)], SYSTEMS["vllm"](**ALONE))
    assert result.columns["ttft_s"][0] * 1000 == pytest.approx(ttft_ms, rel=0.2)
    assert result.columns["tpot_s"][0] * 1000 == pytest.approx(tbt_ms, rel=0.2)


def test_figure_5b_a_batch_of_64_doubles_the_time_between_tokens() -> None:
    """ "2x batch 1" is BLOOM's; the profile's Llama2-70B on A100 gives 71.6 / 45 ms = 1.6."""
    gaps = []
    for batch in (1, 64):
        requests = [request(n, 0.0, 512, 40) for n in range(batch)]
        result = lone(
            dgx("A100-80G-SXM"), requests, with_limits(SYSTEMS["vllm"](**ALONE), max_num_batched_tokens=65536)
        )
        gaps.append(float(np.median(result.itl_s())))
    assert gaps[0] == pytest.approx(0.045, rel=0.05)
    assert 1.4 < gaps[1] / gaps[0] < 2.2


def test_figure_14_visible_transfer_is_under_7_percent_of_the_prompt() -> None:
    """About 8 ms on A100, 5 ms on H100 with per-layer transfer."""
    for gpu, sync_ms in (("A100-80G-SXM", 8), ("H100-SXM", 5)):
        system = SYSTEMS["splitwise"](prefill=ALONE, decode=ALONE, transfer="per-layer")
        result = lone(dgx(gpu, 2), [request(0, 0.0, 1500, 13)], system)
        visible = float(result.columns["transfer_s"][0])
        assert visible * 1000 == pytest.approx(sync_ms, abs=1.5)
        assert visible < 0.07 * float(result.columns["prefill_s"][0])


def test_figure_15_what_splitting_costs_one_request() -> None:
    """Coding, two machines: E2E +0.8 % (serial up to +3 %); second token +16.5 % (serial +64 %)."""
    one = [request(0, 0.0, 1500, 13)]
    base = lone(dgx("H100-SXM", 2), one, SYSTEMS["vllm"](**ALONE))
    extra = {}
    for kind in ("per-layer", "serial"):
        split = lone(dgx("H100-SXM", 2), one, SYSTEMS["splitwise"](prefill=ALONE, decode=ALONE, transfer=kind))
        e2e = split.columns["e2e_s"][0] / base.columns["e2e_s"][0] - 1
        gaps = [np.diff(result.token_times_ps(0))[0] for result in (split, base)]
        extra[kind] = (e2e, gaps[0] / gaps[1] - 1)
    assert 0 < extra["per-layer"][0] < extra["serial"][0] < 0.04
    assert 0.1 < extra["per-layer"][1] < extra["serial"][1] < 0.7


def test_splitting_keeps_prompts_out_of_the_way_of_tokens() -> None:
    """Section 2 and figure 16: under load, the longest time between tokens is smaller than where phases mix."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.05, 150))
    requests = [request(n, float(at), int(rng.integers(500, 2000)), 30) for n, at in enumerate(arrivals)]
    flat = ToyCost(per_context_ps=0, per_pair_ps=0)
    where = problem(cluster(1, 2), flat)
    split = run(pools(1, 1), requests, where)
    mixed = run(with_limits(SYSTEMS["vllm"](replicas=2, tp=1, mode="v0"), max_num_batched_tokens=2048), requests, where)
    assert np.percentile(mixed.itl_s(), 99) > 1.5 * np.percentile(split.itl_s(), 99)
