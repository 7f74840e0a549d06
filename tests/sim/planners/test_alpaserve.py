"""AlpaServe's placement: its queueing theory exactly, its quick simulator by hand, its searches on small clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import ConfigError, Problem, Slo, Workload
from sim.planners.alpaserve import Arrival, Group, Placement, replay
from sim.planners.alpaserve.queueing import (
    md1_s,
    most_uneven_overhead,
    most_uniform_overhead,
    pipelined_s,
    simple_s,
)
from sim.types import InfeasibleError
from tests.toys import ToyCost, cluster, problem


def test_two_models_over_one_pipeline_wait_half_as_long() -> None:
    """Section 3: without overhead, equal shares."""
    apart = simple_s(1.0) - 1.0
    assert pipelined_s(1.0, 1.0, 1.0, 0.5) - 1.0 == pytest.approx(apart / 2)
    assert simple_s(1.0) == pytest.approx(1 + 1 / (4 - 2))


@given(r=st.floats(0.05, 1.95))
def test_at_the_printed_overheads_both_are_as_good(r: float) -> None:
    """Section 3: alpha, where both stages get longer, and beta, where one does."""
    alpha, beta = most_uniform_overhead(r), most_uneven_overhead(r)
    assert pipelined_s(r, 1.0, alpha, alpha / 2) == pytest.approx(simple_s(r), rel=1e-9)
    assert pipelined_s(r, 1.0, 1.0, beta / 2) == pytest.approx(simple_s(r), rel=1e-9)
    assert alpha > 1
    assert beta > 1


@given(r=st.floats(0.05, 1.9), p=st.floats(0.0, 1.0))
def test_uneven_shares_make_it_worse_for_models_apart(r: float, p: float) -> None:
    assert simple_s(r, p=p) >= simple_s(r) - 1e-9
    assert md1_s(r, 1.0) == float("inf") if r >= 1 else md1_s(r, 1.0) > 1


# ------------------------------------------------------------ the quick simulator

LATE = {"a": 1.0, "b": 1.0}


def test_requests_queue_at_the_group_that_is_free_first() -> None:
    groups = [Group({"a": (0.4,)}), Group({"a": (0.4,), "b": (0.4,)})]
    served = replay([Arrival(0.0, "a"), Arrival(0.0, "a"), Arrival(0.1, "b"), Arrival(0.2, "a")], groups, LATE)
    assert served.dispatched == (2, 2)  # the last "a": both are busy, group 0 is free at 0.4, group 1 at 0.8
    assert served.goodput == 1.0
    assert served.mean_latency_s == pytest.approx((0.4 + 0.4 + 0.7 + 0.6) / 4)


def test_who_would_be_late_is_refused_and_leaves_the_clock_alone() -> None:
    served = replay([Arrival(0.0, "a")] * 4, [Group({"a": (0.4,)})], LATE)
    assert (served.good, served.unserved("a")) == ({"a": 2}, 2)


def test_a_pipeline_takes_the_next_when_its_first_stage_is_free() -> None:
    served = replay([Arrival(0.0, "a")] * 2, [Group({"a": (0.3, 0.3)})], LATE)
    assert served.mean_latency_s == pytest.approx((0.6 + 0.9) / 2)


def test_a_model_that_nobody_hosts_is_not_served() -> None:
    assert replay([Arrival(0.0, "b")], [Group({"a": (0.1,)})], LATE).goodput == 0.0


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from("ab")), max_size=30), st.floats(0.05, 0.5))
def test_every_served_request_is_within_its_bound(arrivals: list[tuple[float, str]], stage_s: float) -> None:
    row = [Arrival(*arrival) for arrival in sorted(arrivals)]
    groups = [Group.of({"a": (stage_s, stage_s)}), Group.of({"a": (stage_s,), "b": (stage_s,)})]
    served = replay(row, groups, LATE)
    assert served.mean_latency_s <= 1.0
    assert sum(served.arrived.values()) == len(row)
    assert sum(served.dispatched) == len(row)


def gain(cv: float, share: float) -> float:
    """Mean latency of two models apart over that of both in a pipeline, as in figure 2: 0.396 s, 3 requests/s."""
    rng = np.random.default_rng(1)
    arrivals: list[Arrival] = []
    for name, rate in (("a", 3.0 * share), ("b", 3.0 * (1 - share))):
        gaps = rng.gamma(1 / cv**2, cv**2 / rate, 40_000)
        arrivals += [Arrival(float(at_s), name) for at_s in np.cumsum(gaps)]
    end_s = 40_000 / 3.0
    arrivals = sorted(arrival for arrival in arrivals if arrival.at_s < end_s)
    never = {"a": 1e9, "b": 1e9}
    apart = replay(arrivals, [Group({"a": (0.396,)}), Group({"b": (0.396,)})], never)
    stage = 0.396 * 1.01 / 2
    shared = replay(arrivals, [Group({"a": (stage, stage), "b": (stage, stage)})], never)
    return apart.mean_latency_s / shared.mean_latency_s


@pytest.mark.parametrize(("cv", "share", "printed"), [(1.0, 0.5, 1.3), (3.0, 0.5, 1.9), (1.0, 0.2, 6.6)])
def test_the_gain_of_sharing(cv: float, share: float, printed: float) -> None:
    """Figure 2, as readers report it: 1.3x (Poisson), 1.9x (CV 3), 6.6x (20:80)."""
    assert gain(cv, share) == pytest.approx(printed, rel=0.1)


# ------------------------------------------------------------ placements


def world(models: int = 4, gpus: int = 4, rate: float = 40.0, **more: object) -> Problem:
    shares = {f"m{i}": 1 / models for i in range(models)}
    return replace(
        problem(cluster(gpus=gpus), ToyCost(base_ps=2 * 10**10)),
        workload=Workload(rate_per_s=rate, lengths=((100, 1),), classes=shares), slo=Slo(e2e_s=0.3), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_every_model_is_hosted_and_every_gpu_used_once() -> None:
    plan = Placement(arrivals=300).plan(world())
    assert {name for replica in plan.replicas for name in replica.models} == {"m0", "m1", "m2", "m3"}
    gpus = [gpu for replica in plan.replicas for gpu in replica.gpus]
    assert len(gpus) == len(set(gpus)) <= 4


def test_single_gives_every_gpu_its_own_group() -> None:
    plan = Placement(search="single", arrivals=300).plan(world())
    assert all(len(replica.gpus) == 1 for replica in plan.replicas)


def test_where_all_fit_everywhere_the_search_does_not_matter() -> None:
    searches = {search: Placement(search=search, arrivals=200) for search in ("greedy", "beam")}
    plans = {name: placement.plan(world(models=2, gpus=2)) for name, placement in searches.items()}
    hosted = {name: {replica.models for replica in plan.replicas} for name, plan in plans.items()}
    assert hosted["greedy"] == hosted["beam"] == {("m0", "m1")}


def test_without_classes_there_is_one_model() -> None:
    plain = replace(world(), workload=Workload(rate_per_s=40.0, lengths=((100, 1),)))
    assert {replica.models for replica in Placement(arrivals=200).plan(plain).replicas} == {()}


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="greedy, beam, single"):
        Placement(search="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="all must be above 0"):
        Placement(cv=0.0)
    tight = world()
    with pytest.raises(InfeasibleError, match="no group of up to 4 x 8 GPUs holds tiny"):
        Placement(arrivals=100).plan(replace(tight, limits=replace(tight.limits, gpu_memory_utilization=0.01)))
