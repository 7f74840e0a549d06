"""Requests go where they are best within their SLO: by queue, batch, KV room and link; shares decide between equals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim import Plan, Problem, Request, Slo
from sim.batchers import Saturating
from sim.routers import ByAttainment, ByShare
from sim.transfers import Whole
from sim.types import ClusterEvent
from tests.lab import system
from tests.toys import cluster, problem, replica, request, run

SLO = Slo(ttft_s=0.1, tpot_s=0.05)
P0, P1 = replica("p0", ["n0.g0"], "prefill"), replica("p1", ["n1.g0"], "prefill")
D0, D1 = replica("d0", ["n2.g0"], "decode"), replica("d1", ["n3.g0"], "decode")
ONE_DECODE = Plan(replicas=(P0, P1, D0), shares={("p0", "d0"): 0.9, ("p1", "d0"): 0.1})
TWO_DECODES = Plan(replicas=(P0, D0, D1), shares={("p0", "d0"): 0.5, ("p0", "d1"): 0.5})


def where() -> Problem:
    return replace(problem(cluster(1, 4)), slo=SLO)


def ways(plan: Plan, requests: list[Request], **limits: Any) -> list[tuple[str, str]]:
    """(prefill, decode) replica of each request, in order of arrival."""
    lab = system(Saturating, router=lambda: ByAttainment(Whole()), **limits)
    rows = sorted(run(lab, requests, where(), plan=plan).rows.requests, key=lambda row: row.request.id)
    assert {row.outcome for row in rows} == {"completed"}
    return [(row.prefill_stage, row.decode_stage) for row in rows]


def test_where_all_is_idle_the_shares_decide() -> None:
    found = ways(ONE_DECODE, [request(n, 1.0 * n) for n in range(20)])
    assert Counter(prefill for prefill, _ in found) == {"p0": 18, "p1": 2}


def test_a_queue_outweighs_the_shares() -> None:
    """A prompt of 1000 tokens takes 20 ms of the 100 that it may, more than a hundredth for what p0 is owed."""
    assert [prefill for prefill, _ in ways(ONE_DECODE, [request(n, 0.0, 1000) for n in range(2)])] == ["p0", "p1"]


def test_whose_kv_finds_no_room_goes_elsewhere() -> None:
    """Of 304 tokens two requests hold 200 and their answers; the third would wait for one of them to end."""
    plan = replace(TWO_DECODES, shares={("p0", "d0"): 0.99, ("p0", "d1"): 0.01})
    found = [decode for _, decode in ways(plan, [request(n, 0.05 * n, 100, 60) for n in range(3)], num_kv_blocks=19)]
    assert found == ["d0", "d0", "d1"]
    roomy = [decode for _, decode in ways(plan, [request(n, 0.05 * n, 100, 60) for n in range(3)], num_kv_blocks=200)]
    assert roomy == ["d0", "d0", "d0"]


def test_pairs_without_a_share_get_nothing() -> None:
    plan = Plan(replicas=(P0, P1, D0, D1), shares={("p0", "d0"): 0.5, ("p1", "d1"): 0.5})
    assert set(ways(plan, [request(n, 0.003 * n) for n in range(30)])) == {("p0", "d0"), ("p1", "d1")}


def test_without_shares_every_pair_counts_alike() -> None:
    plan = Plan(replicas=(P0, P1, D0, D1))
    assert set(Counter(ways(plan, [request(n, 1.0 * n) for n in range(8)])).values()) == {2}


def test_what_has_left_is_forgotten_after_faults_too() -> None:
    router = ByAttainment(Whole())
    lab = system(Saturating, router=lambda: router)
    events = [ClusterEvent(at_s=0.2, kind="node_lost", target="n3")]
    result = run(lab, [request(n, 0.01 * n) for n in range(60)], where(), plan=TWO_DECODES, events=events)
    assert {row.outcome for row in result.rows.requests} <= {"completed", "failed"}
    late = [row for row in result.rows.requests if row.request.arrival_s > 0.2]
    assert {row.decode_stage for row in late} == {"d0"}
    assert set(router._assigned.values()) == {0}
    assert set(router._tokens.values()) == {0}
    assert not router._place


def test_nobody_up_is_a_refusal() -> None:
    lab = system(Saturating, router=lambda: ByAttainment(Whole()))
    only = Plan(replicas=(P0,))
    assert run(lab, [request(0)], where(), plan=only).rows.requests[0].reason == (
        "no (prefill, decode) pair of the plan is up"
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bursts_meet_the_slo_more_often_than_by_shares(seed: int) -> None:
    """Two equal prefill groups with shares a little off, Poisson arrivals near what both compute."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / 60, 600)).tolist()
    requests = [request(n, at, int(rng.integers(200, 4000)), 4) for n, at in enumerate(arrivals)]
    plan = replace(ONE_DECODE, shares={("p0", "d0"): 0.6, ("p1", "d0"): 0.4})
    model = replace(where().model, max_position_embeddings=5000)
    late = {}
    for name, router in (("state", lambda: ByAttainment(Whole())), ("shares", ByShare)):
        lab = system(Saturating, router=router, max_model_len=5000)  # type: ignore[arg-type]
        columns = run(lab, requests, replace(where(), model=model), plan=plan).columns
        late[name] = float((columns["ttft_s"] > 0.1).mean())
    assert late["state"] < 0.75 * late["shares"], late
