"""Orca as vLLM's paper rebuilt it: reservations, whole prompts beside decodes, and what that costs in batch size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import SYSTEMS, Cluster, ConfigError, Limits, Problem, Request, Result, Workload, simulate
from sim.batchers import IterationLevel, reserved_tokens
from sim.batchers.reserving import RESERVES
from sim.cost import Roofline
from sim.model import model
from sim.predictors import ConstantLength
from tests.lab import ONE, spied
from tests.toys import Requests, request, run, with_limits


def orca(reserve: str = "max", **limits: Any) -> Any:
    return with_limits(SYSTEMS["orca"](reserve=reserve, replicas=1, tp=1), **limits)


def peak_blocks(result: Result) -> int:
    return max(row.used_blocks for row in result.rows.memory)


def test_a_whole_context_is_reserved_for_every_request() -> None:
    """2048 tokens are 128 blocks of 16; of 300 blocks only two requests have theirs."""
    result = run(orca(num_kv_blocks=300), [request(n) for n in range(3)])
    first = [row.scheduled_ps for row in result.rows.requests]
    assert peak_blocks(result) == 256
    assert first == [0, 0, result.rows.requests[0].finish_ps]


def test_what_is_reserved() -> None:
    assert [reserved_tokens(reserve, 100, 25, 2048) for reserve in RESERVES] == [2048, 132, 125]
    assert [reserved_tokens("pow2", 0, output, 2048) for output in (1, 2, 3, 32, 33)] == [1, 2, 4, 32, 64]
    assert reserved_tokens("pow2", 1500, 520, 2048) == 2048


@pytest.mark.parametrize(("reserve", "blocks"), [("max", 2048), ("pow2", 256), ("oracle", 128)])
def test_a_buddy_allocator_hands_out_powers_of_two(reserve: str, blocks: int) -> None:
    """100 in, 25 out, slots of one token: 132 and 125 tokens live in regions of 256 and 128."""
    result = run(orca(reserve, block_size=1, num_kv_blocks=4096), [request(0, output_tokens=25)])
    assert {row.used_blocks for row in result.rows.memory} == {blocks}


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 8, 16]))
def test_who_knows_more_reserves_less(input_tokens: int, output_tokens: int, size: int) -> None:
    view: Any = SimpleNamespace(input_tokens=input_tokens, predicted_output_tokens=output_tokens)
    regions = [IterationLevel(reserve).region_blocks(view, Limits(block_size=size)) for reserve in RESERVES]
    assert regions == sorted(regions, reverse=True)
    assert regions[2] * size >= min(2048, input_tokens + output_tokens)


def test_whole_prompts_run_beside_decodes() -> None:
    lab, fills = spied(orca(num_kv_blocks=1000))
    run(lab, [request(0), request(1, 0.011), request(2, 0.011, input_tokens=1900)], step_by_step=True)
    assert [(fill.chunks, fill.decodes) for fill in fills[:3]] == [
        ({0: 100}, []),
        ({1: 100, 2: 1900}, [0]),
        ({}, [0, 1, 2]),
    ]


def test_max_num_seqs_is_the_largest_batch() -> None:
    lab, fills = spied(orca("oracle", max_num_seqs=3))
    run(lab, [request(n) for n in range(7)], step_by_step=True)
    assert max(fill.num_running for fill in fills) == 3


def test_pow2_and_oracle_are_told_the_truth_unless_a_predictor_is_given() -> None:
    """100 + 25 tokens: 8 blocks; who believes in 300 reserves 32, who believes in 1 grows from 8."""
    for predictor, blocks in ((None, 8), (ConstantLength(300), 32), (ConstantLength(1), 8)):
        assert peak_blocks(run(orca("oracle"), [request(0, output_tokens=25)], predictor=predictor)) == blocks


def test_a_region_predicted_too_short_grows_and_the_latest_is_recomputed() -> None:
    requests = [request(n, output_tokens=150) for n in range(3)]
    honest = run(orca("oracle", num_kv_blocks=26), requests)
    deceived = run(orca("oracle", num_kv_blocks=26), requests, predictor=ConstantLength(1))
    assert [row.preemptions for row in honest.rows.requests] == [0, 0, 0]
    assert [row.preemptions > 0 for row in deceived.rows.requests] == [False, True, True]
    assert {row.outcome for row in deceived.rows.requests} == {"completed"}


@pytest.mark.parametrize(
    ("what", "limits", "reason"),
    [
        ({"input_tokens": 2040}, {}, "2050 tokens exceed system.engine.max_model_len, 2048"),
        ({"input_tokens": 200}, {"num_kv_blocks": 100}, "a: a region of 128 blocks is reserved for it; there are 100"),
        ({"samples": 2}, {}, "a: 2 samples: this scheduler has one a request"),
    ],
)
def test_what_never_fits_is_refused(what: dict[str, int], limits: dict[str, int], reason: str) -> None:
    row = run(orca(**limits), [request(0, **what)], plan=ONE).rows.requests[0]  # type: ignore[arg-type]
    assert row.outcome == "rejected"
    assert row.reason.startswith(reason)


def test_a_wrong_reservation_is_named() -> None:
    with pytest.raises(ConfigError, match=r"system\.reserve is 'min'; orca has max, pow2, oracle"):
        SYSTEMS["orca"](reserve="min")


# ------------------------------------------------------------ what vLLM's paper measured

SLOTS = 15728
"""Tokens that 12 GiB hold of OPT-13B's KV (table 1)."""


def sharegpt(count: int, rate_per_s: float) -> list[Request]:
    """Lengths about those of the paper's ShareGPT: 161 in, 338 out."""
    rng = np.random.default_rng(0)
    at_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    tokens = [np.clip(rng.lognormal(np.log(mean) - 0.5, 1, count), 1, 1023).astype(int) for mean in (161, 338)]
    return [request(n, float(at_s[n]), int(tokens[0][n]), int(tokens[1][n])) for n in range(count)]


def opt_13b() -> Problem:
    """On one A100-40G, with 30 ms of the engine's own a step, as was usual in 2023."""
    return Problem(
        cluster=Cluster.of(nodes=[{"gpu": "A100-40G-SXM", "count": 1}]),
        model=model("opt-13b"),
        cost=Roofline(overhead_s=0.03),
        workload=Workload(rate_per_s=1.0, lengths=((161, 338),)),
    )


def served(name: str, requests: list[Request], **options: Any) -> Result:
    size = 16 if name == "vllm" else 1
    system = SYSTEMS[name](replicas=1, tp=1, **options)
    limited = with_limits(system, block_size=size, num_kv_blocks=SLOTS // size, max_model_len=2048)
    return simulate(opt_13b(), limited, Requests(requests))


def mean_batch(result: Result) -> float:
    spans = [(row.end_ps - row.start_ps, row.decode_seqs) for row in result.rows.steps]
    return sum(span * seqs for span, seqs in spans) / sum(span for span, _ in spans)


def test_sosp_2023_figure_13a_requests_in_a_batch() -> None:
    """OPT-13B, ShareGPT, 2 requests/s: vLLM batches 2.2 times as many as Orca (Oracle), 4.3 times as Orca (Max)."""
    requests = sharegpt(600, 2.0)
    paged = mean_batch(served("vllm", requests, mode="paper"))
    oracle, pow2, most = (mean_batch(served("orca", requests, reserve=r)) for r in ("oracle", "pow2", "max"))
    assert paged > oracle > pow2 > most
    assert most <= SLOTS // 2048 == 7
    assert paged / oracle == pytest.approx(2.2, rel=0.2)
    assert paged / most == pytest.approx(4.3, rel=0.2)


def test_sosp_2023_figure_12_rates_served() -> None:
    """vLLM serves 1.7 to 2.7 times the rate of Orca (Oracle), 2.7 to 8 times that of Orca (Max)."""
    requests = sharegpt(400, 10.0)
    paged = served("vllm", requests, mode="paper").makespan_s
    assert 1.7 < served("orca", requests, reserve="oracle").makespan_s / paged < 2.7
    assert 2.7 < served("orca", requests, reserve="max").makespan_s / paged < 8
