"""Metis served: its plan under vLLM's batches, and whether the engine gives what the planner promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim import SYSTEMS, ConfigError
from sim.planners.metis import Metis
from tests.toys import cluster, problem, request, run


def test_requests_are_prefilled_and_decoded_apart() -> None:
    result = run(SYSTEMS["metis"](), [request(k, arrival_s=0.01 * k) for k in range(20)], problem(cluster(2, 2)))
    assert result.columns["outcome"].tolist() == ["completed"] * 20
    assert {row.role for row in result.rows.replicas} == {"prefill", "decode"}


def test_the_engine_computes_what_the_planner_promises() -> None:
    """A flood of equal requests: the predicted rate, but for filling and draining."""
    where = problem(cluster(2, gbps=1e6))
    predicted = Metis().search(where)
    count = 20000
    result = run(SYSTEMS["metis"](), [request(k) for k in range(count)], where)
    rate = count / result.makespan_s
    assert rate == pytest.approx(predicted.rate_per_s, rel=0.05)


def test_the_planner_explains_itself() -> None:
    lines = list(Metis().explain(problem(cluster(2))))
    assert lines[0].startswith("prefill: 1 replica(s), the first 1 A100-80G-SXM, layers 0 to 2; 667 requests/s")
    assert lines[1].startswith("decode: 1 replica(s)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": -1}, "system.variance is -1"),
        ({"max_tp": 0}, "system.max_tp is 0"),
        ({"max_stages": 0}, "system.max_stages is 0"),
        ({"max_permute_len": 0}, "system.max_permute_len is 0"),
        ({"kv_bits": 0}, "kv_bits"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SYSTEMS["metis"](**options)


def test_options_reach_the_planner() -> None:
    planner = SYSTEMS["metis"](variance=0.5, max_tp=2, max_stages=None, exhaustive=True).planner
    assert planner == Metis(variance=0.5, max_tp=2, max_stages=None, exhaustive=True)
    assert replace(planner, exhaustive=False) != planner  # type: ignore[type-var]
