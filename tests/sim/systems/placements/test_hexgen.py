"""HexGen as a system: shares by what replicas can serve, one request at a time if wanted, a new search on losses."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from sim import SYSTEMS, ClusterEvent, ConfigError
from tests.toys import ToyCost, cluster, problem, request, run


def hexgen(**options: Any) -> Any:
    return SYSTEMS["hexgen"](**{"generations": 20} | options)


def test_requests_go_where_they_are_served_soonest() -> None:
    result = run(hexgen(), [request(n, 0.01 * n, output_tokens=20) for n in range(12)], problem(cluster(2, 2)))
    places = Counter(row.prefill_stage for row in result.rows.requests)
    assert max(places.values()) - min(places.values()) <= 1
    assert {row.outcome for row in result.rows.requests} == {"completed"}


def test_one_request_at_a_time() -> None:
    result = run(hexgen(batching="one"), [request(n, 0.0) for n in range(4)], problem(cluster(1)))
    rows = sorted(result.rows.requests, key=lambda row: row.request.id)
    assert all(later.scheduled_ps == earlier.finish_ps for earlier, later in pairwise(rows))


def test_a_loss_starts_the_search_again_and_a_return_too() -> None:
    events = (
        ClusterEvent(at_s=0.05, kind="gpu_lost", target="n0.g0"),
        ClusterEvent(at_s=2.0, kind="gpu_joined", target="n0.g0"),
    )
    requests = [request(n, 0.02 * n, output_tokens=30) for n in range(200)]
    result = run(hexgen(), requests, problem(cluster(2, 1)), events=events)
    assert {row.outcome for row in result.rows.requests} == {"completed"}
    changes = [note.text for note in result.rows.notes if note.kind == "change"]
    assert changes[-1:] == ["search again: n0.g0 joined"]
    assert "n0.g0" in " ".join(row.gpus for row in result.rows.replicas if row.up_s > 2.0)


def test_a_plan_from_elsewhere_is_routed_alike() -> None:
    where = problem(cluster(2, 2), ToyCost())
    plan = SYSTEMS["vllm"](tp=2).planner.plan(where)
    result = run(hexgen(), [request(n, 0.0) for n in range(6)], where, plan=plan)
    assert Counter(row.prefill_stage for row in result.rows.requests) == {"mixed0": 3, "mixed1": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "two"}, "system.batching is 'two'; hexgen has continuous, one"),
        ({"generations": 0}, "system.generations is 0; it must be a whole number >= 1"),
        ({"prices": "none"}, "system.prices is 'none'; hexgen has model, paper"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hexgen(**options)
